"""The finding says what the numbers allow, and no more."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from twinweave.report import finding, terminal_tables
from twinweave.report.units import count, interval, number, quantity, setting_text

Builder = Callable[..., dict[str, Any]]


def compared(
    forgetting: tuple[float, list[float] | None], target: tuple[float, list[float] | None], seeds: int = 3
) -> dict[str, Any]:
    """Results with one comparison of IMSM and LoRA."""

    def row(method: str, label: str, score: float, lost: float) -> dict[str, Any]:
        return {
            "method": method,
            "label": label,
            "setting": {},
            "seeds": seeds,
            "target_mean": score,
            "forgetting_mean": lost,
        }

    tasks = {
        "t": {"role": "target", "metric": "exact_match", "unit": "fraction", "higher_is_better": True},
        "k": {"role": "retained", "metric": "exact_match", "unit": "fraction", "higher_is_better": True},
    }
    return {
        "schema": 1,
        "name": "x",
        "tasks": tasks,
        "runs": [],
        "base": {"scores": {}, "target_score": 0.0},
        "summary": [row("peft", "LoRA", 0.99, 0.469), row("imsm", "IMSM", 0.99 + target[0], 0.469 + forgetting[0])],
        "comparisons": [
            {
                "method": "imsm",
                "against": "peft",
                "seeds": seeds,
                "forgetting_difference": {"mean": forgetting[0], "ci95": forgetting[1]},
                "target_difference": {"mean": target[0], "ci95": target[1]},
            }
        ],
    }


def test_better_on_one_and_not_shown_on_the_other() -> None:
    assert finding(compared((-0.321, [-0.362, -0.280]), (0.002, [-0.006, 0.010]))) == (
        "IMSM forgets 32.1 points less than LoRA (95% interval 28.0 to 36.2, 3 seeds; forgetting 14.8 against 46.9), "
        "and no difference in the target score could be shown (+0.2 points, 95% interval −0.6 to +1.0)."
    )


def test_better_and_worse_are_joined_by_but() -> None:
    sentence = finding(compared((-0.321, [-0.362, -0.280]), (-0.03, [-0.04, -0.02])))
    assert ", but it has a target score 3.0 points lower (95% interval 2.0 to 4.0)." in sentence


def test_worse() -> None:
    sentence = finding(compared((0.1, [0.05, 0.15]), (-0.03, [-0.04, -0.02])))
    assert sentence.startswith("IMSM forgets 10.0 points more than LoRA (95% interval 5.0 to 15.0")
    assert ", and it has a target score 3.0 points lower" in sentence


def test_nothing_shown() -> None:
    sentence = finding(compared((-0.012, [-0.030, 0.006]), (0.0, [0.0, 0.0])))
    assert sentence.startswith(
        "No difference in forgetting could be shown between IMSM and LoRA (−1.2 points, 95% interval −3.0 to +0.6, "
    )
    assert "less" not in sentence
    assert "no difference in the target score could be shown" in sentence


def test_one_seed_has_no_interval() -> None:
    sentence = finding(compared((-0.321, None), (0.004, None), seeds=1))
    assert sentence == (
        "With one seed, so without an interval: IMSM forgets 32.1 points less than LoRA "
        "(forgetting 14.8 against 46.9), and it has a target score 0.4 points higher."
    )


def test_lower_loss_is_better() -> None:
    results = compared((-0.120, [-0.13, -0.11]), (-0.078, [-0.09, -0.07]))
    for task in results["tasks"].values():
        task.update(metric="loss", unit="nats", higher_is_better=False)
    sentence = finding(results)
    assert "forgets 0.120 nats less" in sentence
    assert ", and it has a target loss 0.078 nats lower (95% interval 0.070 to 0.090)." in sentence


def test_without_retained_tasks() -> None:
    results = compared((0.0, None), (0.02, [0.01, 0.03]))
    results["comparisons"][0]["forgetting_difference"] = {"mean": None, "ci95": None}
    del results["tasks"]["k"]
    assert finding(results) == (
        "IMSM has a target score 2.0 points higher than LoRA (95% interval 1.0 to 3.0); "
        "no retained task was measured, so nothing can be said about forgetting."
    )


def test_one_method_alone() -> None:
    results = compared((0.0, None), (0.0, None), seeds=1)
    results["comparisons"], results["summary"] = [], results["summary"][:1]
    assert finding(results) == (
        "LoRA took the target score from 0.0 to 99.0 points, and its forgetting is 46.9 points "
        "(one seed, so no interval)."
    )


def test_mixed_units_are_said_once() -> None:
    results = compared((-0.015, [-0.103, 0.074]), (0.02, [0.01, 0.03]))
    results["tasks"]["wiki"] = {"role": "retained", "metric": "loss", "unit": "nats", "higher_is_better": False}
    assert finding(results).startswith(
        "No difference in forgetting could be shown between IMSM and LoRA (−0.015, 95% interval −0.103 to +0.074, "
        "3 seeds; forgetting 0.454 against 0.469, in mixed units), "
    )


def test_a_method_as_it_is_leads_before_its_sweep() -> None:
    results = compared((-0.321, [-0.362, -0.280]), (0.0, [-0.1, 0.1]))
    plain = results["comparisons"][0]
    swept = plain | {"method": "imsm_retention", "setting": {"retention": 2.0}}
    results["comparisons"] = [swept, plain | {"method": "imsm_gate", "setting": {}}]
    assert finding(results).startswith("Imsm_gate forgets")
    results["comparisons"] = [swept]
    assert finding(results).startswith("Imsm_retention at retention 2 forgets 32.1 points less than LoRA")


def test_forgetting_of_no_tasks_is_not_a_finding() -> None:
    results = compared((0.0, [0.0, 0.0]), (0.02, [0.01, 0.03]))
    del results["tasks"]["k"]
    assert "nothing can be said about forgetting" in finding(results)


def test_methods_without_a_comparison_claim_nothing() -> None:
    results = compared((0.0, None), (0.0, None))
    results["comparisons"] = []
    assert "no difference is claimed" in finding(results)


def test_imsm_against_plain_peft_leads() -> None:
    results = compared((-0.321, [-0.362, -0.280]), (0.0, [-0.1, 0.1]))
    other = results["comparisons"][0] | {"method": "replay"}
    results["comparisons"].insert(0, other)
    assert finding(results).startswith("IMSM forgets")
    results["comparisons"].pop()
    assert finding(results).startswith("Replay forgets")


bounds = st.floats(-1, 1, allow_nan=False)


@given(low=bounds, high=bounds, seeds=st.integers(2, 9))
def test_a_difference_is_claimed_only_outside_zero(low: float, high: float, seeds: int) -> None:
    low, high = sorted((low, high))
    sentence = finding(compared(((low + high) / 2, [low, high]), (0.0, [-0.1, 0.1]), seeds))
    claimed = " less than " in sentence or " more than " in sentence
    assert claimed == (low > 0 or high < 0)
    assert "nan" not in sentence


@pytest.mark.parametrize(
    ("value", "unit", "signed", "text"),
    [
        (0.469, "fraction", False, "46.9"),
        (-0.0213, "fraction", False, "−2.1"),
        (-0.0001, "fraction", True, "0.0"),
        (0.0049, "fraction", True, "+0.5"),
        (0.1484, "nats", False, "0.148"),
        (None, "nats", False, "–"),
    ],
)
def test_numbers(value: float | None, unit: str, signed: bool, text: str) -> None:
    assert number(value, unit, signed) == text


def test_units_go_with_numbers() -> None:
    assert quantity(0.469, "fraction") == "46.9 points"
    assert quantity(0.148, "nats") == "0.148 nats"
    assert quantity(0.2, "mixed") == "0.200 in mixed units"
    assert interval([0.1, 0.2], "fraction") == "10.0 to 20.0"
    assert setting_text({"retention": -1.0}) == "retention −1"
    assert count(1234567) == "1\u202f234\u202f567"


def test_terminal_table_shows_every_row_and_the_finding(make_results: Builder) -> None:
    results = make_results()
    results["summary"][0]["label"] = "[bold]LoRA[/bold]"
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(*terminal_tables(results))
    text = console.export_text()
    assert "[bold]LoRA[/bold]" in text
    assert "IMSM, dial, retention 2" in text
    assert "95.9 to 100.3" in text
    assert "IMSM forgets" in text
    assert "base" in text
