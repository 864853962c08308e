"""Before and after, one small figure per retained task: the base's score against every method's.

Knows nothing about HTML and nothing about the other figures.
"""

from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .canvas import SMALL, Colours, Look, empty_axes, looks, shortened
from .palette import SENTINEL
from .study import Row, Study, Task, base_score, seed_scores
from .units import FRACTION, NATS, number, scaled, unit_word

WIDTH, ROW_HEIGHT = 280, 38
# Narrower ranges would make noise look like news (in the unit as drawn: points, nats).
LEAST_RANGE = {FRACTION: 10.0, NATS: 0.1}


def measured_rows(study: Study, task: Task) -> list[tuple[Row, list[float]]]:
    """The methods as they are (or, if there are only sweeps, every point) with their seeds' scores on a task."""
    rows = study.plain_rows() or study.rows
    return [(row, scores) for row in rows if (scores := seed_scores(study, row, task))]


def before_after(study: Study, task: Task, colours: Colours = SENTINEL) -> Figure | None:
    """The base as an upright line, each method's mean as a mark and its seeds as strokes; None without scores."""
    rows = measured_rows(study, task)
    if not rows:
        return None
    base, styles = base_score(study, task), looks(study)
    figure, axes = empty_axes(WIDTH, 34 + ROW_HEIGHT * len(rows), (10, 6, 10, 26), colours)
    axes.grid(visible=False, axis="y")
    for place, (row, scores) in enumerate(rows):
        _draw_row(axes, place, row, scores, base, task, styles[row.method], colours)
    axes.set_ylim(len(rows) - 0.62, -0.72)
    axes.set_yticks([])
    _set_range(axes, task, [score for _, scores in rows for score in scores] + ([] if base is None else [base]))
    return figure


def before_after_label(study: Study, task: Task) -> str:
    """The figure in words, for readers who do not see it."""
    base = number(base_score(study, task), task.unit)
    parts = [f"{row.label} {number(fmean(scores), task.unit)}" for row, scores in measured_rows(study, task)]
    return f"{task.name} ({unit_word(task.unit)}): base {base}; {', '.join(parts)}."


def _draw_row(
    axes: Axes, place: int, row: Row, scores: list[float], base: float | None, task: Task, look: Look, colours: Colours
) -> None:
    """Name and numbers above, below them a line from the base to the method's mean."""
    values, mean, colour = [scaled(score, task.unit) for score in scores], fmean(scores), colours[look.colour]
    x = scaled(mean, task.unit)
    axes.axhline(place, color=colours["grid"], lw=1, zorder=0)
    if base is not None:
        start = scaled(base, task.unit)
        axes.plot([start, x], [place, place], color=colour, lw=2.6, zorder=2)
        axes.plot([start, start], [place - 0.17, place + 0.17], color=colours["ink"], lw=1.6, zorder=3)
    if len(values) > 1:
        axes.plot(values, [place] * len(values), "|", color=colour, ms=11, mew=1.2, zorder=3)
    axes.plot(x, place, look.marker, color=colour, ms=9, mec=colours["card"], mew=1.2, zorder=4)
    change = "" if base is None else f" ({number(mean - base, task.unit, signed=True)})"
    for end, side, text, shade in (
        (0, "left", shortened(row.label, 26), "ink"),
        (1, "right", number(mean, task.unit) + change, "muted"),
    ):
        axes.annotate(
            text,
            (end, place),
            (0, 17),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha=side,
            va="center",
            color=colours[shade],
            fontsize=SMALL + 0.5,
        )


def _set_range(axes: Axes, task: Task, scores: list[float]) -> None:
    """Room for every mark, never narrower than the least range of the unit; worse is always on the left."""
    values = [scaled(score, task.unit) for score in scores]
    low, high = min(values), max(values)
    missing = max(LEAST_RANGE.get(task.unit, 0.0) - (high - low), 0.0) / 2
    pad = 0.05 * max(high - low + 2 * missing, 1e-6)
    low, high = low - missing - pad, high + missing + pad
    axes.set_xlim(*((low, high) if task.higher_is_better else (high, low)))
    axes.xaxis.set_major_locator(MaxNLocator(4))
