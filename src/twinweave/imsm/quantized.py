"""Quantised bases: the one thing that has to be done about them. Knows nothing about the weave."""

from typing import Any

from torch import nn


def keep_differentiable(base: nn.Module) -> None:
    """Leave bitsandbytes' 4-bit layers in the form that gradients can pass.

    On CPUs with AVX512-BF16 such a layer rearranges its weights for a faster product at the first call in evaluation
    mode, such as a validation or a frozen pass, and no gradient goes through it ever after. In the plain form it
    dequantises, in training and evaluation alike. Elsewhere nothing changes.
    """
    for layer in base.modules():
        if not getattr(layer, "support_avx512bf16_for_cpu", False):
            continue
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        weight: Any = layer.weight
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)
