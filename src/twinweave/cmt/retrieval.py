"""What a batch of questions is answered from, as the aggregator takes it. Knows nothing about banks or models."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UsageError
from .aggregator import pooled

Given = Tensor | Sequence[Tensor]
Near = list[tuple[float, Tensor]]
"""The memories [k, D] that were found for a question, each with its similarity, the nearest first."""


@dataclass(frozen=True)
class Found:
    """What was found for B questions, K memories at the most.

    Attributes:
        question: the questions' own vectors, [B, k, D].
        memories: [B, K, k, D], filled up with zeros.
        seen: bool [B, K], which of them are a row's own; a row without any sees the zeros.
        having: bool [B], which rows have any. What comes of the others' zeros is for nobody to see.
    """

    question: Tensor
    memories: Tensor
    seen: Tensor
    having: Tensor


def found_for(question: Tensor, near: Sequence[Near], least: float | None) -> Found | None:
    """The memories that are at least so similar (None: all); None if that leaves nothing for any question."""
    kept = [[block for similarity, block in row if least is None or similarity >= least] for row in near]
    count = max((len(row) for row in kept), default=0)
    if not count:
        return None
    empty = torch.zeros(question.shape[1:])
    device = question.device
    return Found(
        question,
        torch.stack([torch.stack([*row, *[empty] * (count - len(row))]) for row in kept]).to(device),
        torch.tensor([[number < len(row) or not row for number in range(count)] for row in kept], device=device),
        torch.tensor([bool(row) for row in kept], device=device),
    )


def nearest(keys: Tensor, given: Given, top_k: int) -> list[Near]:
    """For each question's key [B, D] the nearest of the memories that are given: [n, k, D] for all of them, or a
    sequence with such a tensor for each. They are rounded as a bank keeps them. Raises UsageError."""
    each = [given] * len(keys) if isinstance(given, Tensor) else list(given)
    if len(each) != len(keys):
        raise UsageError(
            f"Memories were given for {len(each)} rows, and there are {len(keys)}. Give some for each row."
        )
    result = []
    for key, memories in zip(keys.cpu(), each, strict=True):
        kept = memories.to("cpu", torch.bfloat16).float()
        similar = pooled(memories.cpu()) @ key
        best = similar.argsort(descending=True, stable=True)[:top_k].tolist()
        result.append([(similar[index].item(), kept[index]) for index in best])
    return result
