"""Learning without Forgetting (Li and Hoiem, 2016) for adapters: on the task's own data, stay near the base.

Knows nothing about general text.
"""

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..imsm.adapters import adapter_layers, adapters_off, dropout_off
from ..imsm.labels import IGNORED
from ..rehearsal.terms import Batch, Materials, Term, divergence


def lwf(model: PeftModel, materials: Materials) -> Term:
    """KL(base ‖ adapted) where the task has labels, in nats per label: one more forward pass of the base a step."""
    adapted, layers = model, adapter_layers(model)

    def term(model: Any, inputs: Batch, outputs: Any, step: int) -> Tensor | None:
        wanted = inputs["labels"][:, 1:] != IGNORED
        fields = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
        base = original_logits(adapted, layers, fields)[:, :-1][wanted]
        return materials.weight * divergence(base, outputs.logits[:, :-1][wanted])

    return term


@torch.no_grad()
def original_logits(model: Any, layers: list[nn.Module], fields: Mapping[str, Tensor]) -> Tensor:
    """The base's own logits [B, T, V], without dropout; the adapter's `layers` and the mode are left as they were."""
    with adapters_off(layers), dropout_off(model):
        logits: Tensor = model(**fields, use_cache=False).logits
    return logits
