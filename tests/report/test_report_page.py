"""The page as a whole: one sound, self-contained file with everything from the results in it, in order."""

import copy
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from twinweave.errors import DamagedFileError, UsageError
from twinweave.report import build_report, frontier_png
from twinweave.report.units import share

VOID = {"meta", "br", "hr", "img", "input", "link", "col", "wbr"}
Builder = Callable[..., dict[str, Any]]


class Page(HTMLParser):
    """Checks that tags are balanced and collects text, ids, attributes and section order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without a start"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def render(results: dict[str, Any] | list[dict[str, Any]], folder: Path) -> tuple[str, Page]:
    path = build_report(results if isinstance(results, list) else [results], folder / "report.html")
    html = path.read_text(encoding="utf-8")
    assert not re.search(r"\b(nan|NaN|inf|Infinity|Undefined|None)\b", html)
    page = Page(html)
    assert len(page.ids) == len(set(page.ids)), "ids must be unique"
    references = re.findall(r'(?:href="|url\()#([^")]+)', html)
    assert set(references) <= set(page.ids)
    return html, page


def without(results: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in results.items() if name not in names}


def as_losses(results: dict[str, Any]) -> dict[str, Any]:
    """The same results, measured as losses in nats."""
    results = json.loads(json.dumps(results).replace('"exact_match"', '"loss"'))
    for task in results["tasks"].values():
        task.update(unit="nats", higher_is_better=False)
    return results


def test_page_is_self_contained(make_results: Builder, tmp_path: Path) -> None:
    html, page = render(make_results(small=True), tmp_path)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert not re.search(r"https?://|@import|src=|url\((?!#)", html)
    assert not [value for _, name, value in page.attributes if name.startswith("on") or "javascript:" in value]


def test_sections_are_in_order(make_results: Builder, tmp_path: Path) -> None:
    _, page = render(make_results(), tmp_path)
    sections = [identity for identity in page.ids if re.fullmatch(r"r1-[a-z]+", identity)]
    names = ["finding", "frontier", "table", "retained", "curves", "lens", "settings"]
    assert sections == [f"r1-{name}" for name in names]


def test_everything_in_the_results_is_on_the_page(make_results: Builder, tmp_path: Path) -> None:
    results = make_results()
    html, page = render(results, tmp_path)
    for name, task in results["tasks"].items():
        assert name in page.text
        assert task["description"] in page.text
    for row in results["summary"]:
        assert row["label"] in page.text
        assert f"{100 * row['forgetting_mean']:.1f}" in page.text
        low, high = (100 * bound for bound in row["target_ci95"])
        assert f"{low:.1f} to {high:.1f}" in page.text
    for run in results["runs"]:
        assert f"{100 * run['target_score']:.1f}" in page.text
        assert f"{100 * run['target']['reverse_words']['token_f1']:.1f}" in page.text
        for scores in run["retained"].values():
            assert f"{100 * scores['exact_match']:.1f}" in page.text
    for example in results["lens"]:
        assert example["prompt"] in page.text
        for token in example["tokens"]:
            assert f"{round(100 * token['original_share'])} % from the original memory" in html
    for version in results["provenance"]["versions"].values():
        assert version in page.text
    for key in ("command", "device", "date"):
        assert results["provenance"][key] in page.text
    assert results["base"]["fingerprint"] in page.text
    assert "gate_learning_rate: 0.01" in page.text
    assert "167 936" in page.text.replace("\u202f", " ")


def test_every_figure_says_what_it_shows(make_results: Builder, tmp_path: Path) -> None:
    _, page = render(make_results(), tmp_path)
    labels = [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"]
    # two frontiers (wide and narrow), six retained tasks, four learning curves
    assert len(labels) == 2 + 6 + 4
    assert all(len(label) > 30 for label in labels)
    assert any("LoRA: target score 98." in label for label in labels)


@pytest.mark.parametrize("losses", [False, True])
def test_the_page_leads_with_the_frontier(make_wide: Builder, tmp_path: Path, losses: bool) -> None:
    results = make_wide(losses=losses)
    _, page = render(results, tmp_path)
    sentence = "At LoRA's target IMSM forgets"
    assert page.text.index(sentence) < page.text.index("Near the target") < page.text.index("The table")
    assert page.text.count("Far from the target") >= 3  # in both figures of the frontier, and at equal target
    labels = [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"]
    assert [label for label in labels if label.startswith("Forgetting at LoRA's target: IMSM, retention dial")]
    for line in results["frontier"]["methods"]:
        for part in ("all", "near", "far"):
            if cost := line["equal_target"][part]:
                low, high = (f"{bound if losses else 100 * bound:.{3 if losses else 1}f}" for bound in cost["ci95"])
                assert f"{low} to {high}" in page.text
                if ratio := cost["against_reference"] and cost["against_reference"]["ratio"]:
                    assert share(ratio["value"]) in page.text
    within = "to within 0.020 nats" if losses else "to within 1.0 points"
    assert within in page.text


@pytest.mark.parametrize(
    "hostile", ["<script>alert(1)</script>", '"><img src=x onerror=y>', "$x_{2}$ & ]]> --> {{ 7*7 }}"]
)
def test_hostile_labels_stay_text_at_equal_target(make_wide: Builder, tmp_path: Path, hostile: str) -> None:
    results = json.loads(json.dumps(make_wide(seeds=2)).replace('"LoRA + rehearsal"', json.dumps(hostile)))
    results["summary"][0]["label"] = hostile
    _, page = render(results, tmp_path)
    assert not {"script", "img"} & set(page.tags)
    assert page.text.count(hostile) > 5
    assert f"At {hostile}'s target IMSM forgets" in page.text


@pytest.mark.parametrize("damage", [{"methods": None}, {"methods": [{"method": "imsm"}]}, {"reference": None}, None])
def test_a_frontier_with_less_in_it(make_wide: Builder, tmp_path: Path, damage: dict[str, Any] | None) -> None:
    results = make_wide(methods=3)
    results["frontier"] = None if damage is None else results["frontier"] | damage
    _, page = render(results, tmp_path)
    assert "IMSM" in page.text


def test_one_seed_at_equal_target(make_wide: Builder, tmp_path: Path) -> None:
    _, page = render(make_wide(seeds=1), tmp_path)
    assert "With one seed, so without an interval: at LoRA's target IMSM forgets" in page.text
    assert "95% interval" not in page.text


def test_colours_follow_the_page(make_results: Builder, tmp_path: Path) -> None:
    html, _ = render(make_results(small=True), tmp_path)
    figures = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert "var(--series-0)" in figures
    assert not re.search(r"#[0-9a-f]{6}\b(?!-)", re.sub(r'(id|href)="[^"]*"|url\([^)]*\)', "", figures))
    assert "<style" not in figures
    used, defined = set(re.findall(r"var\((--[a-z0-9-]+)", html)), set(re.findall(r"(--[a-z0-9-]+):", html))
    assert used <= defined


@pytest.mark.parametrize(
    "hostile", ["<script>alert(1)</script>", '"><img src=x onerror=y>', "$x_{2}$ & ]]> --> {{ 7*7 }}"]
)
def test_hostile_names_stay_text(make_results: Builder, tmp_path: Path, hostile: str) -> None:
    text = json.dumps(make_results(seeds=2, small=True))
    text = text.replace('"born_in"', json.dumps(hostile)).replace('"IMSM"', json.dumps(hostile))
    results = json.loads(text)
    results["name"] = hostile
    results["provenance"]["versions"][hostile] = hostile
    results["recipe"][hostile] = hostile
    results["lens"][0] |= {"prompt": hostile, "tokens": [{"text": hostile, "original_share": 0.5}]}
    _, page = render(results, tmp_path)
    assert not {"script", "img"} & set(page.tags)
    assert page.text.count(hostile) > 5
    assert "49" not in re.findall(r"\]\]> --> (\S+)", page.text)


def test_characters_no_page_can_hold(make_results: Builder, tmp_path: Path) -> None:
    results = make_results(seeds=1, small=True)
    results["summary"][0]["label"] = "Lo\x00RA\ud800 日本"
    results["lens"][0]["tokens"][0]["text"] = "\x1b\udfff"
    results["recipe"]["path"] = Path("runs")
    _, page = render(results, tmp_path)
    assert "Lo\ufffdRA\ufffd 日本" in page.text


def test_markup_in_labels_of_figures_is_escaped_once(make_results: Builder, tmp_path: Path) -> None:
    results = json.loads(json.dumps(make_results(seeds=1, small=True)).replace('"LoRA"', '"A & <b>B</b>"'))
    html, page = render(results, tmp_path)
    assert "b" not in page.tags
    assert "&amp;amp;" not in html
    assert "A & <b>B</b>" in page.text


@pytest.mark.parametrize(
    "part", ["lens", "comparisons", "summary", "recipe", "provenance", "base", "tasks", "name", "runs"]
)
def test_any_one_part_may_be_missing(make_results: Builder, tmp_path: Path, part: str) -> None:
    _, page = render(without(make_results(small=True), part), tmp_path)
    assert "LoRA" in page.text or part == "summary"
    assert ("r1-lens" in page.ids) == (part != "lens")


def test_one_seed_without_sweeps(make_results: Builder, tmp_path: Path) -> None:
    _, page = render(make_results(seeds=1, sweeps=False, lens=False, small=True), tmp_path)
    assert "With one seed, so without an interval" in page.text
    assert "IMSM, dial" not in page.text
    assert "95% interval" not in page.text
    assert "single seeds" not in page.text


def test_training_run_without_retained_tasks(make_results: Builder, tmp_path: Path) -> None:
    results = make_results(seeds=1, sweeps=False, lens=False, small=True)
    run = results["runs"][1]
    run |= {"retained": {}, "retained_score": None, "forgetting": None}
    run.pop("setting")
    train = {
        "schema": 1,
        "base": {"name": "pocket", "scores": {}},
        "runs": [run],
        "tasks": {"reverse_words": results["tasks"]["reverse_words"]},
    }
    _, page = render(train, tmp_path)
    assert "no retained task was measured" in page.text.lower()
    assert "Learning curves" in page.text


def test_losses_are_in_nats(make_results: Builder, tmp_path: Path) -> None:
    results = as_losses(make_results())
    _, page = render(results, tmp_path)
    assert f"{results['summary'][0]['target_mean']:.3f}" in page.text
    assert "lower is better" in page.text
    assert "Target loss (nats, lower is up)" in page.text


def test_mixed_units_are_said(make_results: Builder, tmp_path: Path) -> None:
    results = make_results(small=True)
    results["tasks"]["born_in"] |= {"unit": "nats", "higher_is_better": False}
    _, page = render(results, tmp_path)
    assert "mixed units" in page.text


def test_negative_forgetting_has_a_minus_sign(make_results: Builder, tmp_path: Path) -> None:
    results = make_results(small=True)
    results["summary"][0] |= {"forgetting_mean": -0.0213, "forgetting_ci95": [-0.03, -0.01]}
    _, page = render(results, tmp_path)
    assert "−2.1" in page.text
    assert "−3.0 to −1.0" in page.text


def test_values_that_are_no_numbers_become_dashes(make_results: Builder, tmp_path: Path) -> None:
    results = make_results(small=True)
    results["summary"][1] |= {"target_mean": float("nan"), "target_ci95": [float("nan"), 1.0]}
    results["runs"][0] |= {"tokens_per_second": float("inf"), "forgetting": None}
    results["runs"][0]["curve"]["train"][3][1] = float("nan")
    results["lens"][0]["tokens"][0]["original_share"] = None
    results["lens"][0]["tokens"][1]["original_share"] = 1.7
    render(results, tmp_path)


def test_methods_nobody_knows_yet(make_results: Builder, tmp_path: Path) -> None:
    results = make_results(small=True)
    for place in range(12):
        row = copy.deepcopy(results["summary"][0])
        results["summary"].append(
            row | {"method": f"new_{place}", "label": f"New {place}", "forgetting_mean": place / 20}
        )
    _, page = render(results, tmp_path)
    assert all(f"New {place}" in page.text for place in range(12))


def test_several_results_share_a_table_of_findings(make_results: Builder, tmp_path: Path) -> None:
    first, second = make_results(small=True), as_losses(make_results(seeds=1, small=True))
    second["name"] = "second"
    _, page = render([first, second], tmp_path)
    assert [i for i in page.ids if re.fullmatch(r"r\d", i)] == ["r1", "r2"]
    assert page.text.index("IMSM forgets") < page.text.index("With one seed") < page.text.index("The table")


def test_output_is_deterministic(make_results: Builder, tmp_path: Path) -> None:
    one = build_report([make_results(small=True)], tmp_path / "a" / "one.html").read_bytes()
    two = build_report([make_results(small=True)], tmp_path / "two.html").read_bytes()
    assert one == two
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["one.html"]


def test_results_are_left_as_they_were(make_results: Builder, tmp_path: Path) -> None:
    results = make_results(small=True)
    build_report([results], tmp_path / "report.html")
    assert results == make_results(small=True)


def test_readme_picture(make_results: Builder, tmp_path: Path) -> None:
    path = frontier_png(make_results(small=True), tmp_path / "docs" / "frontier.png")
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(data[16:20], "big") == 1400
    assert data == frontier_png(make_results(small=True), tmp_path / "again.png").read_bytes()
    assert [p.name for p in path.parent.iterdir()] == ["frontier.png"]


def test_bad_input_is_our_own_error_and_writes_nothing(make_results: Builder, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    with pytest.raises(UsageError, match="at least one run"):
        build_report([], path)
    with pytest.raises(UsageError, match=r"report\.html"):
        build_report([make_results(small=True)], tmp_path)
    with pytest.raises(DamagedFileError, match="schema 2"):
        build_report([make_results(small=True) | {"schema": 2}], path)
    with pytest.raises(DamagedFileError, match="no finished run"):
        build_report([{"schema": 1, "runs": []}], path)
    with pytest.raises(DamagedFileError, match="object"):
        build_report([[1, 2]], path)  # type: ignore[list-item]
    broken = make_results(small=True)
    del broken["summary"][0]["method"]
    with pytest.raises(DamagedFileError, match="method"):
        build_report([broken], path)
    assert not path.exists()
