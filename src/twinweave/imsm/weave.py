"""Two memories of the same tokens -> one last hidden state.

Knows nothing about how the memories were computed. The head, the loss and `generate` never learn that there are two.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .cache import TwinCache
from .gate import MemoryGate
from .guard import DomainGuard
from .labels import FrozenStates, LabelPlaces
from .memory import ends_of_labels, extend, query_mean


@dataclass
class Call:
    """What one call of `forward` or `generate` says about its tokens, and what the weave reports back.

    Masks are [B, columns]; `prompt_columns` is set by `generate` only: the query ends at that column.
    """

    attention_mask: Tensor | None = None
    query_mask: Tensor | None = None
    labels: Tensor | None = None
    prompt_columns: int | None = None
    task_ids: Tensor | None = None  # [B], which of several prompts is to be read
    keep_gate: bool = False
    gate: Tensor | None = None  # [B, T, d], filled in when keep_gate is set
    places: LabelPlaces | None = None  # set: states, gate and logits are wanted at these places only
    frozen: FrozenStates | None = None  # the original memory there, given by the caller or filled in
    only_frozen: bool = False  # fill in `frozen`, and nothing else is of interest
    rehearse: str | None = None  # hand on the original memory beside the fused one ("both": the enhanced one too)
    without_graph: bool = False  # of the decoder's passes, so that only the gate learns
    judged: tuple[Tensor, Tensor] | None = None  # the last query means, and how strange the guard found them

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


def weave(
    gate: MemoryGate,
    original: Tensor,
    enhanced: Tensor,
    cache: TwinCache | None,
    call: Call,
    retention: float,
    kwargs: dict[str, Any],
    guard: DomainGuard | None = None,
) -> Tensor:
    """The fused state of both memories: [B, T, d] each -> [B, T, d].

    `kwargs` are the decoder's. What the query is made of, for the gate and for the guard, is added to `cache`.
    """
    parts = [gate.project_query(original, enhanced)] if gate.reads_query else []
    if guard is not None and guard.reads_query:
        parts.append(guard.project(original))
    query = strangeness = None
    if parts:
        mean = _query_projection(torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0], call, cache, kwargs)
        query = mean[..., : parts[0].shape[-1]] if gate.reads_query else None
        if guard is not None and guard.reads_query:
            strangeness = _strangeness_of_query(guard, mean, call)
    if guard is not None and not guard.reads_query:
        strangeness = guard.strangeness(guard.project(original))
    fused, share = gate(original, enhanced, query, retention, strangeness)
    if call.keep_gate:
        call.gate = share
    return fused


@torch.compiler.disable  # compiled code does not know a tensor again
def _strangeness_of_query(guard: DomainGuard, mean: Tensor, call: Call) -> Tensor:
    """The guard's word on query means [B, T, …] whose last features are the guard's: [B, T, 1]. It judges a query that
    is over once: from then on its mean is the same tensor at every token."""
    if call.judged is None or call.judged[0] is not mean:
        call.judged = mean, guard.strangeness(mean[..., -guard.width :])
    return call.judged[1]


@torch.compiler.disable  # its sizes change with every token, and it is a few numbers
def _query_projection(features: Tensor, call: Call, cache: TwinCache | None, kwargs: dict[str, Any]) -> Tensor:
    """Each position's projected query memory, [B, T, r] (or [B, 1, r]), of features [B, T, r]."""
    rows, length = features.shape[:2]
    state = cache.query if cache is not None else None
    if state is not None and state.features.shape[-1] != features.shape[-1]:
        raise UsageError(
            "This cache was begun with another domain guard than the model has now, or with none. Start a new one."
        )
    first = state.columns if state is not None else 0
    if state is not None and call.prompt_columns is not None and first >= call.prompt_columns:
        settled = state.answer(features, by=call)
        if settled is not None:
            return settled

    mask = call.attention_mask
    if mask is None and isinstance(kwargs.get("attention_mask"), Tensor) and kwargs["attention_mask"].ndim == 2:
        mask = kwargs["attention_mask"]  # a trainer that calls the decoder itself
    attended = call.columns_of(mask, rows, first, length, beyond=True)
    asked = call.columns_of(call.query_mask, rows, first, length, beyond=False)
    state = extend(features, attended, asked, state)
    if cache is not None:
        cache.query = state

    ends = torch.arange(first + 1, first + length + 1, device=features.device).expand(rows, -1)
    if call.prompt_columns is not None:
        ends = ends.clamp(max=call.prompt_columns)
    elif call.labels is not None and asked is None:
        before, now = state.attended[:, :first], state.attended[:, first:]
        ends = ends_of_labels(call.labels, now, before.any(1)) + first
    mean = query_mean(state, ends)
    if call.prompt_columns is not None and state.columns >= call.prompt_columns:
        state.settle(mean[:, -1:], by=call)
    return mean
