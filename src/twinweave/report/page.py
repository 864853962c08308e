"""One self-contained HTML file from one or several results: the finding first, where it came from last.

Draws nothing and computes nothing itself; it puts the parts into the template. No script, no outside address.
"""

import json
import os
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from twinweave.errors import UsageError
from twinweave.files import write_text_atomic

from . import html_tables, lens
from .before_after import before_after, before_after_label
from .canvas import looks
from .curves import learning_curves, learning_curves_label
from .equal_figure import equal_figure, equal_figure_label
from .equal_table import equal_target, level_note
from .finding import study_finding
from .frontier import WIDTH, frontier, frontier_label, has_frontier
from .html_tables import FAMILY_NAMES, HtmlTable
from .palette import DARK, LENS_LEVELS, LIGHT, css_variables
from .reading import read_study
from .study import FAMILIES, Study, Task, base_score
from .svg import figure_style, inline_svg
from .units import number, unit_word

PHONE_WIDTH = 310


@dataclass(frozen=True)
class Panel:
    """A small figure with its heading."""

    title: str
    note: str
    start: str
    svg: Markup


@dataclass(frozen=True)
class Section:
    """All parts of one study, ready for the template."""

    id: str
    study: Study
    finding: str
    facts: list[str]
    summary: HtmlTable
    differences: HtmlTable | None
    cost: HtmlTable | None
    frontier: list[Markup]
    equal_figure: Markup | None
    equal_target: HtmlTable | None
    level_note: str
    keys: list[tuple[Markup, str]]
    families: list[tuple[str, list[Panel]]]
    retained: HtmlTable | None
    curves: list[Panel]
    lens: tuple[list[lens.Example], list[lens.Example]]
    tasks: HtmlTable | None
    runs: HtmlTable | None
    recipe: str
    provenance: list[tuple[str, str]]
    versions: list[tuple[str, str]]


def build_report(results: list[dict[str, Any]], path: str | os.PathLike[str]) -> Path:
    """Write the report on one or several `results.json` contents to the HTML file `path`, and return its path.

    Several results get one section each, below a common table of their findings. The file needs nothing but
    itself; the same results give the same bytes.

    Raises:
        UsageError: no results, or `path` is a folder.
        DamagedFileError: one of them is not the contents of a `results.json`.
    """
    path = Path(path)
    if not results:
        raise UsageError("No results to report on; name at least one run directory.")
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name the file to write, for example {path / 'report.html'}.")
    studies = [read_study(result) for result in results]
    sections = [_section(study, f"r{place}") for place, study in enumerate(studies, start=1)]
    write_text_atomic(path, _render(sections))
    return path


def _render(sections: list[Section]) -> str:
    package = files(__package__)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(package.joinpath("template.html.j2").read_text(encoding="utf-8"))
    style = package.joinpath("style.css").read_text(encoding="utf-8")
    return template.render(
        sections=sections,
        style=Markup(style),
        light=Markup(css_variables(LIGHT)),
        dark=Markup(css_variables(DARK)),
        lens_levels=range(LENS_LEVELS),
    )


def _section(study: Study, prefix: str) -> Section:
    styles = looks(study)
    return Section(
        id=prefix,
        study=study,
        finding=study_finding(study),
        facts=_facts(study),
        summary=html_tables.summary(study),
        differences=html_tables.differences(study),
        cost=html_tables.cost(study),
        frontier=_frontier(study, prefix),
        equal_figure=_equal_figure(study, prefix),
        equal_target=equal_target(study),
        level_note=level_note(study),
        keys=[
            (html_tables.key(styles[method]), study.label(method))
            for method in sorted(study.methods(), key=lambda method: not styles[method].strong)
        ],
        families=_families(study, prefix),
        retained=html_tables.retained(study),
        curves=_curves(study, prefix),
        lens=lens.examples(study),
        tasks=html_tables.tasks(study),
        runs=html_tables.every_run(study),
        recipe=_yaml(study.recipe),
        provenance=_provenance(study),
        versions=[(str(k), str(v)) for k, v in (study.provenance.get("versions") or {}).items()],
    )


