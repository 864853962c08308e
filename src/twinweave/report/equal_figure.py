"""Forgetting at equal target as a figure: one row per method with its 95 % interval, near and far tasks apart.

Knows nothing about HTML and nothing about the other figures.
"""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .canvas import SMALL, TEXT, Colours, Look, add_axes, empty_figure, looks, name_axes, shortened
from .equal_finding import reference_name
from .equal_target import Cost
from .frontier import TITLES, WIDTH
from .palette import SENTINEL
from .study import Study, part_unit
from .units import interval, number, quantity, scaled, unit_word

NAMES, RIGHT, TOP, BOTTOM, GAP, ROW = 258.0, 14.0, 34.0, 46.0, 26.0, 25.0


def equal_figure(study: Study, colours: Colours = SENTINEL) -> Figure | None:
    """A panel for all retained tasks and one per family, least forgetting on top; None without an equal target."""
    methods, parts = study.equal.ranked(), study.equal.parts
    if not parts:
        return None
    styles = looks(study)
    inner = ROW * len(methods)
    figure = empty_figure(WIDTH, inner + TOP + BOTTOM)
    room = (WIDTH - NAMES - RIGHT - GAP * (len(parts) - 1)) / len(parts)
    for place, part in enumerate(parts):
        axes = add_axes(figure, (NAMES + place * (room + GAP), TOP, room, inner), colours)
        axes.grid(visible=False, axis="y")
        axes.axvline(0, color=colours["rule"], lw=1.4, zorder=1)
        for row, method in enumerate(methods):
            axes.axhline(row, color=colours["grid"], lw=1, zorder=0)
            cost = study.equal.at_target[method].costs.get(part)
            if cost is not None:
                _draw(axes, row, cost, part_unit(study, part), styles[method], colours)
            elif place == 0:
                _say(axes, row, "does not reach the target", colours)
        axes.set_ylim(len(methods) - 0.5, -0.5)
        axes.set_yticks([])
        axes.margins(x=0.06)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_title(TITLES[part], loc="left", color=colours["ink"], fontsize=TEXT, pad=10)
        name_axes(axes, "", unit_word(part_unit(study, part)), colours)
        if place == 0:
            for row, method in enumerate(methods):
                _name(axes, row, study.label(method), styles[method], colours)
    return figure


def equal_figure_label(study: Study) -> str:
    """The figure in words, for readers who do not see it."""
    unit = study.forgetting_unit
    parts = []
    for method in study.equal.ranked():
        cost = study.equal.at_target[method].costs.get("all")
        within = f" (95% interval {interval(cost.ci, unit)})" if cost and cost.ci else ""
        forgets = f"{quantity(cost.mean, unit)}{within}" if cost else "target not reached"
        parts.append(f"{study.label(method)} {forgets}")
    families = [part for part in study.equal.parts if part != "all"]
    lead = study.equal.lead()
    costs = study.equal.at_target[lead].costs if lead else {}
    apart = [f"{part} {number(costs[part].mean, part_unit(study, part))}" for part in families if part in costs]
    tail = f" {study.label(lead)}, near and far apart: {', '.join(apart)}." if lead and apart else ""
    return f"Forgetting at {reference_name(study)}'s target: {'; '.join(parts)}.{tail}"


def _draw(axes: Axes, row: int, cost: Cost, unit: str, look: Look, colours: Colours) -> None:
    colour, x = colours[look.colour], scaled(cost.mean, unit)
    if cost.ci is not None:
        axes.plot([scaled(bound, unit) for bound in cost.ci], [row, row], color=colour, lw=2 if look.strong else 1.2)
    face, edge = (colours["card"], colour) if look.sweep else (colour, colours["card"])
    axes.plot(x, row, look.marker, ms=8.5 if look.strong else 7, color=face, mec=edge, mew=1.3, zorder=4)


def _say(axes: Axes, row: int, text: str, colours: Colours) -> None:
    axes.annotate(
        text,
        (0.03, row),
        xycoords=("axes fraction", "data"),
        va="center",
        color=colours["muted"],
        fontsize=SMALL,
        style="italic",
    )


def _name(axes: Axes, row: int, label: str, look: Look, colours: Colours) -> None:
    axes.annotate(
        shortened(label, 38),
        (0, row),
        (-14, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        annotation_clip=False,
        ha="right",
        va="center",
        color=colours[look.colour] if look.strong else colours["ink"],
        fontsize=TEXT,
    )
