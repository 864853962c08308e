"""The folder of one run: which recipe it belongs to, and which of its parts are finished.

Knows nothing about how a part is made. A part is a JSON file; where it exists, it is finished.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..cmt.saving import CONFIG_NAME as MEMORY_NAME
from ..cmt.saving import WEIGHTS_NAME
from ..errors import DamagedFileError, RecipeError
from ..files import write_json_atomic
from ..genadapter.saving import CONFIG_NAME, GENERATOR_NAME
from ..imsm.saving import ADAPTER_NAME, check_adapter_files
from ..methods import SavedGenerator, SavedMemory
from ..pretrained import local_folder
from ..processes import is_first, wait_for
from ..training import Recipe

RECIPE_NAME = "recipe.json"
RESULTS_NAME = "results.json"
# More seeds, methods or settings may be added to a run; everything else decides its numbers.
_MAY_CHANGE = {"name", "method", "methods", "seeds", "sweeps", "output"}


class RunFolder:
    """A run's folder, found again, or made with its first part: a run that fails before leaves nothing behind.

    Raises RecipeError when the folder holds another run, or something else.
    """

    def __init__(self, path: Path, recipe: Recipe, command: str) -> None:
        self.path = path
        self._identity = {"command": command, **recipe.model_dump(mode="json", exclude=_MAY_CHANGE)}
        if (saved := recipe.saved_adapter) is not None:
            folder = local_folder(saved.path, None)
            check_adapter_files(folder)
            self._identity["adapter"] = hashlib.sha256((folder / ADAPTER_NAME).read_bytes()).hexdigest()
        settings = recipe.settings()
        if isinstance(generator := settings.generator, SavedGenerator):
            self._identity["generator"] = _digest(generator.path, "generator", GENERATOR_NAME)
        if isinstance(memory := settings.memory, SavedMemory):
            self._identity["memory"] = _digest(memory.path, "memory model", ADAPTER_NAME, WEIGHTS_NAME)
        if self.begun:
            differing = _differing(_read(path / RECIPE_NAME), self._identity)
            if differing:
                raise RecipeError(
                    f"{path} holds another run: {', '.join(differing)} differ. Choose another folder with "
                    "output=…, or remove this one."
                )
        elif path.exists() and (not path.is_dir() or any(not _is_trace(p) for p in path.iterdir())):
            raise RecipeError(f"{path} exists and is not a run of twinweave. Choose another folder with output=….")

    @property
    def begun(self) -> bool:
        """Whether any part of the run was finished before."""
        return (self.path / RECIPE_NAME).is_file()

    def lacks(self, method: str) -> bool:
        """Whether a comparison that was begun has nothing of that method yet."""
        cells = self.path / "cells"
        return cells.is_dir() and not any(cells.glob(f"{method}-*"))

    def has(self, name: str) -> bool:
        """Whether the part of that name is finished."""
        return (self.path / f"{name}.json").is_file()

    def part(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The finished part of that name, or what `make` gives, written down (by the first of a run's processes)."""
        file = self.path / f"{name}.json"
        if not is_first():
            wait_for(file)
        if file.is_file():
            return _read(file)
        value = make()
        if not self.begun:
            write_json_atomic(self.path / RECIPE_NAME, self._identity)
        write_json_atomic(file, value)
        return value


def read_results(run: Path) -> dict[str, Any]:
    """The results.json of a run folder (or of the file itself). Raises DamagedFileError."""
    file = run if run.is_file() else run / RESULTS_NAME
    if not file.is_file():
        raise DamagedFileError(f"{run} has no {RESULTS_NAME}. Give the folder of a finished `train` or `compare` run.")
    results = _read(file)
    if results.get("schema") != 1:
        raise DamagedFileError(f"{file} has schema {results.get('schema')!r}; this version reads schema 1.")
    return results


def add_lm_scores(run: Path, entries: list[dict[str, Any]]) -> Path:
    """Add scores of lm-eval tasks to a run's results.json, in place of those measured the same way before."""
    results = read_results(run)

    def measured(entry: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(entry[key] for key in ("model", "memory", "retention", "limit", "task", "metric"))

    new = {measured(entry) for entry in entries}
    results["lm_eval"] = [entry for entry in results.get("lm_eval", []) if measured(entry) not in new] + entries
    write_json_atomic(run / RESULTS_NAME, results)
    return run / RESULTS_NAME


def find_model(run: Path) -> Path:
    """The folder of the trained model to use from a run: its best one; from a comparison, the first IMSM one if any."""
    cells = [path for kind in ("imsm-*", "*") for path in sorted((run / "cells").glob(f"{kind}/best"))]
    for candidate in (run, run / "best", *cells):
        if any((candidate / name).is_file() for name in ("adapter_config.json", CONFIG_NAME, MEMORY_NAME)):
            return candidate
    raise DamagedFileError(f"There is no trained model in {run}. Give a run folder, or a folder with a saved model.")


def _digest(path: str, what: str, *names: str) -> str:
    """SHA-256 over these files of a folder. Raises DamagedFileError for one that is missing."""
    digest = hashlib.sha256()
    for file in (local_folder(path, None) / name for name in names):
        if not file.is_file():
            raise DamagedFileError(f"{file} is missing. Give the folder of a saved {what}.")
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _is_trace(path: Path) -> bool:
    """Whether a killed process left this while it wrote the recipe."""
    return path.name.startswith(f".{RECIPE_NAME}.tmp-")


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise DamagedFileError(f"{file} is not valid JSON ({error}). Remove it and run the command again.") from error


def _differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return sorted(key for key in old.keys() | new.keys() if _said(old.get(key)) != _said(new.get(key)))


def _said(value: Any) -> Any:
    """`value` without the settings that are None: runs of earlier versions have no such key."""
    if isinstance(value, list):
        return [_said(entry) for entry in value]
    return {k: _said(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value
