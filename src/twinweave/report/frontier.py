"""The frontier: what was learned against what was forgotten, one mark per method, one curve per sweep.

Also the same figure as a picture for a README. Knows nothing about HTML.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from twinweave.files import temporary_sibling

from .canvas import PIXELS_PER_INCH, SMALL, TEXT, Colours, Look, empty_axes, looks, name_axes
from .palette import LIGHT, SENTINEL
from .reading import read_study
from .study import Interval, Row, Study
from .svg import figure_style
from .units import interval, quantity, scaled, setting_text, unit_word

NARROW = 500
LABEL_DROP, FREE = 14, 20
PNG_WIDTH, WIDTH = 1200, 720


def has_frontier(study: Study) -> bool:
    """Whether any row has both a target score and a forgetting."""
    return any(row.target is not None and row.forgetting is not None for row in study.rows)


def frontier(study: Study, colours: Colours = SENTINEL, width: int = WIDTH, legend: bool = False) -> Figure:
    """Target against forgetting, up and to the left is better; 95% intervals as bars, sweeps as curves.

    `width` is in CSS pixels. A target that is a loss is drawn upside down, so that up is better there too.
    """
    narrow = width < NARROW
    figure, axes = empty_axes(width, width * (1.02 if narrow else 0.6), (46, 34, 18, 46), colours)
    styles = looks(study)
    for method in study.methods():
        _draw_sweep(axes, study, method, styles[method], colours)
    for row in study.plain_rows():
        _draw_point(axes, row, study, styles[row.method], colours)
    _draw_base(axes, study, colours)
    axes.margins(0.08, 0.12)
    axes.autoscale_view()
    if not study.higher_is_better:
        axes.invert_yaxis()
    if not narrow:
        _label_sweep_ends(axes, study, colours)
    axes.axvline(0, color=colours["rule"], lw=1.4, zorder=1)
    _draw_better_corner(axes, colours, narrow)
    target = "Target score" if study.higher_is_better else "Target loss"
    upward = "" if study.higher_is_better else ", lower is up"
    name_axes(
        axes,
        f"{target} ({unit_word(study.target_unit)}{upward})",
        f"Forgetting ({unit_word(study.forgetting_unit)}, 0 = nothing forgotten)",
        colours,
    )
    if legend:
        _draw_legend(axes, study, styles, colours)
    return figure


def frontier_label(study: Study) -> str:
    """The frontier in words, for readers who do not see it."""
    noun = "target score" if study.higher_is_better else "target loss"
    f_unit, t_unit = study.forgetting_unit, study.target_unit
    parts = [] if study.base_target is None else [f"base: {noun} {quantity(study.base_target, t_unit)}"]
    for row in study.plain_rows() or study.rows:
        within = f" (95% interval {interval(row.forgetting_ci, f_unit)})" if row.forgetting_ci else ""
        forgetting = quantity(row.forgetting, f_unit) + within
        parts.append(f"{row.label}: {noun} {quantity(row.target, t_unit)}, forgetting {forgetting}")
    return f"{noun.capitalize()} against forgetting; up and to the left is better. {'; '.join(parts)}."


def frontier_png(results: dict[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write the frontier on a light background as a PNG 1200 pixels wide, whole or not at all.

    Raises:
        DamagedFileError: `results` is not the contents of a `results.json`.
    """
    study, path = read_study(results), Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(path)
    try:
        with figure_style():
            figure = frontier(study, LIGHT, legend=True)
            dpi = PIXELS_PER_INCH * PNG_WIDTH / WIDTH
            figure.savefig(temporary, format="png", dpi=dpi, facecolor=LIGHT["card"], metadata={"Software": None})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _place(study: Study, row: Row) -> tuple[float, float] | None:
    """Where a row's mark goes: forgetting and target as drawn; None where one of them is unknown."""
    if row.target is None or row.forgetting is None:
        return None
    return scaled(row.forgetting, study.forgetting_unit), scaled(row.target, study.target_unit)


def _bars(value: float, bounds: Interval | None, unit: str) -> list[list[float]] | None:
    """An interval as the two lengths that error bars want."""
    if bounds is None:
        return None
    low, high = (scaled(bound, unit) for bound in bounds)
    return [[max(value - low, 0.0)], [max(high - value, 0.0)]]


