"""`twinweave methods`."""

from rich.table import Table

from ..methods import METHODS
from .shared import out


def methods() -> None:
    """List the methods that `train` and `compare` know, and the small sweep of those that have a knob.

    Example: `twinweave methods`
    """
    table = Table("method", "trained", "swept over", "description")
    for name, method in METHODS.items():
        knob = method.knob
        sweep = f"{knob.name}: {', '.join(f'{value:g}' for value in knob.values)}" if knob else ""
        table.add_row(name, "no: a dial" if method.dial else "yes", sweep, method.description)
    out.print(table)
