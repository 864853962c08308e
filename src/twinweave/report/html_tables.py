"""The page's tables as plain rows of text. Knows nothing about HTML beyond "a cell has a main and a small line"."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from markupsafe import Markup

from .canvas import Look, looks
from .equal_target import verdict
from .study import Comparison, Study, Task, base_score, family_forgetting, family_unit, seed_scores
from .svg import marker_svg
from .units import MISSING, amount, count, finite, interval, number, setting_text, unit_word

MEBIBYTE = 2.0**20
FAMILY_NAMES = {"near": "Near the target", "far": "Far from the target", "other": "Other retained tasks"}


@dataclass(frozen=True)
class Cell:
    """What a cell shows: a main line, a smaller one below it, and a marker in front of the first."""

    text: str
    small: str = ""
    key: Markup | str = ""


@dataclass(frozen=True)
class HtmlTable:
    """A table: its caption, its column heads (main and small line) and rows; the first column names the row."""

    caption: str
    head: list[Cell]
    rows: list[list[Cell]] = field(default_factory=list)


def key(look: Look) -> Markup:
    """The method's mark, as in the figures."""
    return marker_svg(look.marker, look.series, hollow=look.sweep, line=look.sweep)


def summary(study: Study) -> HtmlTable:
    """One line per method and setting, below the base: target and forgetting, near and far apart."""
    t_unit, f_unit = study.target_unit, study.forgetting_unit
    direction = "higher is better" if study.higher_is_better else "lower is better"
    families = list(dict.fromkeys(task.family for task in study.retained))
    families = families if len(families) > 1 else []
    head = [Cell("Method"), Cell("Target", f"{unit_word(t_unit)}, {direction}")]
    head.append(Cell("Forgetting", f"{unit_word(f_unit)}, lower is better"))
    names = {"near": "near", "far": "far", "other": "other"}
    head += [Cell(f"… {names[family]}", unit_word(family_unit(study, family))) for family in families]
    head.append(Cell("Seeds"))
    table = HtmlTable("", head)
    if study.base_target is not None:
        zeros = [Cell(number(0.0, f_unit) if study.retained else MISSING)]
        zeros += [Cell(number(0.0, family_unit(study, family))) for family in families]
        table.rows.append([Cell("Base", "untouched"), Cell(number(study.base_target, t_unit)), *zeros, Cell("")])
    styles = looks(study)
    for row in study.rows:
        cells = [
            Cell(row.label, setting_text(row.setting), key(styles[row.method])),
            Cell(number(row.target, t_unit), interval(row.target_ci, t_unit)),
            Cell(number(row.forgetting, f_unit), interval(row.forgetting_ci, f_unit)),
        ]
        for family in families:
            cells.append(Cell(number(family_forgetting(study, row, family), family_unit(study, family))))
        table.rows.append([*cells, Cell(str(row.seeds))])
    return table


def differences(study: Study) -> HtmlTable | None:
    """The paired comparisons with their intervals and what they show in words."""
    if not study.comparisons:
        return None
    t_unit, f_unit = study.target_unit, study.forgetting_unit
    table = HtmlTable(
        "Differences, paired over seeds",
        [Cell("Comparison"), Cell("Target", unit_word(t_unit)), Cell("Forgetting", unit_word(f_unit))],
    )
    table.head.extend([Cell("What it shows"), Cell("Seeds")])
    for c in study.comparisons:
        table.rows.append(
            [
                Cell(
                    study.label(c.method),
                    ", ".join(filter(None, [setting_text(c.setting), f"minus {study.label(c.against)}"])),
                ),
                Cell(number(c.target.mean, t_unit, signed=True), interval(c.target.ci, t_unit, signed=True)),
                Cell(number(c.forgetting.mean, f_unit, signed=True), interval(c.forgetting.ci, f_unit, signed=True)),
                Cell(_words(study, c)),
                Cell(str(c.seeds)),
            ]
        )
    return table


def cost(study: Study) -> HtmlTable | None:
    """What training took, as means over seeds; methods that train nothing of their own are left out."""
    table = HtmlTable(
        "What it cost, mean over seeds",
        [
            Cell("Method"),
            Cell("Trained", "parameters"),
            Cell("Training", "seconds"),
            Cell("Speed", "tokens per second"),
            Cell("Peak memory", "MiB"),
        ],
    )
    for row in study.plain_rows():
        runs = study.runs_of(row)
        values = [_mean(runs, name) for name in _COSTS]
        if any(value is not None for value in values):
            parameters, seconds, speed, memory = values
            table.rows.append(
                [
                    Cell(row.label, key=key(looks(study)[row.method])),
                    Cell(count(parameters)),
                    Cell(amount(seconds)),
                    Cell(amount(speed, decimals=0)),
                    Cell(amount(memory, MEBIBYTE, 0)),
                ]
            )
    return table if table.rows else None