def _facts(study: Study) -> list[str]:
    """The line below the finding: what was compared, on what, when."""
    seeds = {row.seeds for row in study.rows}
    spread = str(min(seeds)) if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
    methods, kept = len(study.methods()), len(study.retained)
    facts = [
        f"base {study.base['name']}" if study.base.get("name") else "",
        "target " + ", ".join(task.name for task in study.targets) if study.targets else "",
        f"{kept} retained task{'' if kept == 1 else 's'}",
        f"{methods} method{'' if methods == 1 else 's'}",
        f"{spread} seed{'' if spread == '1' else 's'}",
        str(study.provenance.get("date") or "").partition("T")[0],
    ]
    return [fact for fact in facts if fact]


def _frontier(study: Study, prefix: str) -> list[Markup]:
    """The frontier twice, for a wide and for a narrow screen; the style sheet shows one of them."""
    if not has_frontier(study):
        return []
    label = frontier_label(study)
    with figure_style():
        figures = [(f"{prefix}-frontier-{width}", frontier(study, width=width)) for width in (WIDTH, PHONE_WIDTH)]
    return [inline_svg(figure, name, label) for name, figure in figures]


def _equal_figure(study: Study, prefix: str) -> Markup | None:
    with figure_style():
        figure = equal_figure(study)
    return None if figure is None else inline_svg(figure, f"{prefix}-equal", equal_figure_label(study))


def _families(study: Study, prefix: str) -> list[tuple[str, list[Panel]]]:
    groups = []
    named = {task.family for task in study.retained} & {"near", "far"}
    for family in FAMILIES:
        members = [task for task in study.retained if task.family == family]
        panels = [panel for task in members if (panel := _task_panel(study, task, f"{prefix}-{family}-{task.name}"))]
        if panels:
            groups.append((FAMILY_NAMES[family] if named else "Retained tasks", panels))
    return groups


def _task_panel(study: Study, task: Task, prefix: str) -> Panel | None:
    with figure_style():
        figure = before_after(study, task)
    if figure is None:
        return None
    direction = "higher is better" if task.higher_is_better else "lower is better"
    base = base_score(study, task)
    start = "" if base is None else f"base {number(base, task.unit)}"
    note = f"{task.metric}, {unit_word(task.unit)}, {direction}"
    svg = inline_svg(figure, _identifier(prefix), before_after_label(study, task))
    return Panel(task.name, note, start, svg)


def _curves(study: Study, prefix: str) -> list[Panel]:
    panels = []
    for place, method in enumerate(study.methods()):
        with figure_style():
            figure = learning_curves(study, method)
        if figure is not None:
            svg = inline_svg(figure, f"{prefix}-curve-{place}", learning_curves_label(study, method))
            panels.append(Panel(study.label(method), "", "", svg))
    return panels


def _identifier(text: str) -> str:
    """An id that HTML and CSS accept, whatever a task is called, and still one per name."""
    return "".join(c if c.isascii() and (c.isalnum() or c == "-") else f"_{ord(c):x}" for c in text)


def _yaml(recipe: dict[str, Any]) -> str:
    # A recipe straight from memory may hold paths; YAML's safe writer knows none.
    recipe = json.loads(json.dumps(recipe, default=str))
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100) if recipe else ""


def _provenance(study: Study) -> list[tuple[str, str]]:
    """Everything that is known about where the numbers come from, apart from the versions."""
    known = [
        (key.replace("_", " ").capitalize(), value) for key, value in study.provenance.items() if key != "versions"
    ]
    base = [("Base", study.base.get("name")), ("Base fingerprint", study.base.get("fingerprint"))]
    return [(str(name), str(value)) for name, value in base + known if value]
