"""The weave at label positions only: in training, no other state reaches the gate and the head.

Knows nothing about adapters, heads or losses. The places and their queries are found on the CPU from one transfer of
the masks, so that nothing behind them waits for the device.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, pad

from ..errors import UsageError
from .gate import MemoryGate
from .guard import DomainGuard
from .memory import ends_of_labels
from .output import with_entries

IGNORED = -100


@dataclass
class FrozenStates:
    """What a training step needs of the original memory of a batch with N label positions and M queries.

    Positions are in row-major order, and so are queries: one for each run of labels that has anything before it.
    """

    states: Tensor  # [N, d], last hidden states at the positions that predict labels
    queries: Tensor  # [M, d] in fp32, means over each query's tokens


@dataclass(frozen=True)
class LabelPlaces:
    """Where in a batch [B, T] labels are predicted, and from which query. Made by `find_places`."""

    shape: tuple[int, int]  # B, T
    flat: Tensor  # long [N], into the B·T positions whose states predict the labels
    query_of: Tensor  # long [N], into the M queries
    ends: Tensor  # long [B, K]: the column before which each of a row's queries ends; 0 where a row has fewer
    slots: Tensor  # long [M], into the B·K entries of `ends`
    included: Tensor  # bool [B, T]: tokens that may be part of a query
    targets: Tensor  # long [1, N + 1]: the labels, behind one that is ignored (in front of it if not shifted)

    @property
    def count(self) -> int:
        """N, the number of labels."""
        return len(self.flat)

    @property
    def queries(self) -> int:
        """M, the number of different queries."""
        return len(self.slots)

    def gather(self, states: Tensor) -> Tensor:
        """The states [B, T, d] at the label positions, [N, d]."""
        return states.flatten(0, 1).index_select(0, self.flat)

    def query_means(self, states: Tensor) -> Tensor:
        """The mean of the states [B, T, d] over each query's tokens: [M, d] in fp32 (fp64 stays). Zero if empty."""
        dtype = torch.float64 if states.dtype == torch.float64 else torch.float32
        columns = torch.arange(self.shape[1], device=states.device)
        with torch.autocast(states.device.type, enabled=False):
            weights = ((columns < self.ends.unsqueeze(-1)) & self.included.unsqueeze(1)).to(dtype)  # [B, K, T]
            # filled, not only weighted by zero: the states of padded positions may be NaN
            kept = states.to(dtype, copy=True).masked_fill_(~self.included.unsqueeze(-1), 0.0)
            means = torch.bmm(weights, kept) / weights.sum(-1, keepdim=True).clamp(min=1)  # [B, K, d]
            return means.flatten(0, 1).index_select(0, self.slots)


def find_places(
    labels: Tensor, attention_mask: Tensor | None = None, query_mask: Tensor | None = None, shifted: bool = True
) -> LabelPlaces:
    """Where logits are needed and what is asked there; everything [B, T]. `query_mask` wins over the labels.

    `shifted`: the state at t predicts label t + 1, as in most models, and not label t.
    Raises UsageError for masks of another shape.
    """
    for name, mask in (("attention_mask", attention_mask), ("query_mask", query_mask)):
        if mask is not None and mask.shape != labels.shape:
            raise UsageError(f"{name} is {list(mask.shape)} and labels are {list(labels.shape)}; give both [B, T].")
    everything = torch.ones_like(labels, dtype=torch.bool)
    masks = [everything if mask is None else mask.to(labels.device).bool() for mask in (attention_mask, query_mask)]
    labelled, attended, asked = torch.stack((labels != IGNORED, *masks)).cpu()
    included = attended & asked
    rows, columns = (labelled[:, 1:] if shifted else labelled).nonzero(as_tuple=True)
    if query_mask is None:
        ends = ends_of_labels(torch.where(labelled, 0, IGNORED), attended)[rows, columns]
    else:
        ends = columns + 1
    # a query is known by its row and by how many of the row's tokens are in it
    counts = pad(included.cumsum(1), (1, 0))[rows, ends]
    starts = torch.ones_like(rows, dtype=torch.bool)
    starts[1:] = (rows[1:] != rows[:-1]) | (counts[1:] != counts[:-1])
    query_rows, query_ends = rows[starts], ends[starts]
    per_row = query_rows.bincount(minlength=len(labels))
    most = max(int(per_row.max()), 1) if len(labels) else 1
    slots = query_rows * most + torch.arange(len(query_rows)) - (per_row.cumsum(0) - per_row)[query_rows]
    table = torch.zeros(len(labels) * most, dtype=torch.long)
    table[slots] = query_ends
    device = labels.device
    flat = (rows * labels.shape[1] + columns).to(device)
    behind = 1 if shifted else 0
    return LabelPlaces(
        shape=(labels.shape[0], labels.shape[1]),
        flat=flat,
        query_of=(starts.cumsum(0) - 1).to(device),
        ends=table.view(-1, most).to(device),
        slots=slots.to(device),
        included=included.to(device),
        targets=pad(labels.flatten().index_select(0, flat + behind), (behind, 1 - behind), value=IGNORED).unsqueeze(0),
    )


