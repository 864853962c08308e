"""What a report knows about one `results.json`: tasks, rows, differences, and the questions figures ask of them.

Knows nothing about the file's layout (see `reading`) and nothing about how any of it is shown.
"""

from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from .equal_target import Difference, EqualTarget, Interval
from .units import FRACTION, MIXED, finite

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
class Comparison:
    """A method, at a setting of its sweep if it has one, against another: what it learned and forgot more."""

    method: str
    setting: dict[str, float]
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
    equal: EqualTarget = field(default_factory=EqualTarget)

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

    @property
    def most_seeds(self) -> int:
        """The largest number of seeds behind any row."""
        return max(row.seeds for row in self.rows)

    @property
    def has_intervals(self) -> bool:
        """Whether any row has an interval."""
        return any(row.target_ci or row.forgetting_ci for row in self.rows)

    @property
    def has_sweeps(self) -> bool:
        """Whether any method was measured at several settings."""
        return any(row.setting for row in self.rows)

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

    def curve(self, method: str) -> list[Row]:
        """The points of the method's curve, its own and those it starts from, gains rising where that is known."""
        members = self.equal.members.get(method)
        if members is None:
            return self.sweep(method) + [row for row in self.plain_rows() if row.method == method]
        rows = {(row.method, *sorted(row.setting.items())): row for row in self.rows}
        keys = ((name, *sorted(setting.items())) for name, setting in members)
        return [rows[key] for key in keys if key in rows]

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


def part_unit(study: Study, part: str) -> str:
    """The unit of forgetting for "all" retained tasks or for a family."""
    return study.forgetting_unit if part == "all" else family_unit(study, part)


def _common_unit(tasks: list[Task]) -> str:
    units = {task.unit for task in tasks}
    return units.pop() if len(units) == 1 else MIXED if units else FRACTION
