"""Intervals for means: over seeds with Student's t, over examples with the bootstrap. Knows nothing of their origin."""

from collections.abc import Sequence
from typing import Any

import numpy
from scipy import stats

from twinweave.errors import UsageError

Interval = tuple[float, float]


def mean_ci95(values: Sequence[float]) -> tuple[float, Interval | None]:
    """Mean and 95 % interval by Student's t over seeds; one value alone has no interval.

    Raises:
        UsageError: there are no values.
    """
    if not values:
        raise UsageError("There are no values to average. Run at least one seed.")
    mean = float(numpy.mean(values))
    if len(values) == 1:
        return mean, None
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return mean, (mean - half, mean + half)


def paired_difference(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """The mean of a - b over the seeds both share, as `{"mean", "ci95" (None for one pair), "n"}`.

    Raises:
        UsageError: the two do not have the same number of values, or have none.
    """
    if len(a) != len(b):
        raise UsageError(f"Paired values need the same seeds on both sides; there are {len(a)} and {len(b)}.")
    mean, interval = mean_ci95([left - right for left, right in zip(a, b, strict=True)])
    return {"mean": mean, "ci95": interval, "n": len(a)}


def bootstrap_ci95(per_example: Sequence[float], seed: int, resamples: int = 2000) -> Interval:
    """95 % percentile interval of the mean, from `resamples` draws of the examples with replacement.

    Raises:
        UsageError: there are no examples.
    """
    if not per_example:
        raise UsageError("There are no examples to resample. Score at least one.")
    values = numpy.asarray(per_example, dtype=float)
    random = numpy.random.default_rng(seed)
    means = [random.choice(values, len(values)).mean() for _ in range(resamples)]
    low, high = numpy.quantile(means, [0.025, 0.975])
    return float(low), float(high)
