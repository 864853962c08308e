"""The frontier: what was learned against what was forgotten, one curve per method, near and far tasks apart.

Also the same figure as a picture for a README. Knows nothing about HTML.
"""

import os
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from twinweave.files import temporary_sibling

from .canvas import PIXELS_PER_INCH, SMALL, TEXT, Colours, Look, add_axes, empty_figure, looks, name_axes, shortened
from .equal_target import Interval
from .palette import LIGHT, SENTINEL
from .reading import read_study
from .study import Row, Study, family_forgetting, part_unit
from .svg import figure_style
from .units import interval, quantity, scaled, unit_word

NARROW = 500
PNG_WIDTH, WIDTH, HEIGHT = 1400, 912, 400
TITLES = {"all": "All retained tasks", "near": "Near the target", "far": "Far from the target"}
# The overall panel is wider than those of the families.
SHARES = {"all": 1.5, "near": 1.0, "far": 1.0}
LEFT, TOP, RIGHT, BOTTOM, GAP, NARROW_HEIGHT = 46.0, 54.0, 14.0, 46.0, 26.0, 270.0
LEGEND_ROW, LEGEND_COLUMN, LABEL_STEP = 20, 230, 21
Place = tuple[float, float]


def has_frontier(study: Study) -> bool:
    """Whether any row has both a target score and a forgetting."""
    return any(row.target is not None and row.forgetting is not None for row in study.rows)


def panels_of(study: Study) -> list[str]:
    """ "all", and "near" and "far" where there are tasks of both."""
    families = {task.family for task in study.retained}
    return ["all", "near", "far"] if {"near", "far"} <= families else ["all"]


def frontier(study: Study, colours: Colours = SENTINEL, width: int = WIDTH, legend: bool = False) -> Figure:
    """Target against forgetting in one panel for all retained tasks and one for each family, up and left is better.

    `width` is in CSS pixels; narrow figures have the panels below each other. 95% intervals are bars in the first
    panel, the settings of a method are joined by a line. A target that is a loss is drawn upside down.
    """
    narrow, parts, styles = width < NARROW, panels_of(study), looks(study)
    figure, panels = _panels(study, parts, colours, width, legend)
    # Strong ones last, on top of the others.
    methods = sorted(study.methods(), key=lambda method: styles[method].strong)
    for part, axes in panels.items():
        for method in methods:
            _draw_curve(axes, study, method, part, styles[method], colours)
        _draw_reference(axes, study, part, colours)
        _draw_base(axes, study, colours, named=part == "all")
        axes.margins(0.08, 0.1)
        axes.autoscale_view()
        axes.axvline(0, color=colours["rule"], lw=1.4, zorder=1)
        axes.xaxis.set_major_locator(MaxNLocator(5 if part == "all" else 4))
        axes.set_title(TITLES[part], loc="left", color=colours["ink"], fontsize=TEXT, pad=34 if narrow else 30)
    first = panels["all"]
    low, high = zip(*(axes.get_ylim() for axes in panels.values()), strict=True)
    for axes in panels.values():
        axes.set_ylim(*((min(low), max(high)) if study.higher_is_better else (max(high), min(low))))
    if not narrow:
        _label_curves(first, study, styles, colours)
        for axes in list(panels.values())[1:]:
            axes.set_yticklabels([])
    _name(panels, study, colours, narrow)
    if legend:
        _draw_legend(figure, study, styles, colours, width)
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
    """Write the frontier on a light background as a PNG 1400 pixels wide, whole or not at all.

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


def _panels(
    study: Study, parts: list[str], colours: Colours, width: float, legend: bool
) -> tuple[Figure, dict[str, Axes]]:
    """The empty panels: side by side, or below each other where it is narrow; a legend gets room below them."""
    if width < NARROW:
        figure = empty_figure(width, NARROW_HEIGHT * len(parts))
        boxes: list[tuple[float, float, float, float]] = [
            (LEFT, NARROW_HEIGHT * place + TOP, width - LEFT - RIGHT, NARROW_HEIGHT - TOP - BOTTOM)
            for place in range(len(parts))
        ]
    else:
        extra = LEGEND_ROW * _legend_rows(study, width) + 8 if legend else 0
        figure = empty_figure(width, HEIGHT + extra)
        shares = [SHARES[part] for part in parts]
        room, total = width - LEFT - RIGHT - GAP * (len(parts) - 1), sum(shares)
        boxes, left = [], LEFT
        for share in shares:
            boxes.append((left, TOP, room * share / total, HEIGHT - TOP - BOTTOM))
            left += room * share / total + GAP
    return figure, {part: add_axes(figure, box, colours) for part, box in zip(parts, boxes, strict=True)}


def _name(panels: dict[str, Axes], study: Study, colours: Colours, narrow: bool) -> None:
    target = "Target score" if study.higher_is_better else "Target loss"
    upward = "" if study.higher_is_better else ", lower is up"
    for part, axes in panels.items():
        unit = part_unit(study, part)
        note = f"Forgetting ({unit_word(unit)}, 0 = nothing forgotten)" if part == "all" else unit_word(unit)
        vertical = f"{target} ({unit_word(study.target_unit)}{upward})" if part == "all" or narrow else ""
        name_axes(axes, vertical, note, colours)


def _place(study: Study, row: Row, part: str) -> Place | None:
    """Where a row's mark goes: forgetting and target as drawn; None where one of them is unknown."""
    forgetting = row.forgetting if part == "all" else family_forgetting(study, row, part)
    if row.target is None or forgetting is None:
        return None
    return scaled(forgetting, part_unit(study, part)), scaled(row.target, study.target_unit)


