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
    """One look per method. A sweep has the colour of the method it is named after, and hollow marks."""
    methods = study.methods()
    plain = [row.method for row in study.plain_rows()]
    series: dict[str, int] = {}
    for method in sorted(methods, key=lambda name: name not in plain):
        parents = [name for name in plain if method.startswith(f"{name}_")]
        own = method in plain or not parents
        series[method] = len(set(series.values())) if own else series[max(parents, key=len)]
    return {
        method: Look(series[method] % SERIES, MARKERS[place % len(MARKERS)], method not in plain)
        for place, method in enumerate(methods)
    }


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
    style = {"color": colours["muted"], "fontsize": SMALL, "annotation_clip": False, "textcoords": "offset pixels"}
    left = axes.get_position().x0 * axes.figure.get_figwidth() * PIXELS_PER_INCH
    axes.annotate(vertical, (0, 1), (-left + 2, 14), xycoords="axes fraction", ha="left", va="center", **style)
    axes.annotate(horizontal, (1, 0), (0, -33), xycoords="axes fraction", ha="right", va="center", **style)


def shortened(text: str, length: int) -> str:
    """At most `length` characters, the last one an ellipsis where something was cut."""
    return text if len(text) <= length else text[: length - 1] + "…"
