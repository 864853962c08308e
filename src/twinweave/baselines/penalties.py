"""Penalties on how far an adapter moves the weights: all alike (L2-SP), or by how much the base needs them (EWC).

Both are relative to the squared norm of the adapted weights, so that a weight means the same for small and large
models: at weight 1 of L2-SP, a change as large as the weights themselves costs 1 nat per token. Knows nothing about
which adapters there are.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..imsm.adapters import adapter_layers, adapters_off, dropout_off
from ..imsm.labels import IGNORED
from ..progress import track
from ..rehearsal import RehearsalRows
from ..rehearsal.terms import Batch, Materials, Term
from .weight_change import adapted_weights, squared_change, weight_change

FISHER_ROWS = 256


def l2_sp(model: PeftModel, materials: Materials) -> Term:
    """L2-SP (Li et al., 2018) for adapters: Σ‖ΔW‖² / Σ‖W‖² over the adapted layers.

    Raises UnsupportedModelError for adapters of other layers than linear ones.
    """
    adapted = adapted_weights(model)
    layers, norm = [layer for layer, _ in adapted], _squared_norm([weight for _, weight in adapted])

    def term(model: Any, inputs: Batch, outputs: Any, step: int) -> Tensor | None:
        return materials.weight * _summed([squared_change(layer) for layer in layers]) / norm

    return term


def ewc(model: PeftModel, materials: Materials) -> Term:
    """Elastic weight consolidation (Kirkpatrick et al., 2017): Σ F ΔW² / Σ‖W‖², F the diagonal Fisher with mean 1.

    F is computed here, once, and kept as one fp32 tensor per adapted weight; ΔW is made whole at every step.
    Raises UnsupportedModelError for adapters of other layers than linear ones, RecipeError without general text.
    """
    general, adapted = materials.general_text(), adapted_weights(model)
    layers, weights = [layer for layer, _ in adapted], [weight for _, weight in adapted]
    fisher, norm = diagonal_fisher(model, weights, general), _squared_norm(weights)
    mean = float(_summed([f.sum() for f in fisher])) / sum(f.numel() for f in fisher)
    for f in fisher:
        f.div_(mean or 1.0)

    def term(model: Any, inputs: Batch, outputs: Any, step: int) -> Tensor | None:
        changes = (weight_change(layer).float().square() for layer in layers)
        return materials.weight * _summed([(f * c).sum() for f, c in zip(fisher, changes, strict=True)]) / norm

    return term


def diagonal_fisher(model: PeftModel, weights: Sequence[nn.Parameter], general: RehearsalRows) -> list[Tensor]:
    """For each weight the mean over rows of the squared gradient of a row's log-likelihood, in fp32.

    One backward pass for each of the first 256 rows, alone, over the places that rehearsal compares. Where the base
    wrote the rows at temperature 1 this estimates the true Fisher; on other text it is the empirical one.
    """
    total = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    count = min(FISHER_ROWS, len(general.rows))
    runnable: Any = model
    with adapters_off(adapter_layers(model)), dropout_off(model), _with_gradient(weights):
        for number in track(range(count), "Fisher information"):
            batch = {n: t.to(weights[0].device) for n, t in general.collator([general.rows[number]]).items()}
            fields = {name: batch[name] for name in ("input_ids", "attention_mask")}
            logits = runnable(**fields, use_cache=False).logits[:, :-1].flatten(0, 1).float()
            loss = cross_entropy(logits, batch["labels"][:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)  # unused: an expert nothing went to
            for sum_, gradient in zip(total, gradients, strict=True):
                if gradient is not None:
                    sum_.addcmul_(gradient.float(), gradient.float(), value=1 / count)
    return total


@contextmanager
def _with_gradient(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, was in zip(weights, before, strict=True):
            weight.requires_grad_(was)


def _squared_norm(weights: Sequence[nn.Parameter]) -> float:
    return float(_summed([weight.detach().float().square().sum() for weight in weights]))


def _summed(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()
