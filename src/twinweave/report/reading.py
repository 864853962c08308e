"""Reading the contents of a `results.json`: every part present or plainly absent, and no text a page cannot hold.

Tolerates missing parts (no lens, no sweep, one seed, no retained task, no base scores, no summary). Knows
nothing about how any of it is shown.
"""

import re
from collections import defaultdict
from dataclasses import replace
from statistics import fmean
from typing import Any

from twinweave.errors import DamagedFileError

from .equal_target import EqualTarget, interval_of, read_equal_target
from .study import Comparison, Difference, Row, Study, Task
from .units import FRACTION, finite

# What neither XML nor UTF-8 can carry, such as a NUL byte or half a surrogate pair from a cut token.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def read_study(results: dict[str, Any]) -> Study:
    """Read the contents of one `results.json`.

    Raises:
        DamagedFileError: not a results object, another schema, or no run in it.
    """
    if not isinstance(results, dict):
        raise DamagedFileError(f"Results must be an object, found {type(results).__name__}; is this a results.json?")
    if (schema := results.get("schema", 1)) != 1:
        raise DamagedFileError(f"Results have schema {schema!r}, this version reads schema 1; update twinweave.")
    try:
        study = _study(_clean(results))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise DamagedFileError(f"Results are not laid out as twinweave writes them ({problem}); run again.") from error
    if not study.rows:
        raise DamagedFileError("Results hold no finished run, so there is nothing to report; let the run finish.")
    return study


def _study(results: dict[str, Any]) -> Study:
    runs = list(results.get("runs") or [])
    rows = [_row(entry) for entry in results.get("summary") or []] or _rows_from_runs(runs)
    labels: dict[str, str] = {}
    for row in rows:
        labels.setdefault(row.method, row.label)
    base = results.get("base") or {}
    tasks = _tasks(results, runs)
    comparisons = [_comparison(entry) for entry in results.get("comparisons") or []]
    equal = read_equal_target(results.get("frontier"))
    if tasks and all(task.role == "target" for task in tasks.values()):
        # The mean over no tasks is written as 0; shown as a number it would read as "nothing forgotten".
        rows = [replace(row, forgetting=None, forgetting_ci=None) for row in rows]
        comparisons = [replace(entry, forgetting=Difference(None, None)) for entry in comparisons]
        equal = EqualTarget()
    return Study(
        name=str(results.get("name") or base.get("name") or "results"),
        base=base,
        tasks=tasks,
        runs=runs,
        rows=rows,
        comparisons=comparisons,
        equal=equal,
        lens=results.get("lens") or [],
        recipe=results.get("recipe") or {},
        provenance=results.get("provenance") or {},
        labels=labels,
    )


def _clean(value: Any) -> Any:
    """A copy of JSON-like data with every character a page cannot hold replaced by U+FFFD."""
    if isinstance(value, dict):
        return {_clean(key): _clean(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(entry) for entry in value]
    return _FORBIDDEN.sub("\ufffd", value) if isinstance(value, str) else value


def _row(entry: dict[str, Any]) -> Row:
    return Row(
        method=str(entry["method"]),
        label=str(entry.get("label") or entry["method"]),
        setting=entry.get("setting") or {},
        seeds=int(entry.get("seeds") or 1),
        target=finite(entry.get("target_mean")),
        target_ci=interval_of(entry.get("target_ci95")),
        forgetting=finite(entry.get("forgetting_mean")),
        forgetting_ci=interval_of(entry.get("forgetting_ci95")),
    )


def _rows_from_runs(runs: list[dict[str, Any]]) -> list[Row]:
    """A single training run has no summary: its means over seeds, without intervals."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        groups[run["method"], tuple(sorted((run.get("setting") or {}).items()))].append(run)

    def mean(group: list[dict[str, Any]], key: str) -> float | None:
        values = [value for run in group if (value := finite(run.get(key))) is not None]
        return fmean(values) if values else None

    return [
        Row(
            method=str(method),
            label=str(group[0].get("label") or method),
            setting=dict(setting),
            seeds=len(group),
            target=mean(group, "target_score"),
            target_ci=None,
            forgetting=mean(group, "forgetting"),
            forgetting_ci=None,
        )
        for (method, setting), group in groups.items()
    ]


def _comparison(entry: dict[str, Any]) -> Comparison:
    def difference(key: str) -> Difference:
        value = entry.get(key) or {}
        return Difference(finite(value.get("mean")), interval_of(value.get("ci95")))

    return Comparison(
        method=str(entry["method"]),
        setting=entry.get("setting") or {},
        against=str(entry["against"]),
        seeds=int(entry.get("seeds") or 1),
        target=difference("target_difference"),
        forgetting=difference("forgetting_difference"),
    )


def _tasks(results: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Task]:
    declared = results.get("tasks") or {}
    tasks = {name: _task(name, entry or {}) for name, entry in declared.items()}
    # Scores of tasks that nobody declared still belong in the report.
    for run in runs:
        for role in ("target", "retained"):
            for name, scores in (run.get(role) or {}).items():
                if name not in tasks:
                    tasks[name] = _task(name, {"role": role, "metric": next(iter(scores or {}), "score")})
    return tasks


def _task(name: str, entry: dict[str, Any]) -> Task:
    role = str(entry.get("role") or "retained")
    family = entry.get("family")
    metric = str(entry.get("metric") or "score")
    loss = "loss" in metric or entry.get("unit") == "nats"
    count = finite(entry.get("count"))
    return Task(
        name=str(name),
        role=role,
        family=family if family in ("near", "far") and role != "target" else "other",
        metric=metric,
        unit=str(entry.get("unit") or ("nats" if loss else FRACTION)),
        higher_is_better=bool(entry.get("higher_is_better", not loss)),
        count=None if count is None else int(count),
        description=str(entry.get("description") or ""),
        kind=str(entry.get("kind") or ""),
    )
