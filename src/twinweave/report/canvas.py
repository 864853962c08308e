"""What the report's figures share: the empty axes, their names, and how each method looks everywhere.

Sizes are CSS pixels (72 to matplotlib's inch). Knows nothing about what a particular figure shows.
"""

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .palette import MARKERS, SERIES
from .study import Study

Colours = dict[str, str]
PIXELS_PER_INCH = 72
SMALL, TEXT = 11, 12


@dataclass(frozen=True)
class Look:
    """How a method is drawn everywhere: its colour (an index), its shape, and whether it is a sweep."""

    series: int
    marker: str
    sweep: bool

    @property
    def colour(self) -> str:
        """The name of the colour in the palette."""
        return f"series-{self.series}"


def looks(study: Study) -> dict[str, Look]:
    """One look per method. A sweep has the colour of the method it is named after, and small hollow marks on a line."""
    methods = study.methods()
    plain = [row.method for row in study.plain_rows()]
    series: dict[str, int] = {}
    for method in sorted(methods, key=lambda name: name not in plain):
        parents = [name for name in plain if method.startswith(f"{name}_")]
        own = method in plain or not parents
        series[method] = len(set(series.values())) if own else series[max(parents, key=len)]
    shapes = {"plain": 0, "sweep": 0}
    chosen = {}
    for method in methods:
        kind = "plain" if method in plain else "sweep"
        marker = MARKERS[shapes[kind] % len(MARKERS)]
        chosen[method] = Look(series[method] % SERIES, marker, sweep=kind == "sweep")
        shapes[kind] += 1
    return chosen


def empty_axes(
    width: float, height: float, margins: tuple[float, float, float, float], colours: Colours
) -> tuple[Figure, Axes]:
    """A figure of `width` x `height` pixels and its only axes, inside `margins` (left, top, right, bottom)."""
    left, top, right, bottom = margins
    figure = Figure(figsize=(width / PIXELS_PER_INCH, height / PIXELS_PER_INCH), dpi=PIXELS_PER_INCH)
    axes = figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    )
    axes.patch.set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(color=colours["grid"], lw=1)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(colours["rule"])
    axes.tick_params(length=0, pad=6, labelcolor=colours["muted"], labelsize=SMALL)
    return figure, axes


def name_axes(axes: Axes, vertical: str, horizontal: str, colours: Colours) -> None:
    """Name both axes in level text: the vertical one above its top, the horizontal one below its right end."""
    for text, place, coordinates, offset, side in (
        (vertical, (8, 1), ("figure points", "axes fraction"), 14, "left"),
        (horizontal, (1, 0), ("axes fraction", "axes fraction"), -33, "right"),
    ):
        axes.annotate(
            text,
            place,
            (0, offset),
            xycoords=coordinates,
            textcoords="offset points",
            annotation_clip=False,
            ha=side,
            va="center",
            color=colours["muted"],
            fontsize=SMALL,
        )


def shortened(text: str, length: int) -> str:
    """At most `length` characters, the last one an ellipsis where something was cut."""
    return text if len(text) <= length else text[: length - 1] + "…"
