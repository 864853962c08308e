"""`twinweave train`."""

from typing import Annotated

import typer

from ..compare import train as run_train
from ..training import load_recipe
from .shared import OVERRIDES_HELP, show


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe in YAML.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help=OVERRIDES_HELP)] = None,
) -> None:
    """Train one method as the recipe says, and show what was learned and what was kept.

    The same command goes on where a stopped one left off. The best model is in OUTPUT/best, the last in OUTPUT/last.

    Example: `twinweave train recipes/pocket/reverse.yaml training.epochs=1 output=runs/reverse`
    """
    checked = load_recipe(recipe, overrides or [])
    show(run_train(checked), checked.output_dir)
