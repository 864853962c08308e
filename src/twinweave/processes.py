"""Which of a run's processes this is, and waiting for what the first one makes.

A run started by `accelerate launch` has several processes that do the same; whoever makes a file is the first of them,
and the others wait until it is there. Not with the run's own process group, whose patience ends after minutes: some of
what is waited for takes hours. Whoever launched the run ends the others when one fails. Knows nothing about what is
made.
"""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


def process_index() -> int:
    """From 0; also before torch's process group is made."""
    return distributed.get_rank() if _in_group() else int(os.environ.get("RANK", 0))


def process_count() -> int:
    """How many processes the run has."""
    return distributed.get_world_size() if _in_group() else int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Whether this is the process that writes."""
    return process_index() == 0


def wait_for(file: Path) -> Path:
    """Return `file` when it is there."""
    while not file.exists():
        time.sleep(0.1)
    return file


def from_first(make: Callable[[], T]) -> T:
    """What `make` gives in the first process of the group, in all of them; called by each where there is no group."""
    if not _in_group():
        return make()
    patient = distributed.new_group(backend="gloo", timeout=timedelta(days=7))
    held = [make() if is_first() else None]
    distributed.broadcast_object_list(held, src=0, group=patient)
    distributed.destroy_process_group(patient)
    return held[0]  # type: ignore[return-value]


def mean_over_processes(mean: Tensor, count: int | Tensor) -> Tensor:
    """This process's part of a mean over all processes, from its own mean over `count` items: DDP and FSDP average
    gradients over processes, which have different numbers of items. Exactly `mean` in a single process."""
    if not _in_group() or process_count() == 1:
        return mean
    own = torch.as_tensor(count, dtype=torch.float32, device=mean.device)
    total = own.clone()
    distributed.all_reduce(total)
    return mean * (own * process_count() / total.clamp(min=1))


def _in_group() -> bool:
    return distributed.is_available() and distributed.is_initialized()
