"""`twinweave compare`."""

from typing import Annotated

import typer

from ..compare import compare as run_compare
from ..training import load_recipe
from .shared import OVERRIDES_HELP, show


def compare(
    recipe: Annotated[str, typer.Argument(help="A recipe in YAML.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help=OVERRIDES_HELP)] = None,
) -> None:
    """Train and score methods × seeds on one base, and show what each learned and forgot, with intervals.

    Finished parts are kept: the same command goes on where a stopped one left off.

    Example: `twinweave compare recipes/pocket/reverse.yaml seeds=[0,1,2,3,4]`
    """
    checked = load_recipe(recipe, overrides or [])
    show(run_compare(checked), checked.output_dir)
