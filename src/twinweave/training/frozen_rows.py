"""Rows as a frozen-memory store sees them: a key for each, their sizes, and which of them share a shard.

Knows nothing about models or files.
"""

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from ..imsm.labels import IGNORED
from ..progress import track

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Row:
    """One row of a dataset, as a store sees it."""

    key: bytes
    index: int
    """Where in the dataset it is."""
    length: int
    positions: int
    """N, its label positions."""
    queries: int
    """M, its queries."""


def row_key(input_ids: Any, labels: Any, query_mask: Any = None) -> bytes:
    """16 bytes that name a row without padding: a hash over its tokens, its labels and what is said of its query."""
    ids = numpy.asarray(input_ids, dtype=numpy.int64)
    key = hashlib.blake2b(struct.pack("<q", len(ids)), digest_size=16)
    key.update(ids.tobytes())
    key.update(numpy.asarray(labels, dtype=numpy.int64).tobytes())
    if query_mask is not None:
        key.update(numpy.asarray(query_mask, dtype=bool).tobytes())
    return key.digest()


def plan_rows(dataset: Rows, has_queries: bool = True) -> list[Row]:
    """The different rows of a dataset, shortest first, in an order that depends on the rows alone; `has_queries`: see
    `FrozenSource`."""
    found: dict[bytes, Row] = {}
    for index, row in enumerate(track(dataset, "Reading rows")):
        query_mask = row.get("query_mask")
        key = row_key(row["input_ids"], row["labels"], query_mask)
        if key not in found:
            positions, queries = sizes(row["labels"], query_mask)
            found[key] = Row(key, index, len(row["labels"]), positions, queries if has_queries else 0)
    return sorted(found.values(), key=lambda row: (row.length, row.key))


def sizes(labels: Any, query_mask: Any = None) -> tuple[int, int]:
    """A row's numbers of label positions and of queries: what `find_places` finds, at a fraction of its cost."""
    labelled = numpy.asarray(labels) != IGNORED
    positions = numpy.flatnonzero(labelled[1:])
    if query_mask is not None:
        return len(positions), len(numpy.unique(numpy.cumsum(numpy.asarray(query_mask, dtype=bool))[positions]))
    runs = int(numpy.count_nonzero(labelled[1:] & ~labelled[:-1]))
    leading = len(labelled) if labelled.all() else int(numpy.argmin(labelled))  # nothing is before it
    return len(positions), runs + max(leading - 1, 0)


def row_bytes(row: Row, width: int, itemsize: int) -> int:
    """What a row takes of the disk: states in the base's dtype, queries in fp32."""
    return width * (row.positions * itemsize + row.queries * 4)


def plan_shards(rows: Sequence[Row], width: int, itemsize: int, limit: int) -> Iterator[list[Row]]:
    """The rows in order, as many in each shard as fit in `limit` bytes, at least one."""
    shard: list[Row] = []
    size = 0
    for row in rows:
        if shard and size + row_bytes(row, width, itemsize) > limit:
            yield shard
            shard, size = [], 0
        shard.append(row)
        size += row_bytes(row, width, itemsize)
    if shard:
        yield shard
