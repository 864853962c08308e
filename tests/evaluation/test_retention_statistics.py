import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from twinweave.errors import UsageError
from twinweave.evaluation import bootstrap_ci95, forgetting, mean_ci95, paired_difference, retained_score

UP = {"facts": True, "text": False}
scores = st.fixed_dictionaries({"facts": st.floats(0, 1), "text": st.floats(0, 10)})
values = st.lists(st.floats(-10, 10), min_size=2, max_size=9)


def test_forgetting_by_hand():
    base, run = {"facts": 0.9, "text": 2.0}, {"facts": 0.7, "text": 2.5}
    assert forgetting(base, run, UP) == pytest.approx((0.2 + 0.5) / 2)
    assert retained_score(base, UP) == pytest.approx((0.9 - 2.0) / 2)


@given(base=scores, run=scores)
def test_forgetting_is_the_difference_of_retained_scores(base, run):
    assert forgetting(base, base, UP) == 0.0
    assert forgetting(base, run, UP) == pytest.approx(-forgetting(run, base, UP))
    assert forgetting(base, run, UP) == pytest.approx(retained_score(base, UP) - retained_score(run, UP))


def test_retention_needs_the_same_tasks_and_their_directions():
    with pytest.raises(UsageError, match="same retained tasks: text"):
        forgetting({"facts": 1.0}, {"facts": 1.0, "text": 1.0}, UP)
    with pytest.raises(UsageError, match="No direction is known for: other"):
        retained_score({"other": 1.0}, UP)
    with pytest.raises(UsageError, match="No retained task"):
        forgetting({}, {}, UP)


@given(values)
def test_mean_ci95_is_students_t(sample):
    mean, interval = mean_ci95(sample)
    assert interval is not None
    assert mean == pytest.approx(numpy.mean(sample))
    assert interval[0] <= mean <= interval[1]
    if numpy.std(sample) > 1e-6:
        expected = stats.ttest_1samp(sample, 0.0).confidence_interval(0.95)
        assert interval == pytest.approx((expected.low, expected.high))


def test_one_seed_has_no_interval():
    assert mean_ci95([0.5]) == (0.5, None)
    assert mean_ci95([0.5, 0.5, 0.5]) == (0.5, (0.5, 0.5))
    assert paired_difference([2.0], [0.5]) == {"mean": 1.5, "ci95": None, "n": 1}
    with pytest.raises(UsageError, match="no values"):
        mean_ci95([])


@given(values, st.floats(-5, 5))
def test_paired_difference_removes_what_seeds_share(sample, shift):
    made = paired_difference([value + shift for value in sample], sample)
    assert made["mean"] == pytest.approx(shift, abs=1e-9)
    assert made["ci95"] == pytest.approx((shift, shift), abs=1e-9)
    assert made["n"] == len(sample)


def test_pairs_need_partners():
    with pytest.raises(UsageError, match="there are 1 and 2"):
        paired_difference([1.0], [1.0, 2.0])


def test_bootstrap():
    sample = numpy.random.default_rng(0).random(400).round().tolist()
    low, high = bootstrap_ci95(sample, seed=1)
    mean, error = numpy.mean(sample), numpy.std(sample) / 20
    assert low == pytest.approx(mean - 1.96 * error, abs=0.01)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.01)
    assert bootstrap_ci95(sample, seed=1) == (low, high)
    assert bootstrap_ci95([1.0, 1.0], seed=0) == (1.0, 1.0)
    with pytest.raises(UsageError, match="no examples"):
        bootstrap_ci95([], seed=0)
