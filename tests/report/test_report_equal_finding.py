"""The finding at equal target: said plainly, and never more than the intervals allow."""

import io
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from twinweave.report import finding, terminal_tables
from twinweave.report.equal_table import level_note
from twinweave.report.reading import read_study
from twinweave.report.units import share

Builder = Callable[..., dict[str, Any]]
Numbers = tuple[float, list[float] | None]


def against(difference: Numbers, ratio: Numbers | None) -> dict[str, Any]:
    return {
        "difference": {"mean": difference[0], "ci95": difference[1], "n": 5},
        "ratio": ratio and {"value": ratio[0], "ci95": ratio[1]},
    }


def results(
    difference: Numbers,
    ratio: Numbers | None,
    best: tuple[float, Numbers] | None = None,
    reached: tuple[float, float] = (1.0, 1.0),
    seeds: int = 5,
    mean: float = 0.004,
) -> dict[str, Any]:
    """LoRA, IMSM and perhaps a third method, with these numbers at equal target."""

    def row(method: str, label: str) -> dict[str, Any]:
        return {
            "method": method,
            "label": label,
            "setting": {},
            "seeds": seeds,
            "target_mean": 1.0,
            "forgetting_mean": 0.1,
        }

    def entry(method: str, cost: dict[str, Any] | None, share: float) -> dict[str, Any]:
        at = {"seeds": seeds, "reached": share, "all": cost, "near": None, "far": None}
        return {"method": method, "label": method, "points": [], "equal_target": at, "area": None}

    def cost(mean: float, reference: Any = None, other: Any = None) -> dict[str, Any]:
        return {"mean": mean, "ci95": None, "n": seeds, "against_reference": reference, "against_best": other}

    other = against(best[1], None) if best else None
    mine = cost(mean, against(difference, ratio), other) if reached[0] else None
    methods = [entry("peft", cost(mean - difference[0]), 1.0), entry("imsm", mine, reached[0])]
    rows = [row("peft", "LoRA"), row("imsm", "IMSM")]
    if best:
        rows.append(row("peft_rehearsal", "LoRA + rehearsal"))
        methods.append(entry("peft_rehearsal", cost(best[0]), reached[1]))
    tasks = {
        "t": {"role": "target", "metric": "exact_match", "unit": "fraction", "higher_is_better": True},
        "k": {"role": "retained", "metric": "exact_match", "unit": "fraction", "higher_is_better": True},
    }
    frontier = {
        "reference": {"method": "peft", "setting": {}},
        "best_baseline": "peft_rehearsal" if best else "peft",
        "tolerance": 0.01,
        "level": 0.99,
        "target": 0.99,
        "methods": methods,
    }
    base = {"scores": {}, "target_score": 0.0}
    return {"schema": 1, "tasks": tasks, "runs": [], "base": base, "summary": rows, "frontier": frontier}


CLEAR: tuple[Numbers, Numbers] = ((-0.094, [-0.106, -0.082]), (0.0408, [0.02, 0.07]))


def test_less_than_both() -> None:
    assert finding(results(*CLEAR, best=(0.011, (-0.007, [-0.009, -0.005])))) == (
        "At LoRA's target IMSM forgets 0.4 points, 4.1 % of LoRA's 9.8 (95% interval 2.0 % to 7.0 %); the best other "
        "method, LoRA + rehearsal, forgets 1.1, which is more (by 0.7, 95% interval 0.5 to 0.9)."
    )


def test_no_difference_from_the_best_other() -> None:
    sentence = finding(results(*CLEAR, best=(0.006, (-0.002, [-0.005, 0.001]))))
    assert sentence.endswith(
        "the best other method, LoRA + rehearsal, forgets 0.6, and no difference from it could be shown "
        "(difference −0.2, 95% interval −0.5 to +0.1)."
    )


def test_more_than_the_best_other() -> None:
    sentence = finding(results(*CLEAR, best=(0.001, (0.003, [0.001, 0.005])), reached=(1.0, 0.6)))
    assert sentence.endswith(
        "LoRA + rehearsal, forgets 0.1 (in the 3 of 5 seeds that reach it), which is less "
        "(by 0.3, 95% interval 0.1 to 0.5)."
    )


