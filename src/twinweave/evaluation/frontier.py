"""The frontier of one method in one seed: how little forgetting a target costs, and how that compares over seeds.

A point is (gain, forgetting): by how much the target got better than the base, and how much of the rest got worse; in
both the base is 0. Knows nothing about models, tasks or files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .statistics import ROUNDING, Interval, mean_ci95, paired_difference, ratio_ci95

Point = tuple[float, float]
Mixture = tuple[tuple[int, float], ...]
"""(index of a point, share of the queries that it answers); the shares add up to 1."""


def mixture_at(points: Sequence[Point], gain: float) -> Mixture | None:
    """The mixture of at most two points that gains at least `gain` and forgets least; None where none gains that much.

    Answering each query with either of two models, by chance, has the mean of their scores in expectation. So whatever
    lies between two points can be reached, and a point that gains more than is asked for may be used as it is.
    """
    hull = _hull(points)
    if not hull or gain > points[hull[-1]][0] + ROUNDING:
        return None
    for left, right in pairwise(hull):
        low, high = points[left][0], points[right][0]
        if gain <= low:
            return ((left, 1.0),)
        if gain < high:
            share = (gain - low) / (high - low)
            return ((left, 1.0 - share), (right, share))
    return ((hull[-1], 1.0),)


def forgetting_at(points: Sequence[Point], gain: float) -> float | None:
    """The smallest forgetting of any mixture of `points` that gains at least `gain`; None where none does."""
    mixture = mixture_at(points, gain)
    return None if mixture is None else mixed(mixture, [forgetting for _, forgetting in points])


def mixed(mixture: Mixture, values: Sequence[float]) -> float:
    """The expected value of a mixture, from the value of each point."""
    return sum(share * values[index] for index, share in mixture)


def mean_along(points: Sequence[Point], gain: float, values: Sequence[float]) -> float | None:
    """The mean of `values` (one per point) along the curve, from gain 0 to `gain`; None where it does not go so far.

    With the points' own forgetting as `values` it is the area under the curve, divided by `gain`. At every gain it is
    the mixture of least forgetting that counts, whatever the values are.
    """
    if gain <= 0:
        mixture = mixture_at(points, gain)
        return None if mixture is None else mixed(mixture, values)
    if mixture_at(points, gain) is None:
        return None
    stops = sorted({0.0, gain, *(points[index][0] for index in _hull(points) if 0 < points[index][0] < gain)})
    # Between two corners every value is a straight line, so its mean is its middle.
    middles = ((high - low, mixture_at(points, (low + high) / 2)) for low, high in pairwise(stops))
    return sum(width * mixed(mixture, values) for width, mixture in middles if mixture) / gain


def _hull(points: Sequence[Point]) -> list[int]:
    """Indices of the corners of the lower convex hull, gains rising, from the point of least forgetting on."""
    if not points:
        return []
    best = min(range(len(points)), key=lambda index: (points[index][1], -points[index][0]))
    corners = [best]
    beyond = [index for index, (gain, _) in enumerate(points) if gain > points[best][0]]
    for index in sorted(beyond, key=lambda index: points[index]):
        x, y = points[index]
        if x == points[corners[-1]][0]:
            continue
        while len(corners) > 1:
            (x1, y1), (x2, y2) = points[corners[-2]], points[corners[-1]]
            if (y2 - y1) * (x - x2) < (y - y2) * (x2 - x1):
                break
            corners.pop()
        corners.append(index)
    return corners


@dataclass(frozen=True)
class Paired:
    """One quantity of a method over seeds; None in a seed where it is not known."""

    values: tuple[float | None, ...]

    def against(self, other: "Paired") -> dict[str, Any] | None:
        """`{"difference": …, "ratio": …}` to another method over the seeds that both have; None without any."""
        pairs = [(a, b) for a, b in zip(self.values, other.values, strict=True) if a is not None and b is not None]
        if not pairs:
            return None
        mine, theirs = [a for a, _ in pairs], [b for _, b in pairs]
        value, interval = ratio_ci95(mine, theirs)
        ratio = None if value is None else {"value": value, "ci95": interval}
        return {"difference": paired_difference(mine, theirs), "ratio": ratio}

    def mean(self) -> tuple[float, Interval | None] | None:
        """Mean and 95 % interval over the seeds where it is known; None where it never is."""
        known = [value for value in self.values if value is not None]
        return mean_ci95(known) if known else None