def read_frozen(states: Tensor, places: LabelPlaces) -> FrozenStates:
    """What is kept of the original memory [B, T, d] of a batch."""
    return FrozenStates(places.gather(states), places.query_means(states))


def check_frozen(frozen: FrozenStates, places: LabelPlaces, width: int) -> None:
    """Raise UsageError unless `frozen` has the shapes that the batch needs."""
    found = [list(frozen.states.shape), list(frozen.queries.shape)]
    needed = [[places.count, width], [places.queries, width]]
    if found != needed:
        raise UsageError(
            f"frozen holds states {found[0]} and queries {found[1]}; this batch needs {needed[0]} and {needed[1]}. "
            "Compute them with frozen_states from the same input_ids, attention_mask, labels and query_mask."
        )


def weave_at_labels(
    gate: MemoryGate,
    places: LabelPlaces,
    frozen: FrozenStates,
    enhanced: Tensor,
    retention: float,
    guard: DomainGuard | None = None,
) -> tuple[Tensor, Tensor]:
    """The fused states at the label positions, [1, N, d], and the gate there, [1, N, d], from the enhanced memory
    [B, T, d]."""
    query = None
    if gate.reads_query:
        projected = gate.project_query(frozen.queries, places.query_means(enhanced))  # [M, r]
        query = projected.index_select(0, places.query_of).unsqueeze(0)
    strangeness = None
    if guard is not None and guard.reads_query:
        of_queries = guard.strangeness(guard.project(frozen.queries))  # [M, 1]
        strangeness = of_queries.index_select(0, places.query_of).unsqueeze(0)
    elif guard is not None:
        strangeness = guard.strangeness(guard.project(frozen.states)).unsqueeze(0)
    return gate(frozen.states.unsqueeze(0), places.gather(enhanced).unsqueeze(0), query, retention, strangeness)


def hand_on(output: Any, states: Tensor) -> Any:
    """The decoder's `output` (ModelOutput or tuple) with `states` [B, N, d] and one row of zeros as its last hidden
    state: models shift their labels by one, so N states need a place behind them."""
    padded = pad(states, (0, 0, 0, 1))
    if isinstance(output, tuple):
        return (padded, *output[1:])
    output.last_hidden_state = padded
    return output


def trim(output: Any, count: int) -> Any:
    """The model's `output` (ModelOutput or tuple) with logits for the N labels alone, [B, N, V]."""

    def cut(value: Any) -> Any:
        is_logits = isinstance(value, Tensor) and value.ndim == 3 and value.shape[1] == count + 1
        return value[:, :count] if is_logits else value

    if isinstance(output, tuple):
        return tuple(cut(value) for value in output)
    if output.logits is not None:  # a fused loss may make none
        output.logits = cut(output.logits)
    return output


def compared(output: Any) -> Any:
    """The model's `output` for the interwoven, the original and perhaps the enhanced memory, logits [2 or 3, N, V],
    with the interwoven logits [1, N, V] alone; `divergences` [1 or 2] are KL(original ‖ other) in nats per position for
    the others, and the loss is their sum."""
    is_tuple = isinstance(output, tuple)
    logits = output[0] if is_tuple else output.logits
    log_probs = logits.float().log_softmax(-1)
    original, others = log_probs[1:2].detach(), log_probs[[0, *range(2, len(log_probs))]]
    per_place = kl_div(others, original.expand_as(others), log_target=True, reduction="none").sum(-1)
    divergences = per_place.sum(-1) / max(logits.shape[1], 1)
    if is_tuple:
        return (divergences.sum(), logits[:1], *output[1:])
    output.loss, output.logits = divergences.sum(), logits[:1]
    return with_entries(output, divergences=divergences)
