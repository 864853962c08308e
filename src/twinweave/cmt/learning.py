"""What a training batch says: which tokens ask, which documents hold the answers, and which of them a question sees.

Knows nothing about how memories or logits come about.
"""

import torch
from torch import Tensor

from ..errors import UsageError
from .aggregator import pooled
from .compressor import padded_first
from .config import CMTConfig
from .objective import self_matching

IGNORED = -100


def asked(ids: Tensor, mask: Tensor, labels: Tensor | None, query_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The tokens of each row's question, padded in front, and their mask, as narrow as they can be: those of
    `query_mask`, or those before the first label, or all."""
    tokens = mask.bool()
    if query_mask is not None:
        tokens = tokens & query_mask.bool()
    elif labels is not None:
        tokens = tokens & ((labels != IGNORED).cumsum(1) == 0)
    ids, tokens = padded_first(ids, tokens)
    width = max(int(tokens.sum(1).max()), 1)
    return ids[:, -width:], tokens[:, -width:]


def belonging(reads: Tensor | None, documents: int, rows: int, device: torch.device) -> Tensor:
    """bool [B, C]: which documents hold the answer of which rows, of `reads` [Q, C], a line for each group of
    neighbouring rows; None: the groups are as many as the documents. Raises UsageError."""
    lines = torch.eye(documents, device=device) if reads is None else reads
    if lines.shape[1] != documents or not len(lines) or rows % len(lines):
        raise UsageError(
            f"reads is {list(lines.shape)} for {documents} documents and {rows} rows. Give a line for each group of as "
            "many rows, with a column for each document."
        )
    return lines.bool().repeat_interleave(rows // len(lines), dim=0)


def seen_of(belongs: Tensor, share: float) -> Tensor | None:
    """bool [B, C]: the documents that each row sees where it sees a share of those that are not its own; None: all."""
    if share >= 1:
        return None
    others = torch.rand(belongs.shape, device=belongs.device) < share
    return belongs | others | ~belongs.any(1, keepdim=True)  # a row without one of its own only fills the batch up


def matching_loss(
    question: Tensor, memories: Tensor, belongs: Tensor, labels: Tensor, ids: Tensor, mask: Tensor, settings: CMTConfig
) -> Tensor:
    """L_sm of questions [B, k, D] with `labels` [B, T] and memories [C, k, D] of documents `ids`, `mask` [C, M]."""
    answered = (labels != IGNORED).any(1, keepdim=True)  # rows that only fill the batch up ask nothing
    known = ids.masked_fill(mask == 0, -1)
    same = (known[:, None] == known[None]).all(-1)
    return self_matching(pooled(question), pooled(memories), belongs & answered, same, settings.separation_weight)
