"""The curve of least forgetting: exact by hand, equal to brute force, and never better than what it is made of."""

import itertools

import numpy
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import integrate, stats

from twinweave.errors import UsageError
from twinweave.evaluation import Paired, forgetting_at, mean_along, mixed, mixture_at, ratio_ci95

BASE = (0.0, 0.0)
# A grid makes ties, equal gains and collinear points common.
tenths = st.integers(-10, 10).map(lambda n: n / 10)
point_lists = st.lists(st.tuples(tenths, tenths), min_size=1, max_size=7)
smooth = st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=1, max_size=7)
levels = st.floats(-1.1, 1.1)


def brute_force(points, gain):
    """Over all pairs: at one of the two, or at the mixture that gains just what is asked for."""
    found = [lost for has, lost in points if has >= gain]
    for (g1, f1), (g2, f2) in itertools.permutations(points, 2):
        if g1 < gain <= g2:
            share = (gain - g1) / (g2 - g1)
            found.append(f1 + share * (f2 - f1))
    return min(found, default=None)


def test_by_hand():
    points = [BASE, (0.5, 0.1), (1.0, 0.6), (0.6, 0.5)]
    assert forgetting_at(points, 0.5) == pytest.approx(0.1)
    assert forgetting_at(points, 0.25) == pytest.approx(0.05)  # half of the queries by the base
    assert forgetting_at(points, 0.75) == pytest.approx(0.35)
    assert forgetting_at(points, 1.0) == pytest.approx(0.6)
    assert forgetting_at(points, 1.01) is None
    assert forgetting_at([], 0.0) is None
    assert mixture_at(points, 0.75) == ((1, pytest.approx(0.5)), (2, pytest.approx(0.5)))


def test_more_target_than_asked_for_may_be_used():
    assert forgetting_at([BASE, (0.4, 0.5), (0.9, 0.3)], 0.4) == pytest.approx(0.3 * 0.4 / 0.9)
    assert forgetting_at([(0.4, 0.5), (0.9, 0.3)], 0.2) == pytest.approx(0.3)
    assert mixture_at([(0.4, 0.3), (0.9, 0.3)], 0.4) == ((1, 1.0),)


def test_better_than_the_base():
    points = [BASE, (0.5, -0.2), (1.0, 0.2)]
    assert [forgetting_at(points, gain) for gain in (-0.3, 0.0, 0.5)] == [-0.2, -0.2, -0.2]
    assert forgetting_at(points, 0.75) == pytest.approx(0.0)
    assert mean_along(points, 1.0, [lost for _, lost in points]) == pytest.approx((-0.2 - 0.0) / 2)


def test_a_gain_that_is_the_same_but_for_rounding_is_reached():
    assert forgetting_at([BASE, (0.3, 0.1)], 0.1 + 0.2) == pytest.approx(0.1)


@given(smooth | point_lists, levels)
def test_equal_to_brute_force_over_pairs(points, gain):
    assume(not any(0 < abs(gain - has) < 1e-6 for has, _ in points))
    expected = brute_force(points, gain)
    assert forgetting_at(points, gain) == (None if expected is None else pytest.approx(expected, abs=1e-9))


@given(point_lists)
def test_never_above_its_own_points(points):
    for gain, lost in points:
        found = forgetting_at(points, gain)
        assert found is not None
        assert found <= lost + 1e-12


@given(smooth | point_lists, levels, levels)
def test_more_target_never_costs_less(points, one, other):
    low, high = sorted((one, other))
    at_low, at_high = forgetting_at(points, low), forgetting_at(points, high)
    if at_high is not None:
        assert at_low is not None
        assert at_low <= at_high + 1e-9
        between = forgetting_at(points, (low + high) / 2)
        assert between is not None
        assert between <= (at_low + at_high) / 2 + 1e-9  # convex


@given(point_lists, levels, st.data())
def test_a_dominated_point_changes_nothing(points, gain, data):
    gained, lost = data.draw(st.sampled_from(points))
    worse = (gained - data.draw(st.integers(0, 5)) / 10, lost + data.draw(st.integers(0, 5)) / 10)
    before, after = forgetting_at(points, gain), forgetting_at([worse, *points], gain)
    assert after == (None if before is None else pytest.approx(before, abs=1e-12))


@given(smooth | point_lists, levels)
def test_a_mixture_holds_what_it_promises(points, gain):
    mixture = mixture_at(points, gain)
    if mixture is None:
        assert max(has for has, _ in points) < gain
        return
    assert sum(share for _, share in mixture) == pytest.approx(1.0)
    assert all(0 <= share <= 1 for _, share in mixture)
    assert mixed(mixture, [has for has, _ in points]) >= gain - 1e-8


