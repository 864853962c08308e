"""The results as tables for the terminal. Knows nothing about files or HTML."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from .equal_finding import reference_name, share_text
from .equal_target import Reach
from .finding import study_finding
from .reading import read_study
from .study import Study, part_unit
from .units import MISSING, interval, number, setting_text, unit_word


def terminal_tables(results: dict[str, Any]) -> list[Table]:
    """What a terminal shows: forgetting at equal target with the finding, if there is any, then the summary.

    Raises:
        DamagedFileError: `results` is not the contents of a `results.json`.
    """
    study = read_study(results)
    first = _equal_target(study)
    return [_summary(study, finding=True)] if first is None else [first, _summary(study, finding=False)]


def _equal_target(study: Study) -> Table | None:
    """One line per method: what it forgets where it has plain PEFT's target, near and far apart, and against it."""
    equal = study.equal
    if not equal.parts:
        return None
    table = _table(f"{study.name}: forgetting at {reference_name(study)}'s target", study_finding(study))
    table.add_column("method")
    for part in equal.parts:
        name = "forgetting ↓" if part == "all" else f"… {part}"
        table.add_column(Text(f"{name}\n{unit_word(part_unit(study, part))}"), justify="right")
    table.add_column(Text(f"share of\n{reference_name(study)}'s"))
    table.add_column("on the\nway there", justify="right")
    table.add_column("seeds\nthere", justify="right")
    for method in equal.ranked():
        reach = equal.at_target[method]
        cost = reach.costs.get("all")
        along = equal.along[method].costs.get("all") if method in equal.along else None
        table.add_row(
            Text(study.label(method)),
            *(_mean(study, reach, part) for part in equal.parts),
            Text(share_text(cost.reference) if cost else "not reached", style="" if cost else "dim"),
            number(along.mean, study.forgetting_unit) if along else MISSING,
            f"{reach.reached}/{reach.seeds}",
            style="bold" if method == equal.lead() else "",
        )
    return table


def _mean(study: Study, reach: Reach, part: str) -> str:
    cost = reach.costs.get(part)
    return number(cost.mean, part_unit(study, part)) if cost else MISSING


def _table(title: str, caption: str) -> Table:
    # Text, not str: names come from users, and rich would read their brackets as markup.
    return Table(
        title=Text(title),
        caption=Text(caption),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )


def _summary(study: Study, finding: bool) -> Table:
    """One line per method and setting: seeds, target and forgetting with their 95% intervals; arrows at the heads say
    whether up or down is better."""
    target, forgetting = study.target_unit, study.forgetting_unit
    arrow = "↑" if study.higher_is_better else "↓"
    table = _table(study.name, study_finding(study) if finding else "")
    table.add_column("method")
    table.add_column(Text(f"target {arrow}\n{unit_word(target)}"), justify="right")
    table.add_column("95%\ninterval", no_wrap=True)
    table.add_column(Text(f"forgetting ↓\n{unit_word(forgetting)}"), justify="right")
    table.add_column("95%\ninterval", no_wrap=True)
    table.add_column("seeds", justify="right")
    base = study.base_target
    if base is not None:
        zero = number(0.0, forgetting) if study.retained else ""
        table.add_row("base", number(base, target), "", zero, "", "", style="dim")
    for row in study.rows:
        table.add_row(
            Text(f"{row.label}, {setting_text(row.setting)}" if row.setting else row.label),
            number(row.target, target),
            Text(interval(row.target_ci, target), style="dim"),
            number(row.forgetting, forgetting),
            Text(interval(row.forgetting_ci, forgetting), style="dim"),
            str(row.seeds),
        )
    return table
