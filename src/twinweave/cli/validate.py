"""`twinweave validate`."""

from typing import Annotated

import typer
from rich.table import Table

from ..compare import check_recipe
from ..training import load_recipe
from .shared import OVERRIDES_HELP, out


def validate(
    recipe: Annotated[str, typer.Argument(help="A recipe in YAML.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help=OVERRIDES_HELP)] = None,
) -> None:
    """Check a recipe, its data and its base without training anything.

    Example: `twinweave validate recipes/pocket/reverse.yaml`
    """
    table = Table("part", "what was found", title=recipe)
    for part, found in check_recipe(load_recipe(recipe, overrides or [])):
        table.add_row(part, found)
    out.print(table)
    out.print("The recipe can be run.")
