"""`twinweave demo`."""

from pathlib import Path
from typing import Annotated

import typer

from ..compare import compare as run_compare
from ..pocket import demo_recipe
from ..training import load_recipe
from .shared import OVERRIDES_HELP, show


def demo(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help=OVERRIDES_HELP)] = None,
    output: Annotated[Path, typer.Option(help="The folder of the run.")] = Path("runs/demo"),
) -> None:
    """Show the whole story in a few minutes: a small base learns a new skill, and a report says what it forgot.

    Everything it needs is shipped with twinweave. It ends with the path of report.html.

    Example: `twinweave demo --output runs/demo`
    """
    checked = load_recipe(demo_recipe(), [f"output={output}", *(overrides or [])])
    show(run_compare(checked), checked.output_dir)
