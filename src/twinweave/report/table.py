"""The summary as a table for the terminal. Knows nothing about files or HTML."""

from typing import Any

from rich.table import Table
from rich.text import Text

from .finding import study_finding
from .reading import read_study
from .units import interval, number, setting_text, unit_word


def summary_table(results: dict[str, Any]) -> Table:
    """One line per method and setting: seeds, target and forgetting with their 95% intervals.

    Raises:
        DamagedFileError: `results` is not the contents of a `results.json`.
    """
    study = read_study(results)
    target, forgetting = study.target_unit, study.forgetting_unit
    better = "higher is better" if study.higher_is_better else "lower is better"
    # Text, not str: names come from users, and rich would read their brackets as markup.
    table = Table(title=Text(study.name), caption=Text(study_finding(study)), caption_justify="left")
    table.add_column("method", no_wrap=True)
    table.add_column("seeds", justify="right")
    table.add_column(Text(f"target ({unit_word(target)}, {better})"), justify="right")
    table.add_column("95% interval", justify="right")
    table.add_column(Text(f"forgetting ({unit_word(forgetting)}, lower is better)"), justify="right")
    table.add_column("95% interval", justify="right")
    base = study.base_target
    if base is not None:
        zero = number(0.0, forgetting) if study.retained else ""
        table.add_row("base", "", number(base, target), "", zero, "", style="dim")
    for row in study.rows:
        name = f"{row.label}, {setting_text(row.setting)}" if row.setting else row.label
        table.add_row(
            Text(name),
            str(row.seeds),
            number(row.target, target),
            interval(row.target_ci, target),
            number(row.forgetting, forgetting),
            interval(row.forgetting_ci, forgetting),
        )
    return table
