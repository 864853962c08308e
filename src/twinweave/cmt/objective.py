"""The two terms that memories are trained with. Knows nothing about how memories or logits come about."""

import torch
from torch import Tensor


def contrasted(with_memory: Tensor, without: Tensor, alpha: float) -> Tensor:
    """(1 + alpha) l(y | M*, q) - alpha l(y | q), logits [..., V], of the memory-aware objective and of contrastive
    decoding."""
    return with_memory + alpha * (with_memory - without)


def self_matching(questions: Tensor, memories: Tensor, belongs: Tensor, same: Tensor, separation: float) -> Tensor:
    """L_sm = -cos(q_i, M_i) + lambda log sum_{j != i} exp(-|M_i - M_j|^2), its mean over questions.

    questions [Q, D], memories [C, D]: pooled, of length 1. belongs: bool [Q, C], the memories that have what a question
    is about; of several the nearest counts. same: bool [C, C], memories of the same document, which are no others
    (each with itself among them). Questions without a memory are left out.
    """
    with torch.autocast(questions.device.type, enabled=False):  # cosines lie close together
        cosines, distance = questions @ memories.T, (2 - 2 * memories @ memories.T).clamp(min=0)
    similar = cosines.masked_fill(~belongs, -2.0)
    asked = belongs.any(1)
    nearest, own = similar.max(1)
    matching = -nearest[asked].sum() / asked.sum().clamp(min=1)
    others = (-distance).masked_fill(same, float("-inf"))
    spread = torch.where(same.all(1), 0.0, torch.logsumexp(others.masked_fill(same.all(1, keepdim=True), 0.0), 1))
    return matching + separation * (spread[own] * asked).sum() / asked.sum().clamp(min=1)
