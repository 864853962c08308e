"""A `results.json` made easy to read: every part present or plainly absent, units known, sweeps told apart.

Tolerates missing parts (no lens, no sweep, one seed, no retained task, no base scores). Knows nothing about
how any of it is shown.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from twinweave.errors import DamagedFileError

from .units import FRACTION, MIXED, finite

Interval = tuple[float, float]
Curve = list[tuple[float, float]]
FAMILIES = ("near", "far", "other")


@dataclass(frozen=True)
class Task:
    """One task: the target, or one of the retained ones with its family ("near", "far" or "other")."""

    name: str
    role: str
    family: str
    metric: str
    unit: str
    higher_is_better: bool
    count: int | None
    description: str
    kind: str

    def lost(self, base: float, score: float) -> float:
        """By how much `score` is worse than `base`, whatever the direction of the metric."""
        return base - score if self.higher_is_better else score - base


@dataclass(frozen=True)
class Row:
    """One line of the table: a method at one setting, over its seeds. Scores are in the task's own unit."""

    method: str
    label: str
    setting: dict[str, float]
    seeds: int
    target: float | None
    target_ci: Interval | None
    forgetting: float | None
    forgetting_ci: Interval | None


@dataclass(frozen=True)
class Difference:
    """One method minus another, paired over seeds, in the unit of the quantity."""

    mean: float | None
    ci: Interval | None


@dataclass(frozen=True)
class Comparison:
    """A method against another: what it learned more and what it forgot more."""

    method: str
    against: str
    seeds: int
    target: Difference
    forgetting: Difference


@dataclass(frozen=True)
class Study:
    """Everything the report shows about one `results.json`."""

    name: str
    base: dict[str, Any]
    tasks: dict[str, Task]
    runs: list[dict[str, Any]]
    rows: list[Row]
    comparisons: list[Comparison]
    lens: list[dict[str, Any]]
    recipe: dict[str, Any]
    provenance: dict[str, Any]
    labels: dict[str, str] = field(default_factory=dict)

    @property
    def targets(self) -> list[Task]:
        """The tasks that were trained."""
        return [task for task in self.tasks.values() if task.role == "target"]

    @property
    def retained(self) -> list[Task]:
        """The tasks the base knew before, near ones first."""
        kept = [task for task in self.tasks.values() if task.role != "target"]
        return sorted(kept, key=lambda task: FAMILIES.index(task.family))

    @property
    def target_unit(self) -> str:
        """The unit of target scores; "mixed" where target tasks differ."""
        return _common_unit(self.targets)

    @property
    def forgetting_unit(self) -> str:
        """The unit of forgetting; "mixed" where retained tasks differ."""
        return _common_unit(self.retained)

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher target score is the better one."""
        return all(task.higher_is_better for task in self.targets)

    @property
    def base_target(self) -> float | None:
        """The target score of the untouched base."""
        known = finite(self.base.get("target_score"))
        if known is not None:
            return known
        scores = [base_score(self, task) for task in self.targets]
        return fmean(kept) if (kept := [score for score in scores if score is not None]) else None

    def label(self, method: str) -> str:
        """The method's name for readers."""
        return self.labels.get(method, method)

    def methods(self) -> list[str]:
        """Every method, in the order of the results."""
        return list(dict.fromkeys(row.method for row in self.rows))

    def sweep(self, method: str) -> list[Row]:
        """The method's points over its settings, in the order of the setting; empty if it has no setting."""
        points = [row for row in self.rows if row.method == method and row.setting]
        return sorted(points, key=lambda row: [(key, row.setting[key]) for key in sorted(row.setting)])

    def plain_rows(self) -> list[Row]:
        """The methods as they are, without the points of sweeps."""
        return [row for row in self.rows if not row.setting]

    def runs_of(self, row: Row) -> list[dict[str, Any]]:
        """The runs (one per seed) behind a row."""
        return [run for run in self.runs if run["method"] == row.method and (run.get("setting") or {}) == row.setting]


def base_score(study: Study, task: Task) -> float | None:
    """The base's primary score on a task."""
    return finite(((study.base.get("scores") or {}).get(task.name) or {}).get(task.metric))


def seed_scores(study: Study, row: Row, task: Task) -> list[float]:
    """The primary scores of a row's seeds on a task."""
    where = "target" if task.role == "target" else "retained"
    scores = (finite(((run.get(where) or {}).get(task.name) or {}).get(task.metric)) for run in study.runs_of(row))
    return [score for score in scores if score is not None]


def family_forgetting(study: Study, row: Row, family: str) -> float | None:
    """Mean forgetting over the tasks of a family and over seeds; None where nothing was measured."""
    losses = [
        task.lost(base, fmean(scores))
        for task in study.retained
        if task.family == family
        and (base := base_score(study, task)) is not None
        and (scores := seed_scores(study, row, task))
    ]
    return fmean(losses) if losses else None


def family_unit(study: Study, family: str) -> str:
    """The unit of a family's forgetting."""
    return _common_unit([task for task in study.retained if task.family == family])


def read_study(results: dict[str, Any]) -> Study:
    """Read the contents of one `results.json`.

    Raises:
        DamagedFileError: not a results object, another schema, or no run in it.
    """
    if not isinstance(results, dict):
        raise DamagedFileError(f"Results must be an object, found {type(results).__name__}; is this a results.json?")
    if (schema := results.get("schema", 1)) != 1:
        raise DamagedFileError(f"Results have schema {schema!r}, this version reads schema 1; update twinweave.")
    runs = [run for run in results.get("runs") or [] if isinstance(run, dict) and "method" in run]
    summary = results.get("summary") or []
    if not runs and not summary:
        raise DamagedFileError("Results hold no finished run, so there is nothing to report; let the run finish.")
    rows = [_row(entry) for entry in summary] or _rows_from_runs(runs)
    labels: dict[str, str] = {}
    for row in rows:
        labels.setdefault(row.method, row.label)
    base = results.get("base") or {}
    return Study(
        name=str(results.get("name") or base.get("name") or "results"),
        base=base,
        tasks=_tasks(results, runs),
        runs=runs,
        rows=rows,
        comparisons=[_comparison(entry) for entry in results.get("comparisons") or []],
        lens=results.get("lens") or [],
        recipe=results.get("recipe") or {},
        provenance=results.get("provenance") or {},
        labels=labels,
    )


def _common_unit(tasks: list[Task]) -> str:
    units = {task.unit for task in tasks}
    return units.pop() if len(units) == 1 else MIXED if units else FRACTION


def _interval(value: Any) -> Interval | None:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    low, high = finite(value[0]), finite(value[1])
    return None if low is None or high is None else (low, high)


def _row(entry: dict[str, Any]) -> Row:
    return Row(
        method=str(entry["method"]),
        label=str(entry.get("label") or entry["method"]),
        setting=entry.get("setting") or {},
        seeds=int(entry.get("seeds") or 1),
        target=finite(entry.get("target_mean")),
        target_ci=_interval(entry.get("target_ci95")),
        forgetting=finite(entry.get("forgetting_mean")),
        forgetting_ci=_interval(entry.get("forgetting_ci95")),
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
        return Difference(finite(value.get("mean")), _interval(value.get("ci95")))

    return Comparison(
        method=str(entry["method"]),
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
