"""The part "frontier" of results.json, from hand-made cells: what makes a curve, and what is compared with what."""

from types import SimpleNamespace

import pytest
from scipy import stats

from twinweave.compare.frontier import forgetting_by_family, frontier
from twinweave.evaluation import Task


def task(name, family=None, kind="completion_loss", metric="exact_match"):
    kind = "text_loss" if metric == "loss" else "generation"
    return Task(name=name, kind=kind, metrics=[metric], data="unused.jsonl", family=family)


def recipe(retained=None, metric="exact_match"):
    known = [task("copy", "near"), task("pick", "near"), task("facts", "far"), task("rest")]
    return SimpleNamespace(
        target=task("reverse", metric=metric), retained=known if retained is None else retained, peft_type="lora"
    )


BASE = {
    "scores": {"reverse": {"exact_match": 0.0}, **{n: {"exact_match": 1.0} for n in ("copy", "pick", "facts", "rest")}},
    "target_score": 0.0,
}
NOISE = (0.0, 0.01, -0.01, 0.02)


def cell(method, target, near, far, seed=0, **setting):
    """`near` and `far` are what is forgotten of each family; the task without a family forgets nothing."""
    scores = {"copy": 1 - near, "pick": 1 - near, "facts": 1 - far, "rest": 1.0}
    return {
        "method": method,
        "seed": seed,
        "setting": {key: float(value) for key, value in setting.items()},
        "target_score": target,
        "retained": {name: {"exact_match": score} for name, score in scores.items()},
        "forgetting": (2 * near + far) / 4,
    }


def seeds(method, target, near, far, n=4, **setting):
    return [cell(method, target, near * (1 + 5 * NOISE[s]), far + NOISE[s] / 2, s, **setting) for s in range(n)]


def assembled(cells, of=None, base=BASE):
    of = of or recipe()
    return frontier(of, base, [c | {"forgetting_by_family": forgetting_by_family(of, base, c)} for c in cells])


def entry(found, method):
    return next(line for line in found["methods"] if line["method"] == method)


def test_families_by_hand():
    found = forgetting_by_family(recipe(), BASE, cell("peft", 1.0, 0.3, 0.1))
    assert found == {"near": pytest.approx(0.3), "far": pytest.approx(0.1)}
    assert forgetting_by_family(recipe([task("rest")]), BASE, cell("peft", 1.0, 0.3, 0.1)) == {
        "near": None,
        "far": None,
    }


def test_a_loss_that_rises_is_forgotten():
    of = recipe([task("wiki", "far", metric="loss")])
    base = {"scores": {"wiki": {"loss": 3.0}}}
    assert forgetting_by_family(of, base, {"retained": {"wiki": {"loss": 3.25}}}) == {"near": None, "far": 0.25}


def test_equal_target_by_hand():
    found = assembled(
        [cell("peft", 1.0, 0.4, 0.2), cell("imsm", 0.995, 0.04, 0.0), cell("peft_rehearsal", 0.5, 0.1, 0.0)]
    )
    assert found["reference"] == {"method": "peft", "setting": {}}
    assert (found["tolerance"], found["level"], found["target"]) == (0.01, pytest.approx(0.99), pytest.approx(0.99))
    plain, imsm, short = (entry(found, name)["equal_target"] for name in ("peft", "imsm", "peft_rehearsal"))
    share = 0.99 / 0.995  # the rest of the queries is answered by the base
    assert imsm["reached"] == 1.0
    assert imsm["all"]["mean"] == pytest.approx(share * 0.02)
    assert imsm["near"]["mean"] == pytest.approx(share * 0.04)
    assert imsm["far"]["mean"] == 0.0
    against = imsm["all"]["against_reference"]
    assert against["difference"]["mean"] == pytest.approx(share * 0.02 - 0.99 * 0.25)
    assert against["difference"]["ci95"] is None
    assert against["ratio"] == {"value": pytest.approx(share * 0.02 / (0.99 * 0.25)), "ci95": None}
    assert plain["all"]["mean"] == pytest.approx(0.99 * 0.25)
    assert plain["all"]["against_reference"] is None
    assert short == {"seeds": 1, "reached": 0.0, "all": None, "near": None, "far": None}
    assert found["best_baseline"] == "peft"
    assert entry(found, "imsm")["area"]["all"]["mean"] == pytest.approx(share * 0.02 / 2)


def test_curves_of_dials_and_of_other_rates_hold_what_they_start_from():
    cells = [
        cell("peft", 1.0, 0.4, 0.2),
        cell("peft_scaled", 0.8, 0.1, 0.0, scale=0.5),
        cell("peft_rate", 0.9, 0.1, 0.0, rate=0.3),
        cell("peft_rehearsal", 1.0, 0.1, 0.0, rehearsal_weight=1),
        cell("imsm", 1.0, 0.1, 0.0),
        cell("imsm_retention", 0.9, 0.0, 0.0, retention=2),
    ]
    found = assembled(cells)
    points = {
        line["method"]: [(p["method"], *p["setting"].values()) for p in line["points"]] for line in found["methods"]
    }
    assert points == {
        "peft": [("peft",)],
        "peft_scaled": [("peft_scaled", 0.5), ("peft",)],
        "peft_rate": [("peft_rate", 0.3), ("peft",)],
        "peft_rehearsal": [("peft_rehearsal", 1.0)],
        "imsm": [("imsm",)],
        "imsm_retention": [("imsm_retention", 2.0), ("imsm",)],
    }
    rate = entry(found, "peft_rate")["equal_target"]["all"]["mean"]
    assert rate == pytest.approx(0.05 + 0.9 * (0.25 - 0.05))
    assert found["best_baseline"] == "peft_rehearsal"
    assert entry(found, "imsm_retention")["points"][0]["forgetting_by_family"] == {"near": 0.0, "far": 0.0}