def retained(study: Study) -> HtmlTable | None:
    """Every retained task's primary score, base first, for all methods and settings."""
    tasks = study.retained
    if not tasks:
        return None
    head = [Cell(task.name, f"{_family(task)}{unit_word(task.unit)}, {_arrow(task)}") for task in tasks]
    table = HtmlTable("Scores per retained task, mean over seeds", [Cell("Method"), *head])
    if any(base_score(study, task) is not None for task in tasks):
        table.rows.append([Cell("Base"), *(Cell(number(base_score(study, task), task.unit)) for task in tasks)])
    for row in study.rows:
        scores = [seed_scores(study, row, task) for task in tasks]
        if any(scores):
            shown = [Cell(number(fmean(s), t.unit) if s else MISSING) for s, t in zip(scores, tasks, strict=True)]
            table.rows.append([Cell(row.label, setting_text(row.setting)), *shown])
    return table


def every_run(study: Study) -> HtmlTable | None:
    """One line per run with all its numbers, every metric of every task included."""
    if not study.runs:
        return None
    columns = list(dict.fromkeys(column for run in study.runs for column in _score_columns(run)))
    head = [
        Cell("Run"),
        Cell("Seed"),
        Cell("Target", unit_word(study.target_unit)),
        Cell("Retained", unit_word(study.forgetting_unit)),
        Cell("Forgetting", unit_word(study.forgetting_unit)),
        Cell("Training", "seconds"),
        Cell("Speed", "tokens per second"),
        Cell("Peak memory", "MiB"),
        Cell("Trained", "parameters"),
    ]
    head += [Cell(task, f"{metric}, {unit_word(_metric_unit(study, task, metric))}") for _, task, metric in columns]
    table = HtmlTable("Every run, every score", head)
    for run in study.runs:
        scores = [
            number(finite(((run.get(where) or {}).get(task) or {}).get(metric)), _metric_unit(study, task, metric))
            for where, task, metric in columns
        ]
        about = " · ".join(
            part for part in (str(run.get("peft") or ""), setting_text(run.get("setting") or {})) if part
        )
        cells = [
            Cell(study.label(run["method"]), about),
            Cell(str(run.get("seed", MISSING))),
            Cell(number(finite(run.get("target_score")), study.target_unit)),
            Cell(number(finite(run.get("retained_score")) if study.retained else None, study.forgetting_unit)),
            Cell(number(finite(run.get("forgetting")) if study.retained else None, study.forgetting_unit)),
            Cell(amount(run.get("train_seconds"))),
            Cell(amount(run.get("tokens_per_second") or None, decimals=0)),
            Cell(amount(run.get("peak_memory_bytes") or None, MEBIBYTE, 0)),
            Cell(count(run.get("trainable_parameters"))),
        ]
        table.rows.append(cells + [Cell(score) for score in scores])
    return table


def tasks(study: Study) -> HtmlTable | None:
    """What was measured: role, metric, direction, number of examples."""
    if not study.tasks:
        return None
    table = HtmlTable("Tasks", [Cell("Task"), Cell("Role"), Cell("Metric"), Cell("Examples"), Cell("What it asks")])
    for task in [*study.targets, *study.retained]:
        role = task.role if task.family == "other" else f"{task.role}, {task.family}"
        metric = Cell(task.metric, f"{unit_word(task.unit)}, {_arrow(task)}")
        examples = MISSING if task.count is None else count(task.count)
        table.rows.append([Cell(task.name, task.kind), Cell(role), metric, Cell(examples), Cell(task.description)])
    return table


_COSTS = ("trainable_parameters", "train_seconds", "tokens_per_second", "peak_memory_bytes")


def _words(study: Study, c: Comparison) -> str:
    forgets = {"better": "forgets less", "worse": "forgets more", "not shown": "no difference in forgetting shown"}
    learns = {"better": "learns more", "worse": "learns less", "not shown": "no difference on the target shown"}
    shown = [
        forgets.get(verdict(c.forgetting, lower_is_better=True), ""),
        learns.get(verdict(c.target, lower_is_better=not study.higher_is_better), ""),
    ]
    said = ", ".join(part for part in shown if part)
    return said or ("one seed: no interval, nothing shown" if c.seeds == 1 else "no interval, nothing shown")


def _family(task: Task) -> str:
    return "" if task.family == "other" else f"{task.family}, "


def _arrow(task: Task) -> str:
    return "higher is better" if task.higher_is_better else "lower is better"


def _mean(runs: Iterable[dict[str, Any]], name: str) -> float | None:
    values = [value for run in runs if (value := finite(run.get(name)))]
    return fmean(values) if values else None


def _score_columns(run: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (where, task, metric)
        for where in ("target", "retained")
        for task, scores in (run.get(where) or {}).items()
        for metric in scores or {}
    ]


def _metric_unit(study: Study, task: str, metric: str) -> str:
    """The task's unit for its primary metric and for its like; losses beside a score are in nats."""
    declared = study.tasks[task]
    if metric == declared.metric:
        return declared.unit
    return "nats" if "loss" in metric else "plain number" if declared.unit == "nats" else declared.unit