def test_no_difference_from_plain_peft() -> None:
    assert finding(results((-0.02, [-0.05, 0.01]), (0.8, [0.5, 1.1]), mean=0.08)) == (
        "At LoRA's target IMSM forgets 8.0 points where LoRA forgets 10.0, and no difference could be shown "
        "(difference −2.0, 95% interval −5.0 to +1.0)."
    )


def test_more_than_plain_peft() -> None:
    sentence = finding(results((0.02, [0.01, 0.03]), (1.2, [1.1, 1.3]), mean=0.12))
    assert sentence == (
        "At LoRA's target IMSM forgets 12.0 points, more than LoRA's 10.0 (difference +2.0, 95% interval +1.0 to +3.0)."
    )


def test_a_ratio_without_bounds_has_the_interval_of_the_difference() -> None:
    sentence = finding(results(CLEAR[0], (0.0408, None)))
    assert "4.1 % of LoRA's 9.8 (difference −9.4, 95% interval −10.6 to −8.2)" in sentence


def test_better_than_the_base() -> None:
    sentence = finding(results((-0.102, [-0.11, -0.09]), (-0.04, [-0.06, -0.02]), mean=-0.004))
    assert sentence.startswith("At LoRA's target IMSM forgets −0.4 points, less than LoRA's 9.8 (difference −10.2")


def test_a_target_that_is_not_reached_is_said_first() -> None:
    assert finding(results(*CLEAR, reached=(0.0, 1.0))) == (
        "IMSM does not reach LoRA's target in any of 5 seeds, so there is no equal target to compare at."
    )
    assert finding(results(*CLEAR, reached=(0.4, 1.0))).startswith(
        "IMSM reaches LoRA's target in 2 of 5 seeds, and there it forgets 0.4 points, 4.1 % of LoRA's 9.8"
    )


def test_one_seed_claims_no_interval() -> None:
    one = results((-0.094, None), (0.0408, None), best=(0.011, (-0.007, None)), seeds=1)
    assert finding(one) == (
        "With one seed, so without an interval: at LoRA's target IMSM forgets 0.4 points, 4.1 % of LoRA's 9.8; "
        "the best other method, LoRA + rehearsal, forgets 1.1."
    )


def test_a_reference_at_another_setting_is_called_tuned(make_wide: Builder) -> None:
    made = make_wide(methods=4)
    made["frontier"]["reference"] = {"method": "peft_rate", "setting": {"rate": 0.3}}
    assert finding(made).startswith("At tuned LoRA's target IMSM forgets")
    assert "(LoRA, other learning rates, rate 0.3)" in level_note(read_study(made))


bounds = st.floats(-0.2, 0.2)


@given(low=bounds, high=bounds)
def test_a_difference_is_claimed_only_where_equality_is_left_out(low: float, high: float) -> None:
    low, high = sorted((low, high))
    sentence = finding(results(((low + high) / 2, [low, high]), None, mean=0.3))
    assert ("no difference could be shown" in sentence) == (low <= 0 <= high)
    assert (", less than" in sentence) == (high < 0)
    assert (", more than" in sentence) == (low > 0)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0408, "4.1 %"), (0.0996, "10 %"), (0.155, "16 %"), (-0.012, "−1.2 %"), (-0.0001, "0.0 %")]
)
def test_shares(value: float, text: str) -> None:
    assert share(value) == text


@pytest.mark.parametrize("losses", [False, True])
def test_the_terminal_leads_with_equal_target(make_wide: Builder, losses: bool) -> None:
    made = json_with_markup(make_wide(losses=losses))
    console = Console(width=130, record=True, file=io.StringIO())
    tables = terminal_tables(made)
    for table in tables:
        console.print(table)
    text = console.export_text()
    assert len(tables) == 2
    assert text.index("At [bold]LoRA[/bold]'s target IMSM forgets") < text.index("scale 0.25")
    assert text.index("IMSM, retention dial") < text.index("LoRA, fewer steps")
    assert "not reached" in text
    assert "0/5" in text
    assert text.count("IMSM forgets") == 1


def json_with_markup(made: dict[str, Any]) -> dict[str, Any]:
    for line in made["summary"]:
        line["label"] = "[bold]LoRA[/bold]" if line["label"] == "LoRA" else line["label"]
    return made


def test_without_equal_target_the_terminal_has_the_summary_alone(make_results: Builder) -> None:
    assert len(terminal_tables(make_results())) == 1
