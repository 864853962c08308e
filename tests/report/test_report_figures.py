"""The figures: who looks how, what is drawn where, and colours that can be told apart and read."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from twinweave.report.before_after import before_after
from twinweave.report.canvas import looks
from twinweave.report.curves import learning_curves, mean_curve
from twinweave.report.equal_figure import equal_figure, equal_figure_label
from twinweave.report.frontier import frontier
from twinweave.report.lens import examples
from twinweave.report.palette import DARK, LENS_LEVELS, LIGHT, SENTINEL, SERIES
from twinweave.report.reading import read_study
from twinweave.report.study import family_forgetting
from twinweave.report.svg import figure_style, inline_svg

Builder = Callable[..., dict[str, Any]]


def luminance(colour: str) -> float:
    """Relative luminance as WCAG defines it."""
    channels = np.frombuffer(bytes.fromhex(colour[1:]), dtype=np.uint8) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_text_and_marks_have_contrast(colours: dict[str, str]) -> None:
    for ground in ("paper", "card"):
        assert contrast(colours["ink"], colours[ground]) >= 7
        assert contrast(colours["muted"], colours[ground]) >= 4.5
        assert contrast(colours["accent"], colours[ground]) >= 4.5
        assert all(contrast(colours[f"series-{i}"], colours[ground]) >= 3 for i in range(SERIES))
    assert all(contrast(colours["ink"], colours[f"lens-{level}"]) >= 7 for level in range(LENS_LEVELS))


def test_light_and_dark_have_the_same_names() -> None:
    assert list(LIGHT) == list(DARK) == list(SENTINEL)
    assert len(set(SENTINEL.values())) == len(SENTINEL)


def test_looks_tell_methods_apart(make_results: Builder, make_wide: Builder) -> None:
    styles = looks(read_study(make_results()))
    assert {name for name, look in styles.items() if look.strong} == {"imsm", "imsm_retention", "peft"}
    assert styles["imsm_retention"].series == styles["imsm"].series != styles["peft"].series
    assert styles["imsm_retention"].sweep
    assert not styles["imsm"].sweep
    crowd = looks(read_study(make_wide()))
    assert len(crowd) == 12
    for one, other in [*itertools.combinations(styles.values(), 2), *itertools.combinations(crowd.values(), 2)]:
        assert (one.series, one.marker, one.sweep) != (other.series, other.marker, other.sweep)


def test_frontier_draws_every_point_where_it_belongs(make_results: Builder) -> None:
    study = read_study(make_results())
    with figure_style():
        axes = frontier(study).axes[0]
    drawn = {(round(x, 6), round(y, 6)) for line in axes.lines for x, y in line.get_xydata()}
    for row in study.rows:
        assert (round(100 * row.forgetting, 6), round(100 * row.target, 6)) in drawn
    assert (0.0, 0.0) in drawn
    low, high = axes.get_ylim()
    assert low < high


def test_frontier_of_losses_is_upside_down(make_results: Builder) -> None:
    results = make_results()
    for task in results["tasks"].values():
        task.update(unit="nats", higher_is_better=False)
    with figure_style():
        axes = frontier(read_study(results)).axes[0]
    bottom, top = axes.get_ylim()
    assert bottom > top


def lines_of(axes: Any) -> list[list[tuple[float, float]]]:
    return [[(round(x, 6), round(y, 6)) for x, y in line.get_xydata()] for line in axes.lines]


def test_near_and_far_have_panels_of_their_own(make_wide: Builder) -> None:
    study = read_study(make_wide())
    with figure_style():
        panels = frontier(study).axes
        narrow = frontier(study, width=310).axes
    assert [axes.get_title(loc="left") for axes in panels] == [
        "All retained tasks",
        "Near the target",
        "Far from the target",
    ]
    assert len({axes.get_ylim() for axes in panels}) == 1
    assert len(narrow) == 3
    row = next(row for row in study.rows if row.method == "peft_replay")
    for axes, family in zip(panels[1:], ("near", "far"), strict=True):
        forgetting = family_forgetting(study, row, family)
        assert forgetting is not None
        place = (round(100 * forgetting, 6), round(100 * (row.target or 0), 6))
        assert any(place in line for line in lines_of(axes))


@pytest.mark.parametrize("families", [["near"], ["far"], [None], ["near", None]])
def test_one_family_alone_needs_no_panel(make_wide: Builder, families: list[str | None]) -> None:
    results = make_wide(methods=2)
    kept = [task for task in results["tasks"].values() if task["role"] == "retained"]
    for place, task in enumerate(kept):
        task["family"] = families[place % len(families)]
    with figure_style():
        assert len(frontier(read_study(results)).axes) == 1


def test_a_dial_s_line_starts_at_what_it_dials(make_wide: Builder) -> None:
    study = read_study(make_wide())
    with figure_style():
        lines = lines_of(frontier(study).axes[0])
    expected = [(row.method, *row.setting.values()) for row in study.curve("peft_scaled")]
    assert expected == [("peft_scaled", 0.25), ("peft_scaled", 0.5), ("peft_scaled", 0.75), ("peft",)]
    places = [
        (round(100 * (row.forgetting or 0), 6), round(100 * (row.target or 0), 6)) for row in study.curve("peft_scaled")
    ]
    assert places in lines


@pytest.mark.parametrize("losses", [False, True])
def test_equal_target_draws_every_method_that_gets_there(make_wide: Builder, losses: bool) -> None:
    results = make_wide(losses=losses)
    study = read_study(results)
    with figure_style():
        figure = equal_figure(study)
    assert figure is not None
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts.count("does not reach the target") == 1
    assert {line["label"] for line in results["frontier"]["methods"]} <= set(texts)
    for axes, part in zip(figure.axes, ("all", "near", "far"), strict=True):
        drawn = {round(x, 6) for line in lines_of(axes) for x, _ in line}
        for line in results["frontier"]["methods"]:
            cost = line["equal_target"][part]
            assert cost is None or round(cost["mean"] * (1 if losses else 100), 6) in drawn
    assert "IMSM, 1:1 average target not reached" in equal_figure_label(study)


def test_without_an_equal_target_there_is_no_such_figure(make_results: Builder) -> None:
    assert equal_figure(read_study(make_results())) is None


@pytest.mark.parametrize(("higher", "sign"), [(True, 1), (False, -1)])
def test_worse_is_left_in_before_and_after(make_results: Builder, higher: bool, sign: int) -> None:
    results = make_results()
    results["tasks"]["born_in"]["higher_is_better"] = higher
    study = read_study(results)
    with figure_style():
        figure = before_after(study, study.tasks["born_in"])
    assert figure is not None
    left, right = figure.axes[0].get_xlim()
    assert sign * (right - left) > 0
    assert abs(right - left) >= 10


def test_mean_curve_is_the_mean_where_all_seeds_are_known() -> None:
    steps, mean = mean_curve([[(0, 4.0), (10, 2.0), (20, 1.0)], [(0, 2.0), (20, 1.0)]])
    np.testing.assert_allclose(steps, [0, 10, 20])
    np.testing.assert_allclose(mean, [3.0, 1.75, 1.0])
    steps, _ = mean_curve([[(0, 4.0), (10, 2.0)], [(5, 2.0), (20, 1.0)]])
    np.testing.assert_allclose(steps, [5, 10])
    steps, mean = mean_curve([[(7, 4.0)]])
    np.testing.assert_allclose(mean, [4.0])


def test_learning_curves_share_one_range(make_results: Builder) -> None:
    study = read_study(make_results())
    with figure_style():
        figures = [learning_curves(study, method) for method in ("peft", "imsm")]
    ranges = {figure.axes[0].get_ylim() for figure in figures if figure}
    assert len(ranges) == 1
    assert learning_curves(study, "peft_scaled") is None


def test_two_figures_share_no_id(make_results: Builder) -> None:
    study = read_study(make_results())
    with figure_style():
        one, two = (str(inline_svg(frontier(study), prefix, "words")) for prefix in ("a", "b"))
    assert 'id="a-' in one
    assert 'id="a-' not in two
    assert "xmlns" not in one
    assert two.count("#") == two.count("#b-")


def test_lens_shows_one_method_and_seed_first(make_results: Builder) -> None:
    results = make_results(small=True)
    results["lens"] += [entry | {"seed": 1} for entry in results["lens"]]
    first, others = examples(read_study(results))
    assert [example.role for example in first] == ["target", "near", "far"]
    assert {example.seed for example in first} == {"0"}
    assert [example.seed for example in others] == ["1", "1", "1"]


def test_lens_keeps_text_and_white_space(make_results: Builder) -> None:
    results = make_results()
    tokens = [
        {"text": " Paris", "original_share": 0.83},
        {"text": "\n\n", "original_share": 0.2},
        {"text": "  ", "original_share": 0.5},
        {"text": "é", "original_share": None},
        {"text": "end\n", "original_share": 1.2},
    ]
    results["lens"] = [{"method": "imsm", "seed": 0, "task": "born_in", "prompt": "p", "tokens": tokens}]
    (example,), others = examples(read_study(results))
    assert others == []
    pieces = [(p.space, p.text, p.breaks, p.level) for p in example.pieces]
    assert pieces == [
        (" ", "Paris", "", 8),
        ("", "⏎", "\n\n", 2),
        ("", "␣", "", 5),
        ("", "é", "", 0),
        ("", "end", "\n", 10),
    ]
    assert example.role == "far"
    assert example.mean_share == pytest.approx((0.83 + 0.2 + 0.5 + 1.0) / 4)
