"""One model run as twins: the frozen pass beside the tuned one, at the decoder's boundary.

Knows nothing about PEFT's classes of models, saving or the gate's equations. The head, the loss and `generate` never
learn that there are two memories: they see one last hidden state.

This is the sequential form: the tuned pass as the model runs it, then the frozen pass over the same inputs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import Cache

from ..errors import UsageError
from .gate import MemoryGate
from .labels import FrozenStates, LabelPlaces
from .memory import TwinCache, ends_of_labels, extend, is_empty, pair, pair_with_empty_copy, query_mean


@dataclass
class Call:
    """What one call of `forward` or `generate` says about its tokens, and what the weave reports back.

    Masks are [B, columns]; `prompt_columns` is set by `generate` only: the query ends at that column.
    """

    attention_mask: Tensor | None = None
    query_mask: Tensor | None = None
    labels: Tensor | None = None
    prompt_columns: int | None = None
    keep_gate: bool = False
    gate: Tensor | None = None  # [B, T, d], filled in when keep_gate is set
    places: LabelPlaces | None = None  # set: states, gate and logits are wanted at these places only
    frozen: FrozenStates | None = None  # the original memory there, given by the caller or filled in
    only_frozen: bool = False  # fill in `frozen`, and nothing else is of interest

    def columns_of(self, mask: Tensor | None, rows: int, first: int, length: int, beyond: bool) -> Tensor | None:
        """What a mask says of a chunk of `length` columns at column `first`, as bool.

        [rows, first + length], or [rows, length] where it speaks of the chunk only. `beyond`: what holds for the
        columns behind the prompt, of which a mask given to `generate` says nothing.
        """
        if mask is None:
            return None
        columns, mask = first + length, mask.bool()
        if self.prompt_columns is not None:
            mask = nn.functional.pad(mask, (0, max(columns - mask.shape[1], 0)), value=beyond)
        elif mask.shape[1] < columns and mask.shape[1] != length:
            raise UsageError(
                f"A mask has {mask.shape[1]} columns, but {length} tokens are passed now and {columns} were so far. "
                "Give it either length."
            )
        # every row of the caller's batch may have become several: beams, num_return_sequences
        return mask[:, :columns].repeat_interleave(rows // mask.shape[0], dim=0)


def adapter_layers(model: nn.Module) -> list[nn.Module]:
    """Every layer of `model` that PEFT can switch off."""
    return [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


@contextmanager
def adapters_off(layers: list[nn.Module], off: bool = True) -> Iterator[None]:
    """Run the block on the frozen weights, or, with off=False, on the adapted ones.

    Flips the layers' own flag instead of PEFT's enable/disable, which also resets `requires_grad` of every adapter.
    """
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = off  # type: ignore[assignment]
        yield
    finally:
        for layer, was_disabled in zip(layers, before, strict=True):
            layer._disable_adapters = was_disabled


@contextmanager
def dropout_off(module: nn.Module) -> Iterator[None]:
    """Run the block in evaluation mode: the original memory is a constant, also while training."""
    training = [m for m in module.modules() if m.training] if module.training else []
    try:
        for m in training:
            m.training = False
        yield
    finally:
        for m in training:
            m.training = True


def prepare_cache(kwargs: dict[str, Any]) -> None:
    """Before the tuned pass: give a fresh cache its twin; refuse one that only one memory has written to."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, Cache) or isinstance(cache, TwinCache):
        return
    if not is_empty(cache):
        raise UsageError(
            f"The cache passed as past_key_values already holds {cache.get_seq_length()} tokens of one memory only. "
            "Pass an empty cache, or one returned by this model with both memories in use."
        )
    pair_with_empty_copy(cache)


def frozen_pass(
    decoder: nn.Module, run: Callable[..., Any], layers: list[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The original memory of the given inputs: the decoder's output on the frozen weights, as a constant."""
    with torch.no_grad(), adapters_off(layers), dropout_off(decoder):
        return run(*args, **kwargs)


def weave(
    decoder: nn.Module,
    run: Callable[..., Any],
    gate: MemoryGate,
    layers: list[nn.Module],
    call: Call,
    retention: float,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> Any:
    """After the tuned pass: run the frozen one on the same inputs and put the fused state into `output`.

    `run` is the decoder's forward without hooks. `output` (a ModelOutput or tuple whose first entry is the last hidden
    state [B, T, d]) is the tuned pass's; its cache becomes, or stays, a TwinCache.
    """
    cache = kwargs.get("past_key_values")
    twin = cache if isinstance(cache, TwinCache) else None
    frozen_kwargs = dict(kwargs, past_key_values=twin.original) if twin is not None else kwargs
    frozen = frozen_pass(decoder, run, layers, args, frozen_kwargs)
    if twin is None:
        twin = _pair_outputs(output, frozen)
    enhanced, original = output[0], frozen[0]
    query = _query_projection(gate, original, enhanced, call, twin, kwargs)
    fused, share = gate(original, enhanced, query, retention)
    if call.keep_gate:
        call.gate = share
    return _with_last_hidden_state(output, fused)


def _query_projection(
    gate: MemoryGate,
    original: Tensor,
    enhanced: Tensor,
    call: Call,
    twin: TwinCache | None,
    kwargs: dict[str, Any],
) -> Tensor | None:
    """Each position's projected query memory, [B, T, r]; what it was made of goes into the cache."""
    if not gate.reads_query:
        return None
    rows, length = enhanced.shape[:2]
    state = twin.query if twin is not None else None
    first = state.columns if state is not None else 0

    mask = call.attention_mask
    if mask is None and isinstance(kwargs.get("attention_mask"), Tensor) and kwargs["attention_mask"].ndim == 2:
        mask = kwargs["attention_mask"]  # a trainer that calls the decoder itself
    attended = call.columns_of(mask, rows, first, length, beyond=True)
    asked = call.columns_of(call.query_mask, rows, first, length, beyond=False)
    state = extend(gate.project_query(original, enhanced), attended, asked, state)
    if twin is not None:
        twin.query = state

    ends = torch.arange(first + 1, first + length + 1, device=enhanced.device).expand(rows, -1)
    if call.prompt_columns is not None:
        ends = ends.clamp(max=call.prompt_columns)
    elif call.labels is not None and asked is None:
        before, now = state.attended[:, :first], state.attended[:, first:]
        ends = ends_of_labels(call.labels, now, before.any(1)) + first
    return query_mean(state, ends)


def _pair_outputs(output: Any, frozen: Any) -> TwinCache | None:
    """Join the caches that the two passes made for themselves (a call with use_cache and no cache)."""
    cache, original = getattr(output, "past_key_values", None), getattr(frozen, "past_key_values", None)
    if isinstance(cache, Cache) and isinstance(original, Cache):
        return pair(cache, original)
    return None


def _with_last_hidden_state(output: Any, state: Tensor) -> Any:
    if isinstance(output, tuple):
        return (state, *output[1:])
    output.last_hidden_state = state
    if getattr(output, "hidden_states", None) is not None:
        output.hidden_states = (*output.hidden_states[:-1], state)
    return output