def _bars(value: float, bounds: Interval | None, unit: str) -> list[list[float]] | None:
    """An interval as the two lengths that error bars want."""
    if bounds is None:
        return None
    low, high = (scaled(bound, unit) for bound in bounds)
    return [[max(value - low, 0.0)], [max(high - value, 0.0)]]


def _draw_curve(axes: Axes, study: Study, method: str, part: str, look: Look, colours: Colours) -> None:
    """The line through all settings, and a mark for each of the method's own."""
    placed = [(row, place) for row in study.curve(method) if (place := _place(study, row, part))]
    if len(placed) > 1:
        width, shade = (2.2, 1.0) if look.strong else (1.1, 0.8)
        xs, ys = zip(*(place for _, place in placed), strict=True)
        axes.plot(xs, ys, color=colours[look.colour], lw=width, alpha=shade, zorder=4 if look.strong else 2)
    for row, place in placed:
        if row.method == method:
            _draw_point(axes, row, place, study, part, look, colours)


def _draw_point(axes: Axes, row: Row, place: Place, study: Study, part: str, look: Look, colours: Colours) -> None:
    (x, y), colour = place, colours[look.colour]
    if part == "all":
        axes.errorbar(
            x,
            y,
            xerr=_bars(x, row.forgetting_ci, study.forgetting_unit),
            yerr=_bars(y, row.target_ci, study.target_unit),
            fmt="none",
            color=colour,
            ecolor=colour,
            elinewidth=1.7 if look.strong else 0.9,
            capsize=3 if look.strong and not look.sweep else 0,
            alpha=1.0 if look.strong else 0.6,
            zorder=5 if look.strong else 3,
        )
    face, edge = (colours["card"], colour) if look.sweep else (colour, colours["card"])
    size = (6.0 if look.sweep else 10.0) if look.strong else (5.0 if look.sweep else 7.0)
    axes.plot(x, y, look.marker, ms=size, color=face, mec=edge, mew=1.3, zorder=6 if look.strong else 4)


