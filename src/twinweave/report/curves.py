"""Learning curves, one small figure per method: train and validation loss, seeds thin and their mean thick.

Knows nothing about HTML and nothing about the other figures.
"""

from itertools import chain

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .canvas import Colours, empty_axes, looks, name_axes
from .palette import SENTINEL
from .study import Curve, Study
from .units import NATS, finite, number

KINDS = ("train", "validation")
WIDTH, HEIGHT = 280, 210
FEW = 12


def method_curves(study: Study, method: str) -> dict[str, list[Curve]]:
    """The method's curves by kind, one per seed; kinds that were not recorded are absent."""
    found: dict[str, list[Curve]] = {}
    for run in study.runs:
        if run["method"] == method and not run.get("setting"):
            for kind in KINDS:
                recorded = (run.get("curve") or {}).get(kind) or []
                known = [(finite(step), finite(loss)) for step, loss in recorded]
                curve = [(step, loss) for step, loss in known if step is not None and loss is not None]
                if curve:
                    found.setdefault(kind, []).append(sorted(curve))
    return found


def mean_curve(curves: list[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """The mean over seeds at every step that lies within all the curves, filled in linearly where needed."""
    steps = np.unique([step for curve in curves for step, _ in curve])
    first, last = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    inside = steps[(steps >= first) & (steps <= last)]
    steps = inside if len(inside) else steps
    return steps, np.mean([np.interp(steps, *np.array(curve).T) for curve in curves], axis=0)


def learning_curves(study: Study, method: str, colours: Colours = SENTINEL) -> Figure | None:
    """Loss over steps for one method, every method of a study in the same range; None without a curve."""
    curves = method_curves(study, method)
    if not curves:
        return None
    figure, axes = empty_axes(WIDTH, HEIGHT, (40, 30, 12, 42), colours)
    look = looks(study)[method]
    for kind, colour, dashes in (("train", colours["muted"], "--"), ("validation", colours[look.colour], "-")):
        seeds = curves.get(kind, [])
        for curve in seeds if len(seeds) > 1 else []:
            axes.plot(*zip(*curve, strict=True), color=colour, lw=0.8, alpha=0.5, zorder=2)
        if seeds:
            x, y = mean_curve(seeds)
            marked = len(x) == 1 or (kind == "validation" and len(x) <= FEW)
            marker = look.marker if marked else ""
            axes.plot(x, y, color=colour, lw=2, ls=dashes, marker=marker, ms=4.5, zorder=3)
    axes.set_ylim(*_shared_range(study))
    axes.margins(x=0.03)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    name_axes(axes, "Loss (nats per token)", "Step", colours)
    return figure


def learning_curves_label(study: Study, method: str) -> str:
    """The figure in words, for readers who do not see it."""
    parts = []
    for kind, curves in method_curves(study, method).items():
        _, y = mean_curve(curves)
        parts.append(f"{kind} loss from {number(float(y[0]), NATS)} to {number(float(y[-1]), NATS)} nats")
    return f"{study.label(method)}: {'; '.join(parts)}."


def _shared_range(study: Study) -> tuple[float, float]:
    """One vertical range for all methods, so that the figures can be compared by eye."""
    curves = chain.from_iterable(chain.from_iterable(method_curves(study, m).values()) for m in study.methods())
    losses = [loss for curve in curves for _, loss in curve]
    low, high = min(losses), max(losses)
    pad = 0.06 * max(high - low, 1e-3)
    return low - pad, high + pad
