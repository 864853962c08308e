"""Checkpoints that are whole or not there: written aside, marked last, then renamed.

Knows nothing about what a checkpoint holds. A folder without the marker is the trace of a run that died while writing;
it is never resumed from, and it is removed when the next one is written.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from ..files import write_json_atomic

MARKER = "complete.json"
_PREFIX = "checkpoint-"
_STAGING = ".writing"


def staging_folder(run: Path) -> Path:
    """Where checkpoints are written before they count; the same for every process of a run."""
    return run / _STAGING


def publish(run: Path, step: int, facts: dict[str, Any]) -> Path:
    """Make the staged checkpoint of `step` count: marker last, then one rename. `facts` go into the marker."""
    staged, goal = staging_folder(run) / f"{_PREFIX}{step}", run / f"{_PREFIX}{step}"
    write_json_atomic(staged / MARKER, {"step": step, **facts})
    shutil.rmtree(goal, ignore_errors=True)  # an unmarked one: a marked one would have been gone on from
    staged.rename(goal)
    shutil.rmtree(staging_folder(run), ignore_errors=True)
    return goal


def complete_checkpoints(run: Path) -> list[Path]:
    """The run's whole checkpoints, oldest first."""
    found = [p for p in run.glob(f"{_PREFIX}*") if (p / MARKER).is_file() and p.name[len(_PREFIX) :].isdigit()]
    return sorted(found, key=lambda p: int(p.name[len(_PREFIX) :]))


def facts_of(checkpoint: Path) -> dict[str, Any]:
    """What was written into the checkpoint's marker."""
    return dict(json.loads((checkpoint / MARKER).read_text(encoding="utf-8")))


def keep_only(run: Path, steps: set[int]) -> None:
    """Remove every checkpoint but those of the given steps, unmarked ones too."""
    kept = {f"{_PREFIX}{step}" for step in steps}
    for checkpoint in run.glob(f"{_PREFIX}*"):
        if checkpoint.name not in kept:
            (checkpoint / MARKER).unlink(missing_ok=True)  # first, so that half of it never counts
            shutil.rmtree(checkpoint, ignore_errors=True)


def clear(run: Path) -> None:
    """Remove every checkpoint of the run and what a killed process left of one."""
    keep_only(run, set())
    shutil.rmtree(staging_folder(run), ignore_errors=True)
