"""What the gate reads of the query, and what has to be remembered between two calls of a generation.

Knows nothing about gates or adapters: it averages features over positions, and keeps two caches in step.

The query memory at position t is the mean over the query's tokens at positions ≤ t, padding excluded. At and after the
end of the query this is the paper's fixed q; before it, it is a running mean, so that no position sees a later one.
"""

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache


@dataclass
class QueryState:
    """The query features of everything seen so far, and which of it is query; rides along with a cache.

    They are r numbers a token, against thousands in the key-value cache. Keeping all of them makes cropping exact, and
    lets a later call say something else about earlier columns (an answer that ended early is padding from then on).
    """

    features: Tensor  # [B, columns, k]
    attended: Tensor  # bool [B, columns]: no padding
    asked: Tensor  # bool [B, columns]: part of what the caller calls the query
    masked: bool = False  # somebody said which tokens are the query: tokens of which nothing is said are not

    @property
    def columns(self) -> int:
        """How many columns have been seen, padding included."""
        return self.features.shape[1]

    def select(self, rows: Tensor) -> None:
        """Keep the given rows, in the given order (beam search, batch selection)."""
        rows = rows.to(self.features.device)
        self.features, self.attended, self.asked = self.features[rows], self.attended[rows], self.asked[rows]

    def crop(self, columns: int) -> None:
        """Forget the last `columns` columns."""
        keep = self.columns - columns
        self.features, self.attended = self.features[:, :keep], self.attended[:, :keep]
        self.asked = self.asked[:, :keep]


def ends_of_labels(labels: Tensor, attended: Tensor, anything_before: Tensor | None = None) -> Tensor:
    """Where the query of each position ends (exclusive column, [B, T]), when `labels` says what is being answered.

    Inside a run of labels (an answer) the query is everything before the run; elsewhere, everything up to the position.
    For one answer behind one prompt this is "the tokens before the first label". An answer with nothing before it
    (`anything_before`, bool [B]: not even in a cache) has no query of its own; its positions average up to themselves.
    """
    columns = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    labelled = labels != -100
    starts_run = labelled & ~torch.nn.functional.pad(labelled, (1, 0))[:, :-1]
    run_start = torch.where(starts_run, columns, 0).cummax(dim=1).values
    attended_before = attended.long().cumsum(1) - attended.long()  # tokens strictly before each column
    has_query = attended_before.gather(1, run_start) > 0
    if anything_before is not None:
        has_query = has_query | anything_before.unsqueeze(1)
    return torch.where(labelled & has_query, run_start, columns + 1)


def extend(
    features: Tensor, attended: Tensor | None = None, asked: Tensor | None = None, state: QueryState | None = None
) -> QueryState:
    """What is known after one more chunk. `features`: [B, T, k].

    `attended` and `asked` speak of the chunk, bool [B, T], or of everything so far, bool [B, columns + T]; None says
    nothing: the chunk is attended, and it is query unless somebody said before which tokens are.
    """
    if state is None:
        nothing = torch.zeros(features.shape[0], 0, dtype=torch.bool, device=features.device)
        state = QueryState(features[:, :0], nothing, nothing)
    masked = state.masked or asked is not None
    length = features.shape[1]
    return QueryState(
        torch.cat((state.features, features), dim=1),
        _joined(state.attended, attended, length, default=True),
        _joined(state.asked, asked, length, default=not masked),
        masked,
    )


def _joined(before: Tensor, said: Tensor | None, length: int, default: bool) -> Tensor:
    if said is None:
        said = before.new_full((before.shape[0], length), default)
    return said if said.shape[1] == before.shape[1] + length else torch.cat((before, said), dim=1)


def query_mean(state: QueryState, ends: Tensor) -> Tensor:
    """Mean of the query features before each position's end: ends [B, T] (exclusive columns) -> [B, T, k].

    Zero where a query is empty (left padding).
    """
    included = state.attended & state.asked
    # where, not a product: the states of padded positions may be NaN
    kept = torch.where(included.unsqueeze(-1), state.features, 0.0)
    sums = torch.nn.functional.pad(kept.cumsum(1), (0, 0, 1, 0))  # column c: the sum over the columns before c
    counts = torch.nn.functional.pad(included.cumsum(1), (1, 0))
    total = sums.gather(1, ends.unsqueeze(-1).expand(-1, -1, sums.shape[-1]))
    return total / counts.gather(1, ends).unsqueeze(-1).clamp(min=1)


class TwinCache(Cache):
    """A cache of the enhanced memory that carries the original memory's cache and the query with it.

    Any Cache object becomes one in place (see `pair`), so that whoever made it keeps handing it on without knowing.
    Every operation on its rows or columns is applied to both memories.
    """

    original: Cache
    query: QueryState | None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Beam search: row i continues from row beam_idx[i]."""
        super().reorder_cache(beam_idx)
        self.original.reorder_cache(beam_idx)
        if self.query is not None:
            self.query.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self.original.batch_repeat_interleave(repeats)
        if self.query is not None:
            self.query.select(torch.arange(self.query.features.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the given rows."""
        super().batch_select_indices(indices)
        self.original.batch_select_indices(indices)
        if self.query is not None:
            self.query.select(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens (transformers counts them negatively)."""
        before = self.get_seq_length()
        super().crop(tokens_to_remove)
        self.original.crop(tokens_to_remove)
        if self.query is not None:
            self.query.crop(before - self.get_seq_length())

    def reset(self) -> None:
        """Forget everything; the memory stays allocated."""
        super().reset()
        self.original.reset()
        self.query = None


def pair(cache: Cache, original: Cache) -> TwinCache:
    """Turn `cache` (the enhanced memory's) into a TwinCache that carries `original`. The same object is returned."""
    kind = type(cache)
    # A subclass made on the spot keeps every isinstance check and every method of the cache's own class.
    cache.__class__ = type(f"Twin{kind.__name__}", (TwinCache, kind), {})
    twin = cast(TwinCache, cache)
    twin.original, twin.query = original, None
    return twin


def pair_with_empty_copy(cache: Cache) -> TwinCache:
    """Pair an empty cache with a copy of itself."""
    shared = {id(value): value for value in vars(cache).values() if isinstance(value, torch.Stream)}  # not copyable
    return pair(cache, copy.deepcopy(cache, shared))


def is_empty(cache: Any) -> bool:
    """Whether nothing has been written into the cache yet."""
    return int(cache.get_seq_length()) == 0
