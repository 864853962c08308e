"""The summary as a table for the terminal. Knows nothing about files or HTML."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from .finding import study_finding
from .reading import read_study
from .units import interval, number, setting_text, unit_word


def summary_table(results: dict[str, Any]) -> Table:
    """One line per method and setting: seeds, target and forgetting with their 95% intervals.

    Arrows at the heads say whether up or down is better.

    Raises:
        DamagedFileError: `results` is not the contents of a `results.json`.
    """
    study = read_study(results)
    target, forgetting = study.target_unit, study.forgetting_unit
    arrow = "↑" if study.higher_is_better else "↓"
    # Text, not str: names come from users, and rich would read their brackets as markup.
    table = Table(
        title=Text(study.name),
        caption=Text(study_finding(study)),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
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
