"""What keeps a bank fast while it grows: an index of its keys, those of its names, and few files. Knows nothing about
models.

All are done anew when the bank has grown by a share of itself, so that all of them together cost as much as a few over
the whole bank, however many changes made it.
"""

from typing import Any

INDEXED_FROM = 5_000
"""Memories from which on an index is kept: below, looking at every key takes milliseconds."""
_UNINDEXED = 0.05  # the share of the memories that the index may lack; every search looks at those one by one
_NAMED_FROM = 2_000
_UNNAMED = 0.01  # and that of those whose id and digest may be looked for file by file
_NAMES = ("id", "digest")
_SAMPLED = 64  # so many memories for each cell train it
_CELL = 1_600  # memories in a cell of the index
_CELLS = 512
_PROBED = 64  # cells that are looked into at least, and a third of more; a memory in them takes 16 nanoseconds
_REFINED = 32  # so many times as many memories as are asked for are compared by their whole keys
_FILES = 64  # files of one change each, from which on they are put together if a quarter of the bank is in them
_MANY_FILES = 1_024  # and whatever there is in them


def index_of(table: Any) -> Any:
    """The index of the keys, or None."""
    return next((index for index in table.list_indices() if "key" in index.columns), None)


def with_index(query: Any, index: Any) -> Any:
    """A vector query as the index answers it best: its codes are a bit for each number of a key, so nearly all of them
    are looked at, and the memories that seem nearest are compared by their keys."""
    if index is None:
        return query.bypass_vector_index()
    cells = _cells(index.num_indexed_rows or 0)
    # with a condition more cells are looked into until enough memories are found
    return query.minimum_nprobes(min(cells, max(_PROBED, cells // 3))).maximum_nprobes(0).refine_factor(_REFINED)


def tidy(table: Any) -> None:
    """Put files together and make the index anew, where it is time."""
    count = table.count_rows()
    files = table.stats()["fragment_stats"]
    scattered = count - files["lengths"]["max"] if files["num_fragments"] else 0
    if files["num_fragments"] > (_FILES if scattered >= count / 4 else _MANY_FILES):
        table.optimize()  # what is older than a week is deleted from disk, too
    index = index_of(table)
    lacking = count if index is None else index.num_unindexed_rows or 0
    if lacking >= (INDEXED_FROM if index is None else max(INDEXED_FROM / 2, _UNINDEXED * count)):
        make_index(table, count)
    named = [index.num_unindexed_rows or 0 for index in table.list_indices() if index.columns[0] in _NAMES]
    lacking = max(named) if len(named) == len(_NAMES) else count
    if lacking >= max(_NAMED_FROM, _UNNAMED * count):
        index_names(table)


def index_names(table: Any) -> None:
    """Index the columns that every change asks for, so that it takes as long however many files there are."""
    from lancedb.index import BTree

    for column in _NAMES:
        table.create_index(column, config=BTree())


def make_index(table: Any, count: int) -> None:
    """Train an index on the keys that there are."""
    from lancedb.index import IvfRq

    cells = _cells(count)
    settings = IvfRq(distance_type="cosine", num_partitions=cells, max_iterations=10, sample_rate=_SAMPLED)
    table.create_index("key", config=settings)


def _cells(count: int) -> int:
    return min(max(count // _CELL, 1), _CELLS)
