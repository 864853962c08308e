"""One cache object for two memories, whoever made it.

Knows nothing about gates or adapters. A cache becomes a TwinCache in place, by a subclass made on the spot, so that
`generate` or a user keeps handing on the same object, and every isinstance check and method of its class stays.
"""

import contextlib
import copy
import functools
import inspect
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from .memory import QueryState


class TwinCache(Cache):
    """A key-value cache of both memories, with what has been seen of the query.

    Every operation on its rows or columns is applied to both memories and to the query.
    """

    query: QueryState | None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Beam search: row i continues from row beam_idx[i]."""
        super().reorder_cache(beam_idx)
        if self.query is not None:
            self.query.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        if self.query is not None:
            self.query.select(torch.arange(self.query.rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the given rows."""
        super().batch_select_indices(indices)
        if self.query is not None:
            self.query.select(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens (transformers counts them negatively)."""
        before = length_of(self)
        super().crop(tokens_to_remove)
        if self.query is not None:
            self.query.crop(before - length_of(self))

    def reset(self) -> None:
        """Forget everything; the memory stays allocated."""
        super().reset()
        self.query = None


class PairedCache(TwinCache):
    """Two passes: the cache of the enhanced memory, which carries the original memory's with it."""

    original: Cache

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """See TwinCache."""
        super().reorder_cache(beam_idx)
        self.original.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """See TwinCache."""
        super().batch_repeat_interleave(repeats)
        self.original.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """See TwinCache."""
        super().batch_select_indices(indices)
        self.original.batch_select_indices(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """See TwinCache."""
        super().crop(tokens_to_remove)
        self.original.crop(tokens_to_remove)

    def reset(self) -> None:
        """See TwinCache."""
        super().reset()
        self.original.reset()


class StackedCache(TwinCache):
    """One pass: layers of the shared trunk hold B rows, the others 2·B rows, [frozen; tuned]."""

    trunk: int
    rows: int

    @property
    def batch_size(self) -> int:
        """The rows of whoever uses the cache, B."""
        return self.rows

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """See TwinCache."""
        for layer, rows in self._rows_by_layer(beam_idx):
            with _positions_of_the_caller(layer, beam_idx):
                layer.reorder_cache(rows)
        self._keep(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """See TwinCache."""
        super().batch_repeat_interleave(repeats)
        self.rows *= repeats

    def batch_select_indices(self, indices: Tensor) -> None:
        """See TwinCache."""
        indices = indices.nonzero().squeeze(1) if indices.dtype == torch.bool else indices
        for layer, rows in self._rows_by_layer(indices):
            with _positions_of_the_caller(layer, indices):
                layer.batch_select_indices(rows)
        self._keep(indices)

    def _rows_by_layer(self, rows: Tensor) -> list[tuple[Any, Tensor]]:
        both = torch.cat((rows, rows + self.rows))
        return [(layer, rows if i < self.trunk else both) for i, layer in enumerate(layers_of(self))]

    def _keep(self, rows: Tensor) -> None:
        self.rows = len(rows)
        if self.query is not None:
            self.query.select(rows)


@contextlib.contextmanager
def _positions_of_the_caller(layer: Any, rows: Tensor) -> Iterator[None]:
    """Positions [3, B, T] that a model keeps with the cache itself, outside its blocks, have the caller's rows B."""
    positions = getattr(layer, "indexer_position_ids", None)
    if positions is None:
        yield
        return
    layer.indexer_position_ids = None
    yield
    layer.indexer_position_ids = positions.index_select(1, rows.to(positions.device))


def pair(cache: Cache, original: Cache) -> PairedCache:
    """Turn `cache` (the enhanced memory's) into a PairedCache that carries `original`. The same object is returned."""
    twin = cast(PairedCache, become(cache, PairedCache))
    twin.original, twin.query = original, None
    return twin


def pair_with_empty_copy(cache: Cache) -> PairedCache:
    """Pair an empty cache with a copy of itself."""
    shared = {id(value): value for value in vars(cache).values() if isinstance(value, torch.Stream)}  # not copyable
    return pair(cache, copy.deepcopy(cache, shared))


def stack(cache: Cache, trunk: int, rows: int) -> StackedCache:
    """Turn `cache`, in which both memories of `rows` rows are or will be, into a StackedCache. The same object."""
    twin = cast(StackedCache, become(cache, StackedCache))
    twin.trunk, twin.rows, twin.query = trunk, rows, None
    return twin


def fork(layer: Any) -> Any:
    """A copy of a cache layer with which another memory goes on by itself.

    Keys and values are shared: attention replaces them. What a layer keeps by number or name is not: linear attention
    and convolutions write their states in place.
    """
    own = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            states = {key: state.clone() if isinstance(state, Tensor) else state for key, state in value.items()}
            setattr(own, name, states)
    return own


def is_empty(cache: Any) -> bool:
    """Whether nothing has been written into the cache yet."""
    return length_of(cache) == 0


def length_of(cache: Any) -> int:
    """How many columns have been written into the cache."""
    if any(isinstance(layer, CacheLayerMixin) for layer in layers_of(cache)):
        return int(cache.get_seq_length())
    query = getattr(cache, "query", None)  # layers of linear attention keep a state and do not count
    if query is not None:
        return cast(int, query.columns)
    return int(any(_has_state(layer) for layer in layers_of(cache)))


def _has_state(layer: Any) -> bool:
    return any(getattr(layer, "has_previous_state", {}).values())


def cache_name(decoder: nn.Module) -> str:
    """What the decoder calls the cache it is given and gives back."""
    known = inspect.signature(decoder.forward).parameters
    return next((name for name in ("past_key_values", "cache_params", "cache") if name in known), "past_key_values")


def is_allocated(cache: Cache) -> bool:
    """Whether the cache has memory for a number of rows already."""
    # by its tensors: a layer that stands for a block without attention calls itself initialized
    return any(getattr(layer, "keys", None) is not None for layer in layers_of(cache))


def layers_of(cache: Any) -> list[Any]:
    """The layers in which a cache keeps what the decoder has seen of its own tokens."""
    found = getattr(cache, "layers", None)
    return cast(list[Any], cache.self_attention_cache.layers) if found is None else cast(list[Any], found)


def become(cache: Cache, form: type[TwinCache]) -> TwinCache:
    """Give `cache` the operations of `form`. The same object is returned."""
    cache.__class__ = _class_of(form, type(cache))  # type: ignore[arg-type]
    return cast(TwinCache, cache)


@functools.cache  # torch.compile compiles anew for every class it meets
def _class_of(form: type[TwinCache], kind: type[Cache]) -> type[TwinCache]:
    return type(f"{form.__name__.removesuffix('Cache')}{kind.__name__}", (form, kind), {})
