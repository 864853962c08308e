"""Putting rows of token ids into one rectangular batch. Knows nothing about text, tasks or models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100
Side = Literal["left", "right"]


def pad_rows(
    rows: Sequence[Sequence[int]], value: int, *, side: Side = "right", multiple_of: int | None = None
) -> Tensor:
    """A LongTensor [B, T] with every row filled up with `value` on one side; T is the longest row's length."""
    length = max(len(row) for row in rows)
    if multiple_of is not None:
        length = -(-length // multiple_of) * multiple_of
    batch = torch.full((len(rows), length), value, dtype=torch.long)
    for target, row in zip(batch, rows, strict=True):
        start = 0 if side == "right" else length - len(row)
        target[start : start + len(row)] = torch.as_tensor(row, dtype=torch.long)
    return batch


def attention_mask_of(rows: Sequence[Sequence[int]], *, side: Side = "right", multiple_of: int | None = None) -> Tensor:
    """1 for the rows' own tokens, 0 for padding; LongTensor [B, T].

    It comes from the lengths and never from the ids, because padding may be the same token as the end of text.
    """
    return pad_rows([[1] * len(row) for row in rows], 0, side=side, multiple_of=multiple_of)


@dataclass
class CompletionCollator:
    """Collates rows of `input_ids` and `labels`, and `query_mask` where there is one; other columns are left out.

    Attributes:
        tokenizer: gives the padding id.
        padding_side: where padding goes.
        pad_to_multiple_of: make T a multiple of this, for hardware that likes it.
    """

    tokenizer: PreTrainedTokenizerBase
    padding_side: Side = "right"
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """LongTensors `input_ids`, `attention_mask` and `labels`, each [B, T]; labels of padding are -100. With
        `query_mask` in the rows that too, and padding is no part of a query."""
        ids = [row["input_ids"] for row in rows]
        labels = [row["labels"] for row in rows]
        side, multiple_of = self.padding_side, self.pad_to_multiple_of
        pad_id = self.tokenizer.pad_token_id
        batch = {
            "input_ids": pad_rows(ids, pad_id, side=side, multiple_of=multiple_of),
            "attention_mask": attention_mask_of(ids, side=side, multiple_of=multiple_of),
            "labels": pad_rows(labels, IGNORED_LABEL, side=side, multiple_of=multiple_of),
        }
        if "query_mask" in rows[0]:
            asked = [row["query_mask"] for row in rows]
            batch["query_mask"] = pad_rows(asked, 0, side=side, multiple_of=multiple_of)
        return batch
