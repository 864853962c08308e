"""The folder of one run: which recipe it belongs to, and which of its parts are finished.

Knows nothing about how a part is made. A part is a JSON file; where it exists, it is finished.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import DamagedFileError, RecipeError
from ..files import write_json_atomic
from ..training import Recipe

RECIPE_NAME = "recipe.json"
RESULTS_NAME = "results.json"
# More seeds, methods or settings may be added to a run; everything else decides its numbers.
_MAY_CHANGE = {"name", "method", "methods", "seeds", "sweeps", "output"}


class RunFolder:
    """A run's folder, made or found again. Raises RecipeError when it holds another run, or something else."""

    def __init__(self, path: Path, recipe: Recipe, command: str) -> None:
        self.path = path
        identity = {"command": command, **recipe.model_dump(mode="json", exclude=_MAY_CHANGE)}
        known = path / RECIPE_NAME
        if known.is_file():
            differing = _differing(_read(known), identity)
            if differing:
                raise RecipeError(
                    f"{path} holds another run: {', '.join(differing)} differ. Choose another folder with "
                    "output=…, or remove this one."
                )
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RecipeError(f"{path} exists and is not a run of twinweave. Choose another folder with output=….")
        else:
            write_json_atomic(known, identity)

    def part(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The finished part of that name, or what `make` gives, written down."""
        file = self.path / f"{name}.json"
        if file.is_file():
            return _read(file)
        value = make()
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


def find_model(run: Path) -> Path:
    """The folder of the trained model to use from a run: its best one; from a comparison, the first IMSM one."""
    for candidate in (run, run / "best", *sorted((run / "cells").glob("imsm-*/best"))):
        if (candidate / "adapter_config.json").is_file():
            return candidate
    raise DamagedFileError(f"There is no trained model in {run}. Give a run folder, or a folder with a saved model.")


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise DamagedFileError(f"{file} is not valid JSON ({error}). Remove it and run the command again.") from error


def _differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
