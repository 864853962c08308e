"""Where a model's original memory comes from: what a frozen-memory store has to know of the model it is made with.

Knows nothing about files.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cmt import MemoryModel
from ..fingerprint import BaseFingerprint
from ..imsm import IMSMModel
from ..imsm.labels import FrozenStates


@dataclass(frozen=True)
class FrozenSource:
    """The original memory of a model."""

    base: Any
    """The base, a PreTrainedModel."""
    fingerprint: BaseFingerprint
    width: int
    """d of the states."""
    has_queries: bool
    """Whether query means belong to it, or the states at label positions alone."""
    states: Callable[..., FrozenStates]
    """`input_ids`, `attention_mask`, `labels` and maybe `query_mask`, each [B, T] -> what is kept of the batch."""


def source_of(model: object) -> FrozenSource | None:
    """The original memory that training reads; None where it reads none."""
    if isinstance(model, IMSMModel):
        base: Any = model.get_base_model()
        return FrozenSource(base, model.base_fingerprint, model.gate.hidden_size, True, model.frozen_states)
    if isinstance(model, MemoryModel):
        width = model.compressor.width

        def states(**batch: Tensor) -> FrozenStates:
            found = model.frozen_states(**batch)
            return FrozenStates(found, torch.empty(0, width))

        return FrozenSource(model.base, model.base_fingerprint, width, False, states)
    return None