def _draw_reference(axes: Axes, study: Study, part: str, colours: Colours) -> None:
    """Plain PEFT's target as a level line, and what mixing it with the base would give as a dashed one."""
    equal = study.equal
    if equal.target is None or study.base_target is None:
        return
    level = scaled(equal.target, study.target_unit)
    axes.axhline(level, color=colours["muted"], lw=1, ls=(0, (1, 2)), zorder=1.5)
    rows = (row for row in study.rows if (row.method, row.setting) == (equal.reference, equal.reference_setting))
    for place in (place for row in rows if (place := _place(study, row, part))):
        start = (0.0, scaled(study.base_target, study.target_unit))
        axes.plot(*zip(start, place, strict=True), color=colours["muted"], lw=1.1, ls=(0, (5, 4)), zorder=1.6)


def _draw_base(axes: Axes, study: Study, colours: Colours, named: bool) -> None:
    if study.base_target is None:
        return
    place = (0.0, scaled(study.base_target, study.target_unit))
    axes.plot(*place, "*", ms=13, color=colours["ink"], mec=colours["card"], mew=1, zorder=7)
    if named:
        _write(axes, "base", place, (11, 0), colours["ink"])


def _write(
    axes: Axes, text: str, place: Place, offset: Place, colour: str, ground: str = "none", leader: bool = False
) -> None:
    axes.annotate(
        text,
        place,
        offset,
        textcoords="offset points",
        ha="left",
        va="center",
        color=colour,
        fontsize=TEXT,
        bbox={"facecolor": ground, "edgecolor": "none", "pad": 1.5},
        arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.8, "shrinkA": 0, "shrinkB": 6, "relpos": (0, 0.5)}
        if leader
        else None,
        zorder=8,
    )


def _label_curves(axes: Axes, study: Study, styles: dict[str, Look], colours: Colours) -> None:
    """The names of the methods the report speaks of, below their marks and below each other."""
    equal = study.equal
    lead = equal.lead() or "imsm"
    named = {lead: "", equal.reference or "peft": "", equal.best or lead: ""}
    tops = []
    for method in named:
        places = [p for row in study.curve(method) if row.method == method and (p := _place(study, row, "all"))]
        if places:
            tops.append((max(places, key=lambda p: p[1] if study.higher_is_better else -p[1]), method))
    marks = [axes.transData.transform(place) for place, _ in tops]
    right = axes.transAxes.transform((1.0, 0.0))[0]
    # From the right, so that no leader runs through the name of another.
    for step, (place, method) in enumerate(sorted(tops, reverse=True), start=1):
        text = shortened(study.label(method), 30)
        x, y = axes.transData.transform(place)
        # Text of about seven pixels a letter must end inside the panel.
        across = 14 + min(0.0, right - x - 16 - 7 * len(text))
        down = max(top for _, top in marks) - y - LABEL_STEP * step
        colour = colours[styles[method].colour] if styles[method].strong else colours["muted"]
        _write(axes, text, place, (across, down), colour, colours["card"], leader=True)


def _legend_rows(study: Study, width: float) -> int:
    return -(-len(study.methods()) // max(int(width // LEGEND_COLUMN), 1))


def _draw_legend(figure: Figure, study: Study, styles: dict[str, Look], colours: Colours, width: float) -> None:
    handles = []
    for method in sorted(study.methods(), key=lambda method: not styles[method].strong):
        look = styles[method]
        colour = colours[look.colour]
        face, edge = (colours["card"], colour) if look.sweep else (colour, colours["card"])
        label = shortened(study.label(method), 34)
        mark = Line2D(
            [], [], color=colour, lw=1.3 if look.sweep else 0, marker=look.marker, mfc=face, mec=edge, label=label
        )
        mark.set(markersize=6 if look.sweep else 9, markeredgewidth=1.3)
        handles.append(mark)
    figure.legend(
        handles=handles,
        loc="lower left",
        ncols=max(int(width // LEGEND_COLUMN), 1),
        bbox_to_anchor=(LEFT / width - 0.02, 0.0),
        frameon=False,
        labelcolor=colours["ink"],
        fontsize=SMALL,
        handlelength=2,
        columnspacing=1.4,
    )
