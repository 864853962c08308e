"""Whether a training reads its original memory from a store, and from which: `training.frozen_store` of a recipe.

Knows nothing about what is in a store. What `auto` decides is written down beside the store's folder, so that a run
that is gone on with on a fuller disk still gives the same numbers.
"""

import json
import shutil
import time
from pathlib import Path

import datasets
from rich.markup import escape
from transformers import PreTrainedTokenizerBase, TrainingArguments

from ..data import CompletionCollator, questions_of
from ..files import write_json_atomic
from ..progress import say
from .frozen_files import is_finished
from .frozen_rows import Row, plan_rows
from .frozen_source import source_of
from .frozen_store import Collator, FrozenStore, identity_of, stored_bytes
from .recipe import TrainingSection

# Every row is read so often at least, or computing its original memory once would be no less work.
_LEAST_READINGS = 2
_LARGEST_SHARE_OF_DISK = 0.25


def frozen_store_for(
    section: TrainingSection,
    model: object,
    dataset: datasets.Dataset,
    *,
    collator: Collator,
    tokenizer: PreTrainedTokenizerBase,
    arguments: TrainingArguments,
    readings: float,
    folder: Path,
) -> FrozenStore | None:
    """The store that the recipe asks for, made if it is not there yet; None where none is used.

    `readings`: how often training reads a row, on average. `folder` is where the store is kept (that of questions with
    contexts beside it); the first process makes it while the others wait. Raises what `FrozenStore.build` and
    `FrozenStore.open` raise.
    """
    source = source_of(model)
    if section.frozen_store == "off" or source is None:
        return None
    if section.frozen_store == "auto" and readings < _LEAST_READINGS:
        return None
    if "questions" in dataset.column_names:  # a store knows each question by itself, and nothing of contexts
        dataset, collator, folder = questions_of(dataset), CompletionCollator(tokenizer), questions_store_folder(folder)
    identity = identity_of(model, tokenizer, "bfloat16" if section.precision == "bf16" else None)
    rows = plan_rows(dataset, source.has_queries)
    size = stored_bytes(rows, model)
    if arguments.process_index > 0:
        if not _wait_for_store(folder, decided=section.frozen_store == "auto"):
            return None
    elif section.frozen_store == "auto" and not _decision(folder, size):
        return None
    elif not is_finished(folder):
        _announce(folder, rows, size)
        started = time.perf_counter()
        store = FrozenStore.build(
            model, dataset, collator, folder, identity=identity, batch_size=section.batch_size, rows=rows
        )
        say(f"original memory computed in {time.perf_counter() - started:,.1f} seconds")
        return store
    return FrozenStore.open(folder, model, dataset, collator, identity=identity, rows=rows)


def remove_store(folder: Path, decision: bool = False) -> None:
    """Remove what `auto` made in `folder` and beside it; with `decision`, also what it decided."""
    for store in (folder, rehearsal_store_folder(folder), questions_store_folder(folder)):
        shutil.rmtree(store, ignore_errors=True)
        if decision:
            _decision_file(store).unlink(missing_ok=True)


def rehearsal_store_folder(folder: Path) -> Path:
    """Where the original memory of the rehearsed rows is, beside that of the task's rows."""
    return folder.with_name(f"{folder.name}_rehearsal")


def questions_store_folder(folder: Path) -> Path:
    """Where the original memory of questions without their contexts is, beside that of rows with them in the prompt."""
    return folder.with_name(f"{folder.name}_questions")


def _wait_for_store(folder: Path, decided: bool) -> bool:
    """In all processes but the first: wait until there is a store, or it is decided that there will be none.

    Not a barrier: those of a process group end after minutes, and a store may take hours.
    """
    while not is_finished(folder):
        if decided and _decision_file(folder).is_file() and not _read_decision(folder):
            return False
        time.sleep(0.5)
    return True


def _decision(folder: Path, size: int) -> bool:
    """Whether the store may take so many bytes of the disk: as decided before, or now."""
    file = _decision_file(folder)
    if file.is_file():
        return _read_decision(folder)
    place = next(path for path in folder.absolute().parents if path.is_dir())
    free = shutil.disk_usage(place).free
    used = size <= _LARGEST_SHARE_OF_DISK * free
    if not used:
        say(
            f"the original memory would take {_size(size)} of the {_size(free)} free in {escape(str(place))}, so it "
            "is computed anew at every step"
        )
    write_json_atomic(file, {"used": used, "bytes": size})
    return used


def _decision_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")


def _read_decision(folder: Path) -> bool:
    return bool(json.loads(_decision_file(folder).read_text(encoding="utf-8"))["used"])


def _announce(folder: Path, rows: list[Row], size: int) -> None:
    positions = sum(row.positions for row in rows)
    say(
        f"computing the original memory of {len(rows):,} rows ({positions:,} label positions) once: "
        f"{_size(size)} in {escape(str(folder))}"
    )


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            break
        count, unit = count / 1000, {"bytes": "KB", "KB": "MB", "MB": "GB", "GB": "TB"}[unit]
    return f"{count:,.0f} {unit}" if unit in ("bytes", "KB") else f"{count:,.1f} {unit}"
