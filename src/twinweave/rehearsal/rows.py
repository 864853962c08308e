"""Sequences of tokens -> rows to rehearse on, and their batches, step by step.

A row says in which places the next-token distributions are compared, and which of its tokens are the query: in half of
the rows the query ends somewhere within, as the prompt of an answer does; in the others it is all that has been read so
far, as in plain text. Knows nothing about models and losses.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import datasets
import numpy
from torch import Tensor

from ..data.collator import IGNORED_LABEL
from ..processes import process_count, process_index
from .settings import RehearsalSettings

_BATCHES_TO_SORT = 16

Collator = Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]


@dataclass(frozen=True)
class Written:
    """A text as token ids; in a conversation also the column where its last answer begins."""

    ids: list[int]
    answer: int | None = None


def make_rows(sequences: Sequence[Written], settings: RehearsalSettings) -> datasets.Dataset:
    """Rows of `input_ids`, `labels` (the token itself where distributions are compared, -100 elsewhere) and
    `query_mask`; the same for the same seed. Sequences of a single token have nothing to compare and are left out."""
    random = numpy.random.default_rng(settings.seed)
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "query_mask": []}
    for written in sequences:
        ids = numpy.asarray(written.ids, dtype=numpy.int32)
        if len(ids) < 2:
            continue
        places = 1 + random.permutation(len(ids) - 1)[: settings.positions]
        labels = numpy.full(len(ids), IGNORED_LABEL, dtype=numpy.int32)
        labels[places] = ids[places]
        end = written.answer or int(random.integers(1, len(ids)))
        asked = numpy.arange(len(ids)) < (end if random.random() < 0.5 else len(ids))
        for name, values in (("input_ids", ids), ("labels", labels), ("query_mask", asked)):
            columns[name].append(values)
    return datasets.Dataset.from_dict(columns)


@dataclass(frozen=True)
class RehearsalRows:
    """Rows to rehearse on, served in batches."""

    rows: datasets.Dataset
    collator: Collator
    settings: RehearsalSettings
    batch_size: int
    _orders: dict[tuple[int, int], numpy.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def batch(self, step: int, seed: int) -> dict[str, Tensor] | None:
        """What is rehearsed at a training step: `input_ids`, `attention_mask`, `labels` and `query_mask`, all [B, T];
        None at steps without rehearsal. It depends on the step and the seed alone, so that training can be resumed;
        each of a run's processes has its own part of what one process with as many rows a step would have."""
        if step % self.settings.every or not len(self.rows):
            return None
        whole = self._rows_of_a_step
        part = whole // process_count()
        first = step // self.settings.every * whole + process_index() * part
        rounds = [divmod(number, len(self.rows)) for number in range(first, first + part)]
        return self.collator([self.rows[int(self._order(seed, again)[place])] for again, place in rounds])

    @property
    def _rows_of_a_step(self) -> int:
        """In all processes together; not more than there are, unless there are fewer than processes."""
        processes = process_count()
        return processes * min(self.batch_size, max(1, len(self.rows) // processes))

    def _order(self, seed: int, again: int) -> numpy.ndarray:
        """The order of the rows in one round: by chance, with neighbours of about the same length, since what a batch
        costs is its longest row."""
        if (seed, again) in self._orders:
            return self._orders[seed, again]
        random = numpy.random.default_rng((seed, again))
        order, size = random.permutation(len(self.rows)), self._rows_of_a_step
        batches: list[numpy.ndarray] = []
        for start in range(0, len(order), _BATCHES_TO_SORT * size):
            some = order[start : start + _BATCHES_TO_SORT * size]
            some = some[numpy.argsort(self._lengths[some], kind="stable")]
            alike = [some[first : first + size] for first in range(0, len(some), size)]
            batches += [alike[index] for index in random.permutation(len(alike))]
        self._orders[seed, again] = numpy.concatenate(batches)
        return self._orders[seed, again]

    @cached_property
    def _lengths(self) -> numpy.ndarray:
        return numpy.array([len(ids) for ids in self.rows["input_ids"]])
