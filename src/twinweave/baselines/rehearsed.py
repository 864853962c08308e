"""General text for a plain adapter: to stay near the base on it (the gate's rehearsal without a gate), or to train on.

Knows nothing about where the text comes from.
"""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..genadapter import GenerativeAdapter
from ..imsm.adapters import adapter_layers, statistics_off
from ..imsm.labels import IGNORED
from ..processes import mean_over_processes
from ..rehearsal.terms import Batch, Materials, Term, divergence, on_device_of
from .distillation import original_logits

_REHEARSED_STATES = 4  # reading for general text costs what reading for the task does


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


def reader_rehearsal(model: GenerativeAdapter, materials: Materials) -> Term | None:
    """For generators of adapters: KL(base ‖ adapted to what was read) on general text, which no reading should change.

    At each step some of the task's contexts are read for it, equally many rows of general text to each. None where
    there is nothing to rehearse.
    """
    general = materials.rehearsal
    if general is None:
        return None

    def term(model: Any, inputs: Batch, outputs: Any, step: int) -> Tensor | None:
        batch = on_device_of(inputs, general.batch(step, materials.seed))
        if batch is None:
            return None
        states = min(len(inputs["reads"]), _REHEARSED_STATES, len(batch["input_ids"]))
        rows = len(batch["input_ids"]) // states * states
        fields = {name: batch[name][:rows] for name in ("input_ids", "attention_mask")}
        wanted = batch["labels"][:rows, 1:] != IGNORED
        with torch.no_grad():
            base = model(**fields, use_cache=False).logits[:, :-1][wanted]
        reads = inputs["reads"][:states]
        used = reads.any(0)
        context = {name: inputs[name][used] for name in ("context_ids", "context_mask")}
        logits = model(**fields, **context, reads=reads[:, used], use_cache=False).logits[:, :-1][wanted]
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
