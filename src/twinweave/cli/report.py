"""`twinweave report`."""

from pathlib import Path
from typing import Annotated

import typer

from ..compare.store import read_results
from ..report import build_report, terminal_tables
from .shared import out


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs, or their results.json.")],
    output: Annotated[Path | None, typer.Option(help="The HTML file (RUN/report.html by default).")] = None,
) -> None:
    """Write one self-contained HTML report of one or several runs.

    Example: `twinweave report runs/demo runs/gsm8k --output report.html`
    """
    results = [read_results(run) for run in runs]
    first = runs[0] if runs[0].is_dir() else runs[0].parent
    for result in results:
        for table in terminal_tables(result):
            out.print(table)
    print(f"report:  {build_report(results, output or first / 'report.html')}")