@given(point_lists, st.floats(0.05, 1.0))
def test_mean_along_is_the_integral(points, gain):
    points = [BASE, *points]
    found = mean_along(points, gain, [lost for _, lost in points])
    if forgetting_at(points, gain) is None:
        assert found is None
        return
    stops = sorted({0.0, gain, *(has for has, _ in points if 0 < has < gain)})
    area = sum(
        integrate.quad(lambda at: forgetting_at(points, at), low, high)[0] for low, high in itertools.pairwise(stops)
    )
    assert found == pytest.approx(area / gain, abs=1e-7)


@given(point_lists, st.floats(-0.5, 1.0), st.floats(0, 0.9))
def test_families_of_one_mixture_add_up(points, gain, share):
    points = [BASE, *points]
    near = [2 * lost for _, lost in points]
    far = [lost * (1 - 2 * share) / (1 - share) for _, lost in points]
    for measure in (lambda values: mean_along(points, gain, values), lambda values: _mixed_at(points, gain, values)):
        together = measure([lost for _, lost in points])
        if together is not None:
            assert share * measure(near) + (1 - share) * measure(far) == pytest.approx(together, abs=1e-9)


def _mixed_at(points, gain, values):
    mixture = mixture_at(points, gain)
    return None if mixture is None else mixed(mixture, values)


def test_without_a_level_the_mean_is_the_start_of_the_curve():
    assert mean_along([BASE, (0.5, -0.1)], 0.0, [0.0, -0.1]) == -0.1
    assert mean_along([BASE], 0.1, [0.0]) is None


def test_seeds_are_paired_where_both_are_known():
    one, other = Paired((0.1, None, 0.3, 0.2)), Paired((0.2, 0.4, 0.5, None))
    found = one.against(other)
    assert found is not None
    expected = stats.ttest_rel([0.1, 0.3], [0.2, 0.5]).confidence_interval(0.95)
    assert found["difference"] == {
        "mean": pytest.approx(-0.15),
        "ci95": pytest.approx((expected.low, expected.high)),
        "n": 2,
    }
    assert found["ratio"]["value"] == pytest.approx(0.4 / 0.7)
    assert one.mean() == (pytest.approx(0.2), pytest.approx(stats.t.interval(0.95, 2, 0.2, 0.1 / 3**0.5)))
    assert Paired((None, None)).mean() is None
    assert Paired((None, 1.0)).against(Paired((1.0, None))) is None


def test_ratio_by_hand():
    assert ratio_ci95([1.0], [4.0]) == (0.25, None)
    assert ratio_ci95([1.0, 2.0], [-1.0, 1.0]) == (None, None)  # a share of nothing
    ratio, interval = ratio_ci95([0.1, 3.0, 5.0], [0.1, 9.0, 2.0])  # the denominator could be 0
    assert (ratio, interval) == (pytest.approx(8.1 / 11.1), None)
    assert ratio_ci95([0.0, 0.0], [0.3, 0.3]) == (0.0, (0.0, 0.0))
    with pytest.raises(UsageError, match="there are 1 and 2"):
        ratio_ci95([1.0], [1.0, 2.0])


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(0.5, 1)), min_size=3, max_size=6))
def test_ratio_bounds_are_where_the_difference_is_just_not_shown(pairs):
    a, b = numpy.array(pairs).T
    ratio, interval = ratio_ci95(a.tolist(), b.tolist())
    if interval is None:
        assert stats.ttest_1samp(b, 0).pvalue >= 0.05 - 1e-6
        return
    assert interval[0] - 1e-9 <= ratio <= interval[1] + 1e-9
    for bound in interval:
        if numpy.std(a - bound * b) > 1e-4:
            assert stats.ttest_1samp(a - bound * b, 0).pvalue == pytest.approx(0.05, abs=1e-3)


@pytest.mark.parametrize("seeds", [3, 5])
def test_ratio_covers_the_truth_as_often_as_it_says(seeds):
    random = numpy.random.default_rng(0)
    trials, covered = 2000, 0
    for _ in range(trials):
        shared = random.normal(0, 0.01, seeds)
        a = 0.02 + 0.2 * shared + random.normal(0, 0.005, seeds)
        _, interval = ratio_ci95(a.tolist(), (0.1 + shared).tolist())
        covered += interval is not None and interval[0] <= 0.2 <= interval[1]
    assert 0.935 <= covered / trials <= 0.965
