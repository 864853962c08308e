"""Rows for models that read a context apart from its questions: one row for each context, and how rows are batched.

Knows nothing about models: which state answers from which chunks goes beside the batch, as `reads`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from twinweave.data.collator import IGNORED_LABEL, attention_mask_of, pad_rows
from twinweave.data.encode import Encoded
from twinweave.data.templates import Example
from twinweave.errors import DataError
from twinweave.progress import track
from twinweave.text import chunks_of

QUESTIONS_PER_CONTEXT = 16
Tokens = list[int]


@dataclass
class ContextRows:
    """Makes one row {chunks, questions} of the examples with the same context.

    Attributes:
        chunk_size: tokens of a text that are read at once, the start of text not counted.
        questions: the most of one row; what a context has more goes into further rows with the same chunks.
    """

    tokenizer: PreTrainedTokenizerBase
    chunk_size: int
    questions: int = QUESTIONS_PER_CONTEXT

    def __call__(self, examples: Sequence[Example], encoded: Sequence[Encoded]) -> datasets.Dataset:
        """Columns `chunks` (lists of token ids) and `questions` ({input_ids, labels} each), in the order of the first
        question. Raises DataError for an example without a context."""
        asked: dict[tuple[str, ...], list[dict[str, Tokens]]] = {}
        for example, row in zip(examples, encoded, strict=True):
            if not example.documents:
                raise DataError(f"{example.where} has no context to read. Fill it in, or remove the row.")
            asked.setdefault(example.documents, []).append({"input_ids": row.input_ids, "labels": row.labels})
        chunks: list[list[Tokens]] = []
        questions: list[list[dict[str, Tokens]]] = []
        for documents, of_context in track(list(asked.items()), "Encoding contexts"):
            read = [ids for text in documents for ids, _ in chunks_of([text], self.tokenizer, self.chunk_size)]
            for start in range(0, len(of_context), self.questions):
                chunks.append(read)
                questions.append(of_context[start : start + self.questions])
        return datasets.Dataset.from_dict({"chunks": chunks, "questions": questions})


def questions_of(rows: datasets.Dataset) -> datasets.Dataset:
    """The questions of rows {chunks, questions}, one after the other: `input_ids` and `labels`."""
    questions = [question for row in rows.select_columns("questions") for question in row["questions"]]
    return datasets.Dataset.from_dict({name: [q[name] for q in questions] for name in ("input_ids", "labels")})


@dataclass
class ContextCollator:
    """Batches rows {chunks, questions}: Q contexts with all their chunks and k·Q questions, k for each context.

    k is the most questions of a row in the batch; what a context has less is filled up with rows of one token that has
    no loss.
    """

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and `labels` [k·Q, T]; `context_ids` and `context_mask` [C, M]; `reads`
        [Q, C], 1 where the context has the chunk."""
        pad_id = int(self.tokenizer.pad_token_id)
        most = max(len(row["questions"]) for row in rows)
        filler = {"input_ids": [pad_id], "labels": [IGNORED_LABEL]}
        asked = [
            question for row in rows for question in [*row["questions"], *[filler] * (most - len(row["questions"]))]
        ]
        reads = torch.block_diag(*(torch.ones(1, len(row["chunks"]), dtype=torch.long) for row in rows))
        chunks = [chunk for row in rows for chunk in row["chunks"]]
        ids, labels = [q["input_ids"] for q in asked], [q["labels"] for q in asked]
        return batch_of(ids, labels, chunks, reads, pad_id)


def batch_of(
    ids: Sequence[Tokens], labels: Sequence[Tokens], chunks: Sequence[Tokens], reads: Tensor, pad_id: int
) -> dict[str, Tensor]:
    """Rows and the chunks that are read for them, padded on the right."""
    # `input_ids` first: transformers' Trainer takes the first tensor's length for the size of the batch
    return {
        "input_ids": pad_rows(ids, pad_id),
        "attention_mask": attention_mask_of(ids),
        "labels": pad_rows(labels, IGNORED_LABEL),
        "context_ids": pad_rows(chunks, pad_id),
        "context_mask": attention_mask_of(chunks),
        "reads": reads,
    }
