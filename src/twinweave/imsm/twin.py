"""One decoder run as twins: both memories of the same tokens, with one set of weights.

Knows nothing about the gate or the query: it hands over two last hidden states. There are two forms, with the same
results (`docs/performance.md` has the measurements):

- two passes: the tuned pass as the model runs it, then the frozen one over the same inputs, without the adapter. For
  training and scoring. Below the first adapted block (the shared trunk) the frozen pass has nothing to compute: the
  tuned one's states are the same.
- stacked (`stacked.py`): one pass over [frozen; tuned] rows, which reads the base's weights once. For generation.
"""

import functools
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Cache

from ..errors import UsageError
from .adapters import adapter_layers, adapters_off, dropout_off
from .cache import (
    PairedCache,
    StackedCache,
    TwinCache,
    cache_name,
    fork,
    is_allocated,
    is_empty,
    layers_of,
    length_of,
    pair,
    pair_with_empty_copy,
    stack,
)
from .own_cache import keeps_own_cache, refuse_own_cache
from .stacked import StackedPass, tuned_half
from .trial import same_memories

Plan = Literal["auto", "stacked", "two_pass"]


class Twin:
    """The two passes of one decoder.

    `plan` is how inference runs them. "auto" stacks whatever has a cache: decoding was faster stacked at every size
    measured, from 1 to 64 rows; prompts of up to 2,000 tokens a batch took 0.6 to 1.02 of the time of two passes, 16
    prompts of 512 tokens 1.1. Without a cache it takes two passes, which hold half the activations at a time and give
    the base's own bits where the adapter has learned nothing. Calls with gradients or in training mode take two passes
    whatever the plan; a cache is continued in the form it was begun in.
    """

    def __init__(self, decoder: nn.Module, plan: Plan = "auto") -> None:
        self.plan: Plan = plan
        self.decoder = decoder
        self.layers = adapter_layers(decoder)
        self.cache_name = cache_name(decoder)
        self._arguments = list(inspect.signature(decoder.forward).parameters)
        blocks = _blocks_of(decoder)
        self._trunk = _first_adapted(blocks, self.layers)  # so many blocks are shared by both memories
        self._blocks = blocks
        self._stacked: StackedPass | None = None
        self._stackable: bool | None = None  # None: not tried yet
        self._replayable: bool | None = None
        self._trunk_output: Any = None
        self._capturing = False
        if self._trunk:
            self._hook = blocks[self._trunk - 1].register_forward_hook(self._capture)

    def remove(self) -> None:
        """Take everything off the model."""
        if self._stacked is not None:
            self._stacked.remove()
        if self._trunk:
            self._hook.remove()

    @functools.cached_property
    def without_cache(self) -> bool:
        """Whether a woven run can have no cache, as the decoder's is of its own kind."""
        return keeps_own_cache(self.decoder)

    # --- around the decoder's own run -----------------------------------------------------------------------------

    def idle(self) -> None:
        """Before every run of the decoder: nothing is left of the one before, however it ended."""
        self._capturing = False
        self._trunk_output = None
        if self._stacked is not None:
            self._stacked.begin(0, 0)

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a run, all but the first by their names: some models hand on the cache by position."""
        return args[:1], dict(zip(self._arguments[1:], args[1:], strict=False)) | kwargs

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a woven run, after `idle`: choose its form, and give a fresh cache room for both memories.

        Raises UsageError for a cache that only one memory has written to, or that has room for one only.
        """
        refuse_own_cache(self.decoder, kwargs)
        cache = kwargs.get(self.cache_name)
        inputs = _inputs(args, kwargs)
        if isinstance(cache, Cache) and not isinstance(cache, TwinCache) and not is_empty(cache):
            raise UsageError(
                f"The cache passed as {self.cache_name} already holds {length_of(cache)} tokens of one memory "
                "only. Pass an empty cache, or one returned by this model with both memories in use."
            )
        if self._takes_one_pass(inputs, cache, kwargs):
            assert inputs is not None
            if isinstance(cache, Cache) and not isinstance(cache, TwinCache):
                stack(cache, self._trunk, inputs.shape[0])
            self._stack().begin(inputs.shape[0], inputs.shape[1])
        elif isinstance(cache, Cache):
            if not isinstance(cache, TwinCache):
                pair_with_empty_copy(cache)
        else:
            self.share_trunk()

    def share_trunk(self) -> bool:
        """Before a tuned run without a cache: whether the frozen pass after it will leave the shared trunk out."""
        self._capturing = self._trunk > 0 and not self._drops_below_the_fork() and self._can_replay()
        return self._capturing

    def memories(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> tuple[Tensor, Tensor, TwinCache | None]:
        """After a woven run: the last hidden states of the original and the enhanced memory, [B, T, d], and the cache.

        `output` is the run's (a ModelOutput or tuple whose first entry is the last hidden state). It is left holding
        the enhanced memory's part of everything.
        """
        if self._stacked is not None and self._stacked.rows:
            return self._unstack(self._stacked.rows, kwargs, output)
        cache = kwargs.get(self.cache_name)
        cache = cache if isinstance(cache, PairedCache) else None
        shared = self._trunk if self._trunk_output is not None else 0
        frozen = self.frozen_pass(args, kwargs | {self.cache_name: cache.original} if cache is not None else kwargs)
        if cache is not None:
            return frozen[0], output[0], cache
        return frozen[0], output[0], _pair_outputs(output, frozen, shared, self.cache_name)

    def frozen_pass(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The decoder's output on the frozen weights, as a constant: no gradient, no dropout.

        Within a woven run without a cache, blocks of the shared trunk give back what they gave in the tuned pass.
        """
        trunk = self._blocks[: self._trunk] if self._trunk_output is not None else []
        replaying = _replaying(trunk, self._trunk_output)
        self._capturing, self._trunk_output = False, None
        with torch.no_grad(), adapters_off(self.layers), dropout_off(self.decoder), replaying:
            return self.decoder.forward(*args, **kwargs)

    # --- the choice -----------------------------------------------------------------------------------------------

    def _takes_one_pass(self, inputs: Tensor | None, cache: Any, kwargs: dict[str, Any]) -> bool:
        if isinstance(cache, TwinCache):
            return isinstance(cache, StackedCache)
        if self.plan == "two_pass" or inputs is None or torch.is_grad_enabled() or self.decoder.training:
            return False
        if cache is None and not kwargs.get("use_cache"):
            return self.plan == "stacked" and self._can_stack()
        if cache is not None and (not isinstance(cache, Cache) or is_allocated(cache)):
            return False
        return self._can_stack()

    def _can_stack(self) -> bool:
        """Whether one pass gives what two passes give on this model; tried once, on a few tokens."""
        if self._stackable is None:
            self._stackable = False  # while it is tried
            if self._trunk < len(self._blocks):
                self._stackable = same_memories(self.decoder, self.layers, self._stacked_states)
                self.idle()
            if not self._stackable:
                if self._stacked is not None:
                    self._stacked.remove()
                    self._stacked = None
                if self.plan == "stacked":
                    warnings.warn(
                        f"{type(self.decoder).__name__} with this adapter cannot be run as one stacked pass; it takes "
                        "two passes, with the same results.",
                        stacklevel=2,
                    )
        return self._stackable

    def _can_replay(self) -> bool:
        """Whether the frozen pass may leave the shared trunk out on this model; tried once, on a few tokens."""
        if self._replayable is None:
            self._replayable = False
            own: list[TwinCache | None] = []
            run = functools.partial(self._replayed_states, own)
            self._replayable = same_memories(self.decoder, self.layers, run)
            self.idle()
        return self._replayable

    def _drops_below_the_fork(self) -> bool:
        """Whether the tuned pass, in training mode, drops states of the trunk: the frozen pass never does."""
        settings = self.decoder.config.to_dict()  # type: ignore[union-attr, operator]
        return self.decoder.training and any(
            "drop" in name and isinstance(value, float) and value > 0 for name, value in settings.items()
        )

    def _stacked_states(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        self._stack().begin(*inputs["input_ids"].shape)
        original, enhanced = self.decoder.forward(**inputs)[0].chunk(2)
        self.idle()
        return original, enhanced

    def _replayed_states(self, caches: list[TwinCache | None], inputs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        """A prompt, or a token behind it. The cache that the prompt's passes made for themselves is put in `caches`."""
        if not caches:
            inputs = inputs | {self.cache_name: None}
            self._capturing = True
            output = self.decoder.forward(**inputs)
            frozen = self.frozen_pass((), inputs)
            caches.append(_pair_outputs(output, frozen, self._trunk, self.cache_name))
            return frozen[0], output[0]
        if not isinstance(caches[0], PairedCache):
            return None
        enhanced = self.decoder.forward(**inputs | {self.cache_name: caches[0]})[0]
        return self.frozen_pass((), inputs | {self.cache_name: caches[0].original})[0], enhanced

    # --- the passes -----------------------------------------------------------------------------------------------

    def _stack(self) -> StackedPass:
        if self._stacked is None:
            self._stacked = StackedPass(self._blocks, self._trunk, self.layers)
        return self._stacked

    def _unstack(self, rows: int, kwargs: dict[str, Any], output: Any) -> tuple[Tensor, Tensor, TwinCache | None]:
        self.idle()
        cache = kwargs.get(self.cache_name)
        if cache is None:
            cache = getattr(output, self.cache_name, None)  # the decoder made it for itself
        if isinstance(cache, Cache) and not isinstance(cache, TwinCache):
            stack(cache, self._trunk, rows)
        original, enhanced = output[0][:rows], output[0][rows:]
        for name in ("hidden_states", "attentions"):
            if getattr(output, name, None) is not None:
                setattr(output, name, tuned_half(getattr(output, name), rows))
        return original, enhanced, cache if isinstance(cache, TwinCache) else None

    def _capture(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._capturing:
            self._trunk_output = output


@contextmanager
def _replaying(blocks: Any, output: Any) -> Iterator[None]:
    """Within the block, each of `blocks` gives `output` back instead of computing anything."""
    own = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            block.__dict__["forward"] = lambda *args, **kwargs: output
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.__dict__["forward"]
            else:
                block.__dict__["forward"] = forward


def _blocks_of(decoder: Any) -> Any:
    """The decoder's list of blocks; an empty list where it cannot be told which one that is."""
    number = getattr(decoder.config, "num_hidden_layers", None)
    lists = (m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == number)
    return next(lists, nn.ModuleList())


def _first_adapted(blocks: Any, layers: list[nn.Module]) -> int:
    """How many blocks run before the first adapted layer."""
    inside = {layer: i for i, block in reversed(list(enumerate(blocks))) for layer in adapter_layers(block)}
    if not layers or any(layer not in inside for layer in layers):
        return 0  # an adapted embedding, say, changes what the first block gets
    return min(inside.values())


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """What is run: token ids [B, T] or embeddings [B, T, d]."""
    found = next((kwargs[n] for n in ("input_ids", "inputs_embeds") if kwargs.get(n) is not None), None)
    found = args[0] if found is None and args else found
    return found if isinstance(found, Tensor) else None


def _pair_outputs(output: Any, frozen: Any, shared: int, name: str) -> TwinCache | None:
    """Join the caches that the two passes made for themselves (a call that gave none).

    `shared`: of so many layers the frozen pass computed nothing, as they are the same.
    """
    cache, original = getattr(output, name, None), getattr(frozen, name, None)
    if not isinstance(cache, Cache) or not isinstance(original, Cache):
        return None
    layers_of(original)[:shared] = [fork(layer) for layer in layers_of(cache)[:shared]]
    return pair(cache, original)