def test_near_and_far_are_of_one_system():
    """The setting that keeps the near tasks and the one that keeps the far ones do not count together."""
    cells = [
        cell("peft", 0.8, 0.5, 0.5),
        cell("peft_rehearsal", 0.8, 0.0, 0.5, rehearsal_weight=1),
        cell("peft_rehearsal", 0.8, 0.5, 0.0, rehearsal_weight=4),
    ]
    found = entry(assembled(cells), "peft_rehearsal")["equal_target"]
    assert found["near"]["mean"] == 0.0
    assert found["far"]["mean"] == pytest.approx(0.5 * 0.79 / 0.8)


def test_the_reference_is_plain_peft_at_its_best_mean_target():
    cells = [
        *seeds("peft", 0.90, 0.4, 0.2),
        *seeds("peft_rate", 0.95, 0.3, 0.1, rate=0.3),
        *seeds("peft_rate", 0.95, 0.2, 0.1, rate=0.5),
    ]
    cells[0]["target_score"] = 0.99  # best in one seed, not in the mean
    found = assembled(cells)
    assert found["reference"] == {"method": "peft_rate", "setting": {"rate": 0.5}}
    assert found["level"] == pytest.approx(0.94)
    assert entry(found, "peft")["equal_target"]["reached"] == 0.25


def test_intervals_are_paired_over_seeds():
    found = assembled(seeds("peft", 1.0, 0.4, 0.2) + seeds("imsm", 1.0, 0.04, 0.01))
    both = entry(found, "imsm")["equal_target"]["all"]
    mine = [0.99 * c["forgetting"] for c in seeds("imsm", 1.0, 0.04, 0.01)]
    theirs = [0.99 * c["forgetting"] for c in seeds("peft", 1.0, 0.4, 0.2)]
    expected = stats.ttest_rel(mine, theirs).confidence_interval(0.95)
    assert both["against_reference"]["difference"]["ci95"] == pytest.approx((expected.low, expected.high))
    low, high = both["against_reference"]["ratio"]["ci95"]
    assert low < sum(mine) / sum(theirs) < high < 0.2
    assert both["against_best"] == both["against_reference"]  # plain PEFT is the best of the others here
    assert both["ci95"] == pytest.approx(stats.t.interval(0.95, 3, sum(mine) / 4, stats.sem(mine)))


def test_losses_gain_by_falling_and_their_tolerance_is_a_share_of_the_gain():
    def lossy(method, loss, forgetting, **setting):
        return cell(method, loss, 2 * forgetting, 0.0, **setting)

    found = assembled(
        [lossy("peft", 3.0, 0.2), lossy("peft_scaled", 3.5, 0.02, scale=0.5), lossy("imsm", 2.9, 0.01)],
        recipe(metric="loss"),
        BASE | {"target_score": 4.0},
    )
    assert (found["tolerance"], found["level"], found["target"]) == tuple(map(pytest.approx, (0.02, 0.98, 3.02)))
    assert entry(found, "peft")["equal_target"]["all"]["mean"] == pytest.approx(0.98 * 0.2)
    assert entry(found, "imsm")["equal_target"]["all"]["mean"] == pytest.approx(0.98 * 0.01 / 1.1)
    scaled = entry(found, "peft_scaled")
    assert [p["gain_mean"] for p in scaled["points"]] == [0.5, 1.0]
    end = 0.02 + 0.96 * 0.18
    assert scaled["equal_target"]["all"]["mean"] == pytest.approx(end)
    assert scaled["area"]["all"]["mean"] == pytest.approx((0.5 * 0.01 + 0.48 * (0.02 + end) / 2) / 0.98)


def test_a_family_without_tasks_is_none():
    of = recipe([task("facts", "far"), task("rest")])
    found = entry(assembled([cell("peft", 1.0, 0.0, 0.2), cell("imsm", 1.0, 0.0, 0.0)], of), "imsm")
    assert found["equal_target"]["near"] is None
    assert found["equal_target"]["far"]["mean"] == 0.0
    assert found["points"][0]["forgetting_by_family"] == {"near": None, "far": 0.0}


def test_without_plain_peft_or_without_a_gain_there_is_no_equal_target():
    alone = assembled([cell("imsm", 1.0, 0.0, 0.1)])
    assert (alone["reference"], alone["level"], alone["target"], alone["best_baseline"]) == (None, None, None, None)
    assert entry(alone, "imsm")["equal_target"] is None
    nothing = assembled([cell("peft", 0.005, 0.1, 0.1), cell("imsm", 1.0, 0.0, 0.1)])
    assert nothing["level"] == pytest.approx(-0.005)
    assert entry(nothing, "imsm")["equal_target"] is None


def test_nothing_retained_is_no_frontier():
    assert frontier(recipe([]), BASE, []) is None


def test_reaching_the_target_ranks_before_forgetting_little():
    lucky = seeds("peft_replay", 0.5, 0.0, 0.0, replay_weight=1)
    lucky[0]["target_score"] = 1.0
    found = assembled(seeds("peft", 1.0, 0.4, 0.2) + lucky + seeds("peft_rehearsal", 1.0, 0.2, 0.1, rehearsal_weight=1))
    assert found["best_baseline"] == "peft_rehearsal"
    assert entry(found, "peft_replay")["equal_target"]["all"]["n"] == 1


def test_only_plain_peft_at_other_rates_and_steps_is_plain_peft():
    from twinweave.compare.frontier import _is_plain
    from twinweave.methods import METHODS

    trained = [name for name, method in METHODS.items() if method.build]
    assert [name for name in trained if _is_plain(name)] == ["peft", "peft_rate", "peft_steps"]
