"""By how much an adapter changes the weight of each layer it adapts, as a tensor to take gradients through.

Knows nothing about penalties.
"""

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedModelError
from ..imsm.adapters import adapter_layers, dropout_off


def adapted_weights(model: PeftModel) -> list[tuple[Any, nn.Parameter]]:
    """Each adapted layer with the base's weight in it.

    Raises UnsupportedModelError where what an adapter changes is not a matrix of the base.
    """
    found: list[tuple[Any, nn.Parameter]] = []
    for layer in adapter_layers(model):
        base_layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else None
        weight = getattr(base_layer, "weight", None)
        is_matrix = isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point()
        if not is_matrix or not (isinstance(base_layer, (nn.Linear, Conv1D)) or _is_added(layer)):
            raise UnsupportedModelError(
                f"The adapter's {type(layer).__name__} changes a {type(base_layer or layer).__name__}, and a penalty "
                "on the change of weights needs adapted linear layers. Use LoRA on linear layers, or leave the "
                "methods peft_l2 and peft_ewc out."
            )
        assert isinstance(weight, nn.Parameter)
        found.append((layer, weight))
    return found


def weight_change(layer: Any) -> Tensor:
    """The effective change of the layer's weight, in the weight's shape, with gradient to the adapter.

    LoRA gives it as a product; of any other adapter of a linear layer it is what comes out when the identity goes in.
    """
    if _is_added(layer):
        return sum((layer.get_delta_weight(name) for name in _active(layer)), start=torch.zeros(()))
    base_layer = layer.get_base_layer()
    weight = base_layer.weight
    is_transposed = isinstance(base_layer, Conv1D)  # [in, out]
    size = weight.shape[0 if is_transposed else 1]
    with dropout_off(layer):
        identity = torch.eye(size, device=weight.device, dtype=weight.dtype)
        change = layer(identity) - base_layer(identity)
    return change if is_transposed else change.T


def squared_change(layer: Any) -> Tensor:
    """‖ΔW‖² of the layer; of LoRA's sBA as s² tr(BᵀB AAᵀ), without the matrix itself."""
    names = _active(layer) if _is_added(layer) else []
    factors = [layer.lora_A[name] for name in names if name in layer.lora_A]
    if len(names) == 1 and factors and isinstance(factors[0], nn.Linear):
        scale, a, b = layer.scaling[names[0]], factors[0].weight.float(), layer.lora_B[names[0]].weight.float()
        return scale**2 * ((b.T @ b) * (a @ a.T)).sum()
    return weight_change(layer).float().square().sum()


def _is_added(layer: Any) -> bool:
    """Whether it is LoRA (or AdaLoRA) that adds its delta as it is; variants such as DoRA do more."""
    plain = isinstance(layer, LoraLayer) and hasattr(layer, "get_delta_weight")
    return plain and not any(layer.use_dora.values()) and not getattr(layer, "lora_variant", None)


def _active(layer: Any) -> list[str]:
    held = {*layer.lora_A.keys(), *layer.lora_embedding_A.keys()}
    return [name for name in layer.active_adapters if name in held]
