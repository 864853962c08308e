"""What a `results.json` says about forgetting at equal target: which points make a method's curve, and what it costs.

Knows nothing about how any of it is shown.
"""

from dataclasses import dataclass, field
from typing import Any

from .units import finite

Interval = tuple[float, float]
PARTS = ("all", "near", "far")
Setting = dict[str, float]


@dataclass(frozen=True)
class Difference:
    """One method minus another, paired over seeds, in the unit of the quantity."""

    mean: float | None
    ci: Interval | None


@dataclass(frozen=True)
class Against:
    """A method against another: the paired difference of forgetting, and the ratio of the means with its interval."""

    difference: Difference
    ratio: float | None
    ratio_ci: Interval | None


@dataclass(frozen=True)
class Cost:
    """What a method forgets, over the seeds that reach the target, alone and against two others."""

    mean: float
    ci: Interval | None
    reference: Against | None
    best: Against | None


@dataclass(frozen=True)
class Reach:
    """A method at plain PEFT's target (or on the way to it): how many of the seeds get there, and what it forgets."""

    seeds: int
    reached: int
    costs: dict[str, Cost] = field(default_factory=dict)
    """By part ("all", "near", "far"); a part without tasks, or that no seed reaches, is absent."""


@dataclass(frozen=True)
class EqualTarget:
    """The whole part "frontier" of a `results.json`; empty for results that have none."""

    reference: str | None = None
    reference_setting: Setting = field(default_factory=dict)
    best: str | None = None
    tolerance: float = 0.0
    target: float | None = None
    """The level as a target score."""
    members: dict[str, list[tuple[str, Setting]]] = field(default_factory=dict)
    """Method -> the (method, setting) points of its curve, gains rising."""
    at_target: dict[str, Reach] = field(default_factory=dict)
    along: dict[str, Reach] = field(default_factory=dict)

    @property
    def parts(self) -> list[str]:
        """The parts that any method has a number for."""
        return [part for part in PARTS if any(part in reach.costs for reach in self.at_target.values())]

    def ranked(self) -> list[str]:
        """The methods by what they forget; those that reach the target in less than half of the seeds come last."""

        def rank(method: str) -> tuple[float, float]:
            reach = self.at_target[method]
            cost = reach.costs.get("all")
            return -min(reach.reached / reach.seeds, 0.5), cost.mean if cost else 0.0

        return sorted(self.at_target, key=rank)

    def lead(self) -> str | None:
        """The method the report is about: IMSM, else the first with two memories."""
        woven = [method for method in self.at_target if method.startswith("imsm")]
        return "imsm" if "imsm" in woven else next(iter(woven), None)


def read_equal_target(value: Any) -> EqualTarget:
    """Read the part "frontier"; an empty one where there is none."""
    if not isinstance(value, dict):
        return EqualTarget()
    reference = value.get("reference") or {}
    methods = {str(entry["method"]): entry for entry in value.get("methods") or []}
    return EqualTarget(
        reference=str(reference["method"]) if reference else None,
        reference_setting=reference.get("setting") or {},
        best=None if value.get("best_baseline") is None else str(value["best_baseline"]),
        tolerance=finite(value.get("tolerance")) or 0.0,
        target=finite(value.get("target")),
        members={
            name: [(str(point["method"]), point.get("setting") or {}) for point in entry.get("points") or []]
            for name, entry in methods.items()
        },
        at_target=_reaches(methods, "equal_target"),
        along=_reaches(methods, "area"),
    )


def _reaches(methods: dict[str, Any], key: str) -> dict[str, Reach]:
    return {name: _reach(entry[key]) for name, entry in methods.items() if entry.get(key)}


def _reach(entry: dict[str, Any]) -> Reach:
    seeds = int(entry["seeds"])
    costs = {part: cost for part in PARTS if (cost := _cost(entry.get(part)))}
    return Reach(seeds, round(entry["reached"] * seeds), costs)


def _cost(entry: Any) -> Cost | None:
    mean = finite(entry.get("mean")) if entry else None
    if mean is None:
        return None
    return Cost(
        mean,
        interval_of(entry.get("ci95")),
        _against(entry.get("against_reference")),
        _against(entry.get("against_best")),
    )


def _against(entry: Any) -> Against | None:
    if not entry:
        return None
    difference, ratio = entry.get("difference") or {}, entry.get("ratio") or {}
    return Against(
        Difference(finite(difference.get("mean")), interval_of(difference.get("ci95"))),
        finite(ratio.get("value")),
        interval_of(ratio.get("ci95")),
    )


def verdict(difference: Difference, lower_is_better: bool) -> str:
    """In a word: "better", "worse", "not shown" (the interval holds zero) or "unclear" (no interval)."""
    if difference.mean is None or difference.ci is None:
        return "unclear"
    low, high = difference.ci
    if low <= 0 <= high:
        return "not shown"
    return "better" if (high < 0) == lower_is_better else "worse"


def interval_of(value: Any) -> Interval | None:
    """Two finite numbers as an interval; None for anything else."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    low, high = finite(value[0]), finite(value[1])
    return None if low is None or high is None else (low, high)
