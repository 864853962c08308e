"""`twinweave tasks`."""

from rich.table import Table

from ..evaluation import KNOWN_TASKS
from .shared import out


def tasks() -> None:
    """List the tasks that recipes know by name.

    Example: `twinweave tasks`
    """
    table = Table("task", "kind", "metrics", "data", "description")
    for name, task in KNOWN_TASKS.items():
        data = task.data if isinstance(task.data, str) else "given by the recipe"
        table.add_row(name, task.kind, ", ".join(task.metrics), data, task.description)
    out.print(table)
