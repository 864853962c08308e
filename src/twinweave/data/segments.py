"""Text alone as something to learn reading from: segments of chunks, of which each prefix is to be said again and
continued (reconstruction and completion).

Knows nothing about models.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from twinweave.data.collator import IGNORED_LABEL
from twinweave.data.contexts import Tokens, batch_of
from twinweave.data.encode import check_tokenizer
from twinweave.data.formats import load_rows
from twinweave.data.prepare import DataReport, Source, TrainingData, hold_out
from twinweave.data.templates import fill_template
from twinweave.errors import DataError
from twinweave.progress import track
from twinweave.text import chunks_of

SEGMENT_CHUNKS = 8


def prepare_segments(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    chunk_size: int,
    segment_chunks: int = SEGMENT_CHUNKS,
    validation: Source | None = None,
    validation_fraction: float = 0.05,
    limit: int | None = None,
    seed: int = 0,
    split: str | None = None,
) -> TrainingData:
    """The texts of a source as segments; the column `chunks` holds 2 to `segment_chunks` lists of token ids.

    `text`: a format string over the columns. Texts are not mixed: each is cut into segments of its own, the last of
    which is shorter. What is no longer than one chunk is cut into halves. Of the segments a seeded share of
    `validation_fraction` (1 to 500) is held out, whole texts that fit into it, unless `validation` is a source of its
    own. Raises DataError, and UnsupportedModelError for a tokenizer that cannot end or pad a text.
    """
    check_tokenizer(tokenizer)
    train, texts = _segments(source, tokenizer, text, chunk_size, segment_chunks, split, limit)
    rows = len(train)
    if validation is not None:
        held_out, _ = _segments(validation, tokenizer, text, chunk_size, segment_chunks, "validation", None)
    else:
        if len(set(texts)) < 2:
            raise DataError(f"{source} is one text, which cannot be split. Give more texts, or a validation file.")
        train, held_out = hold_out(train, validation_fraction, seed, texts)
    trained = sum(2 * sum(len(chunk) - 1 for chunk in segment[1:]) for segment in train)
    report = DataReport(rows, len(train), len(held_out), cut_rows=0, trained_tokens=trained)
    return TrainingData(
        datasets.Dataset.from_dict({"chunks": train}), datasets.Dataset.from_dict({"chunks": held_out}), report
    )


@dataclass
class SegmentCollator:
    """Batches segments: every prefix of a segment but the whole is a state, and has two rows.

    The first says one of the prefix's chunks again, the second the chunk behind the prefix. Which chunk is said again
    is drawn by chance that depends on nothing but the segments of the batch: a batch that is made again, by a training
    that goes on or by the next validation, is the same batch, and one that is shuffled otherwise is another. With one
    segment in a batch there is one draw, so that it is the same chunk in every epoch.
    """

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """As `ContextCollator`, with two rows for each state and `reads` triangular within a segment. All tokens of a
        row but the first have a loss: the first is the start of text, or has nothing before it."""
        segments = [row["chunks"] for row in rows]
        chance = torch.Generator().manual_seed(zlib.crc32(repr(segments).encode()))
        ids: list[Tokens] = []
        for segment in segments:
            for state in range(1, len(segment)):
                again = int(torch.randint(state, (), generator=chance))
                ids += [segment[again], segment[state]]
        labels = [[IGNORED_LABEL, *row[1:]] for row in ids]
        read = [chunk for segment in segments for chunk in segment[:-1]]
        prefixes = [torch.ones(len(segment) - 1, len(segment) - 1, dtype=torch.long).tril() for segment in segments]
        return batch_of(ids, labels, read, torch.block_diag(*prefixes), int(self.tokenizer.pad_token_id))


def _segments(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    chunk_size: int,
    segment_chunks: int,
    split: str | None,
    limit: int | None,
) -> tuple[list[list[Tokens]], list[str]]:
    """The segments of a source, and the text of each."""
    found: list[list[Tokens]] = []
    texts: list[str] = []
    for number, row in enumerate(track(load_rows(source, split=split, limit=limit), "Encoding texts"), start=1):
        text = str(fill_template(template, row, where=f"{source} row {number}"))
        chunks = [ids for ids, _ in chunks_of([text], tokenizer, chunk_size)] if text.strip() else []
        for start in range(0, len(chunks), segment_chunks):
            found += _whole(chunks[start : start + segment_chunks], tokenizer)
        texts += [text] * (len(found) - len(texts))
    if not found:
        raise DataError(f"{source} has no text of two words or more. Check train.text ({template!r}).")
    return found, texts


def _whole(chunks: list[Tokens], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[Tokens]]:
    """A segment with something to read and something behind it, if there is one."""
    if len(chunks) > 1:
        yield chunks
        return
    start = 0 if tokenizer.bos_token_id is None else 1
    leading, ids = chunks[0][:start], chunks[0][start:]
    if len(ids) > 1:
        yield [leading + ids[: len(ids) // 2], leading + ids[len(ids) // 2 :]]
