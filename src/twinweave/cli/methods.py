"""`twinweave methods`."""

from rich.table import Table

from ..methods import METHODS
from .shared import out


def methods() -> None:
    """List the methods that `train` and `compare` know.

    Example: `twinweave methods`
    """
    table = Table("method", "trained", "description")
    for name, method in METHODS.items():
        table.add_row(name, "no: a dial" if method.dial else "yes", method.description)
    out.print(table)
