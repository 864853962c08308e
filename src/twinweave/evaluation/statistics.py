"""Intervals for means: over seeds with Student's t, over examples with the bootstrap. Knows nothing of their origin."""

import math
from collections.abc import Sequence
from typing import Any

import numpy
from scipy import stats

from twinweave.errors import UsageError

Interval = tuple[float, float]
# Means of scores that are equal on paper differ by less.
ROUNDING = 1e-9


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


def ratio_ci95(a: Sequence[float], b: Sequence[float]) -> tuple[float | None, Interval | None]:
    """mean(a) / mean(b) over paired seeds, with its 95 % interval by Fieller's theorem (Student's t).

    The ratio is None where mean(b) is not above 0 (by more than rounding): a share of it means nothing. The interval is
    None for one pair, and where mean(b) does not differ from 0 with the same confidence: then no bounded interval has
    its coverage.

    Raises:
        UsageError: the two do not have the same number of values, or have none.
    """
    if len(a) != len(b):
        raise UsageError(f"Paired values need the same seeds on both sides; there are {len(a)} and {len(b)}.")
    (top, _), (bottom, _) = mean_ci95(a), mean_ci95(b)
    if bottom <= ROUNDING:
        return None, None
    ratio, n = top / bottom, len(a)
    if n == 1:
        return ratio, None
    (var_top, shared), (_, var_bottom) = numpy.cov(a, b) / n
    t2 = stats.t.ppf(0.975, n - 1) ** 2
    # The interval holds the ratios r for which mean(a - r b) does not differ from 0: a quadratic in r.
    square, linear, constant = bottom**2 - t2 * var_bottom, top * bottom - t2 * shared, top**2 - t2 * var_top
    if square <= 0:
        return ratio, None
    half = math.sqrt(max(linear**2 - square * constant, 0.0))
    return ratio, (float((linear - half) / square), float((linear + half) / square))


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
