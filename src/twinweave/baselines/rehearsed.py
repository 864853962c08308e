"""General text for a plain adapter: to stay near the base on it (the gate's rehearsal without a gate), or to train on.

Knows nothing about where the text comes from.
"""

from typing import Any

from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..imsm.adapters import adapter_layers, statistics_off
from ..imsm.labels import IGNORED
from ..processes import mean_over_processes
from ..rehearsal.terms import Batch, Materials, Term, divergence, on_device_of
from .distillation import original_logits


def adapter_rehearsal(model: PeftModel, materials: Materials) -> Term:
    """The control without a gate: KL(base ‖ adapted) on the same text in the same places, gradient to the adapter."""
    general = materials.general_text()
    adapted, layers = model, adapter_layers(model)

    def term(model: Any, inputs: Batch, outputs: Any, step: int) -> Tensor | None:
        batch = on_device_of(inputs, general.batch(step, materials.seed))
        if batch is None:
            return None
        wanted = batch["labels"][:, 1:] != IGNORED
        fields = {name: batch[name] for name in ("input_ids", "attention_mask")}
        base = original_logits(adapted, layers, fields)[:, :-1][wanted]
        with statistics_off(adapted):
            logits = model(**fields, use_cache=False).logits[:, :-1][wanted]
        return materials.weight * general.settings.weight * general.settings.every * divergence(base, logits)

    return term


def replay(model: PeftModel, materials: Materials) -> Term:
    """Ordinary training on general text beside the task: cross-entropy of its own tokens, gradient to the adapter."""
    general = materials.general_text()

    def term(model: Any, inputs: Batch, outputs: Any, step: int) -> Tensor | None:
        batch = on_device_of(inputs, general.batch(step, materials.seed))
        if batch is None:
            return None
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        wanted = batch["labels"][:, 1:].flatten()
        loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted, ignore_index=IGNORED)
        loss = mean_over_processes(loss, (wanted != IGNORED).sum())
        return materials.weight * general.settings.every * loss

    return term
