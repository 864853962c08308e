"""`twinweave env`."""

from rich.table import Table

from ..compare.provenance import device_name, versions
from .shared import out


def env() -> None:
    """Show the versions and the device, for bug reports.

    Example: `twinweave env`
    """
    table = Table("what", "version")
    for name, version in versions().items():
        table.add_row(name, version)
    table.add_row("device", device_name())
    out.print(table)