def _draw_point(axes: Axes, row: Row, study: Study, look: Look, colours: Colours) -> None:
    place = _place(study, row)
    if place is None:
        return
    (x, y), colour = place, colours[look.colour]
    axes.errorbar(
        x,
        y,
        xerr=_bars(x, row.forgetting_ci, study.forgetting_unit),
        yerr=_bars(y, row.target_ci, study.target_unit),
        fmt="none",
        color=colour,
        ecolor=colour,
        elinewidth=0.9 if look.sweep else 1.7,
        capsize=0 if look.sweep else 3,
        zorder=3 if look.sweep else 5,
    )
    face, edge = (colours["card"], colour) if look.sweep else (colour, colours["card"])
    size = 6 if look.sweep else 10
    axes.plot(x, y, look.marker, ms=size, color=face, mec=edge, mew=1.4, zorder=4 if look.sweep else 6)


def _draw_sweep(axes: Axes, study: Study, method: str, look: Look, colours: Colours) -> None:
    points = study.sweep(method)
    places = [place for row in points if (place := _place(study, row))]
    if len(places) > 1:
        axes.plot(*zip(*places, strict=True), color=colours[look.colour], lw=1.5, zorder=2)
    for row in points:
        _draw_point(axes, row, study, Look(look.series, look.marker, sweep=True), colours)


def _backing(colours: Colours) -> dict[str, Any]:
    """A quiet ground for text, so that no grid line runs through it."""
    return {"facecolor": colours["card"], "edgecolor": "none", "pad": 1.5}


def _label_sweep_ends(axes: Axes, study: Study, colours: Colours) -> None:
    """The setting at both ends of each sweep, unless a method's own mark is in the way."""
    figure_points = [axes.transData.transform(place) for row in study.plain_rows() if (place := _place(study, row))]
    for method in study.methods():
        sweep = [(row, place) for row in study.sweep(method) if (place := _place(study, row))]
        for row, place in sweep[:1] + sweep[1:][-1:]:
            below = axes.transData.transform(place) - np.array([0, LABEL_DROP])
            if all(abs(below - other).max() > FREE for other in figure_points):
                axes.annotate(
                    setting_text(row.setting),
                    place,
                    (0, -LABEL_DROP),
                    textcoords="offset points",
                    ha="center",
                    va="center",
                    color=colours["muted"],
                    fontsize=SMALL,
                    bbox=_backing(colours),
                    zorder=1.8,
                )


def _draw_base(axes: Axes, study: Study, colours: Colours) -> None:
    if study.base_target is None:
        return
    place = (0.0, scaled(study.base_target, study.target_unit))
    axes.plot(*place, "*", ms=15, color=colours["ink"], mec=colours["card"], mew=1, zorder=7)
    axes.annotate(
        "base",
        place,
        (11, 0),
        textcoords="offset points",
        ha="left",
        va="center",
        color=colours["ink"],
        fontsize=TEXT,
    )


def _draw_better_corner(axes: Axes, colours: Colours, narrow: bool) -> None:
    axes.annotate(
        "better",
        xy=(0.008, 0.985),
        xytext=(0.1, 0.885) if narrow else (0.055, 0.885),
        xycoords="axes fraction",
        textcoords="axes fraction",
        color=colours["muted"],
        fontsize=TEXT,
        style="italic",
        ha="left",
        va="center",
        bbox=_backing(colours),
        arrowprops={"arrowstyle": "->", "color": colours["muted"], "lw": 1.4, "shrinkA": 2, "shrinkB": 0},
        zorder=1.5,
    )


def _draw_legend(axes: Axes, study: Study, styles: dict[str, Look], colours: Colours) -> None:
    handles = []
    for method, look in styles.items():
        colour = colours[look.colour]
        face, edge = (colours["card"], colour) if look.sweep else (colour, colours["card"])
        handles.append(
            Line2D(
                [],
                [],
                color=colour,
                lw=1.5 if look.sweep else 0,
                marker=look.marker,
                ms=6 if look.sweep else 9,
                mfc=face,
                mec=edge,
                mew=1.4,
                label=study.label(method),
            )
        )
    axes.legend(
        handles=handles, loc="lower right", frameon=False, labelcolor=colours["ink"], fontsize=TEXT, handlelength=2
    )
