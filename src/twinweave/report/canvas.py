"""What the report's figures share: the empty axes, their names, and how each method looks everywhere.

Sizes are CSS pixels (72 to matplotlib's inch). Knows nothing about what a particular figure shows.
"""

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .palette import MARKERS, SERIES, STRONG
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
    def strong(self) -> bool:
        """Whether the eye should find it first."""
        return self.series < STRONG

    @property
    def colour(self) -> str:
        """The name of the colour in the palette."""
        return f"series-{self.series}"


def looks(study: Study) -> dict[str, Look]:
    """One look per method: IMSM and plain PEFT in strong colours, the others muted.

    The sweep of IMSM's own dial has its colour. Sweeps have small hollow marks on a line.
    """
    plain = {row.method for row in study.plain_rows()}
    strong = {"imsm": 0, "imsm_retention": 0, "peft": 1}
    shapes = {True: 0, False: 0}
    muted = 0
    chosen = {}
    for method in study.methods():
        sweep = method not in plain
        series = strong.get(method)
        if series is None:
            series = STRONG + muted % (SERIES - STRONG)
            muted += 1
        chosen[method] = Look(series, MARKERS[shapes[sweep] % len(MARKERS)], sweep)
        shapes[sweep] += 1
    return chosen


def empty_figure(width: float, height: float) -> Figure:
    """A figure of `width` x `height` pixels with nothing in it."""
    return Figure(figsize=(width / PIXELS_PER_INCH, height / PIXELS_PER_INCH), dpi=PIXELS_PER_INCH)


def add_axes(figure: Figure, box: tuple[float, float, float, float], colours: Colours) -> Axes:
    """Empty axes in the figure's `box` of pixels: left, top, width, height."""
    left, top, inner_width, inner_height = box
    width, height = (PIXELS_PER_INCH * inches for inches in figure.get_size_inches())
    axes = figure.add_axes(
        (left / width, 1 - (top + inner_height) / height, inner_width / width, inner_height / height)
    )
    axes.patch.set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(color=colours["grid"], lw=1)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(colours["rule"])
    axes.tick_params(length=0, pad=6, labelcolor=colours["muted"], labelsize=SMALL)
    return axes


def empty_axes(
    width: float, height: float, margins: tuple[float, float, float, float], colours: Colours
) -> tuple[Figure, Axes]:
    """A figure of `width` x `height` pixels and its only axes, inside `margins` (left, top, right, bottom)."""
    left, top, right, bottom = margins
    figure = empty_figure(width, height)
    return figure, add_axes(figure, (left, top, width - left - right, height - top - bottom), colours)


def name_axes(axes: Axes, vertical: str, horizontal: str, colours: Colours) -> None:
    """Name both axes in level text: the vertical one above its top, the horizontal one below its right end."""
    for text, place, coordinates, offset, side in (
        (vertical, (0, 1), ("axes fraction", "axes fraction"), 14, "left"),
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
