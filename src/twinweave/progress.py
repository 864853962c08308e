"""One progress bar for everything that takes more than a moment. Knows nothing about what is being done."""

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .processes import is_first

T = TypeVar("T")

# Progress and messages go to standard error, so that standard output holds results only. Errors are said by every
# process of a run, the rest by the first.
console = Console(stderr=True)


def say(message: str) -> None:
    """One line about what happens now."""
    if is_first():
        console.print(message, soft_wrap=True, highlight=False)


def progress_bar() -> Progress:
    """A bar with the count, the elapsed time and the time left; it disappears when it is done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal or not is_first(),
    )


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield `items` while showing how far we are; silent where standard error is not a terminal."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress_bar() as bar:
        yield from bar.track(items, total=total, description=description)
