"""The frontier of finished cells: each method's curve, and its forgetting at plain PEFT's target, over seeds.

Knows nothing about models and nothing about how the numbers are shown. What they mean is in docs/results.md.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from ..evaluation import METRICS, Paired, forgetting, mean_along, mean_ci95, mixed, mixture_at
from ..methods import get_method, label_of
from ..training import Recipe

REFERENCE = "peft"
FAMILIES = ("all", "near", "far")
Cell = dict[str, Any]
# Target scores that differ by less are called equal: a point of a score, and this share of what plain PEFT gains where
# the target is a loss.
_POINT, _SHARE = 0.01, 0.02
# A method that reaches the target less often is no baseline to be compared with.
_OFTEN = 0.5
_BASE: Cell = {"gain": 0.0, "lost": dict.fromkeys(FAMILIES, 0.0)}


def forgetting_by_family(recipe: Recipe, base: dict[str, Any], cell: Cell) -> dict[str, float | None]:
    """Mean forgetting over the near and over the far retained tasks; None for a family without tasks."""
    found: dict[str, float | None] = {}
    for family in FAMILIES[1:]:
        tasks = [task for task in recipe.retained if task.family == family]
        before = {task.name: base["scores"][task.name][task.metric] for task in tasks}
        after = {task.name: cell["retained"][task.name][task.metric] for task in tasks}
        found[family] = forgetting(before, after, {t.name: t.higher_is_better for t in tasks}) if tasks else None
    return found


def frontier(recipe: Recipe, base: dict[str, Any], cells: Sequence[Cell]) -> dict[str, Any] | None:
    """The part "frontier" of results.json; None where no retained task was measured.

    `cells` have their `forgetting_by_family`.
    """
    if not recipe.retained:
        return None
    sign = 1.0 if recipe.target.higher_is_better else -1.0
    cells = [
        cell
        | {
            "gain": sign * (cell["target_score"] - base["target_score"]),
            "lost": {"all": cell["forgetting"], **cell["forgetting_by_family"]},
        }
        for cell in cells
    ]
    methods = list(dict.fromkeys(cell["method"] for cell in cells))
    curves = {method: [cell for cell in cells if _on_curve(cell, method)] for method in methods}
    reference = _reference(cells)
    tolerance = _tolerance(recipe, reference)
    levels = {cell["seed"]: cell["gain"] - (tolerance or 0.0) for cell in reference}
    level = fmean(levels.values()) if levels else None
    entries = [
        {"method": method, "label": label_of(method, recipe.peft_type), "points": _points(curves[method])}
        | {"equal_target": None, "area": None}
        for method in methods
    ]
    best = None
    if level is not None and level > 0:
        best = _compare(entries, curves, reference, levels)
    return {
        "reference": {"method": reference[0]["method"], "setting": reference[0]["setting"]} if reference else None,
        "best_baseline": best,
        "tolerance": tolerance,
        "level": level,
        "target": None if level is None else base["target_score"] + sign * level,
        "methods": entries,
    }


def _on_curve(cell: Cell, method: str) -> bool:
    """Its own cells, those of the method it dials, and plain PEFT where the knob multiplies what plain PEFT has."""
    dial = get_method(method).dial
    of = {method} | ({dial.of} if dial else set()) | ({REFERENCE} if _is_plain(method) else set())
    return cell["method"] in of


def _is_plain(method: str) -> bool:
    """Whether it is plain PEFT, or plain PEFT at other rates or steps, of which the multiple 1 is plain PEFT."""
    entry, plain = get_method(method), get_method(REFERENCE)
    return entry.build is plain.build and entry.term is None  # OFT at another rate is no plain PEFT


def _reference(cells: Sequence[Cell]) -> list[Cell]:
    """The cells of plain PEFT at the setting of the best mean target; of equal ones, that which forgets less."""
    plain = [group for group in _by_setting(cells) if _is_plain(group[0]["method"])]
    if all(group[0]["method"] != REFERENCE for group in plain):
        return []
    most = max(map(len, plain))
    complete = [group for group in plain if len(group) == most]
    return max(complete, key=lambda group: (round(_mean(group, "gain"), 9), -_mean(group, "forgetting")))


def _tolerance(recipe: Recipe, reference: Sequence[Cell]) -> float | None:
    """In the unit of the target; None without a reference to take a share of."""
    if METRICS[recipe.target.metric].unit == "fraction":
        return _POINT
    return _SHARE * max(_mean(reference, "gain"), 0.0) if reference else None


def _by_setting(cells: Sequence[Cell]) -> list[list[Cell]]:
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell["method"], *sorted(cell["setting"].items())), []).append(cell)
    return list(groups.values())


def _mean(group: Sequence[Cell], key: str) -> float:
    return fmean(cell[key] for cell in group)


def _points(curve: Sequence[Cell]) -> list[dict[str, Any]]:
    """The settings of a curve as means over seeds, gains rising."""
    points = []
    for group in _by_setting(curve):
        gain, gain_ci95 = mean_ci95([cell["gain"] for cell in group])
        lost, lost_ci95 = mean_ci95([cell["forgetting"] for cell in group])
        points.append(
            {
                "method": group[0]["method"],
                "setting": group[0]["setting"],
                "seeds": len(group),
                "target_mean": _mean(group, "target_score"),
                "gain_mean": gain,
                "gain_ci95": gain_ci95,
                "forgetting_mean": lost,
                "forgetting_ci95": lost_ci95,
                "forgetting_by_family": {
                    family: None if None in (known := [cell["lost"][family] for cell in group]) else fmean(known)
                    for family in FAMILIES[1:]
                },
            }
        )
    return sorted(points, key=lambda point: point["gain_mean"])


def _compare(
    entries: list[dict[str, Any]],
    curves: dict[str, list[Cell]],
    reference: Sequence[Cell],
    levels: dict[int, float],
) -> str | None:
    """Fill in `equal_target` and `area` of every entry; returns the best method without a second memory."""
    own = {kind: _over_seeds(reference, levels, kind) for kind in ("equal_target", "area")}
    found = {name: {kind: _over_seeds(curve, levels, kind) for kind in own} for name, curve in curves.items()}
    reached = {name: _reached(values["equal_target"]["all"]) for name, values in found.items()}
    # A mean over the few lucky seeds that reach the target says little.
    ranks = {
        name: (-min(reached[name], _OFTEN), mean[0])
        for name, values in found.items()
        if not name.startswith("imsm") and (mean := values["equal_target"]["all"].mean())
    }
    best = min(ranks, key=lambda name: ranks[name], default=None)
    for entry in entries:
        name = entry["method"]
        for kind, values in found[name].items():
            entry[kind] = {"seeds": len(levels), "reached": reached[name]} | {
                family: _statistics(
                    value,
                    None if name == reference[0]["method"] == REFERENCE else own[kind][family],
                    None if best is None or name == best else found[best][kind][family],
                )
                for family, value in values.items()
            }
    return best


def _reached(value: Paired) -> float:
    return sum(known is not None for known in value.values) / len(value.values)


def _over_seeds(curve: Sequence[Cell], levels: dict[int, float], kind: str) -> dict[str, Paired]:
    """Forgetting at the level of each seed, or on the way there, for all retained tasks and for each family.

    Near and far are those of the same mixture that forgets least of all tasks together: one system, not the best for
    each.
    """
    found: dict[str, list[float | None]] = {family: [] for family in FAMILIES}
    for seed, level in levels.items():
        cells = [_BASE, *(cell for cell in curve if cell["seed"] == seed)]
        points = [(cell["gain"], cell["lost"]["all"]) for cell in cells]
        mixture = mixture_at(points, level)
        for family in FAMILIES:
            values = [cell["lost"][family] for cell in cells]
            if mixture is None or None in values:
                found[family].append(None)
            elif kind == "area":
                found[family].append(mean_along(points, level, values))
            else:
                found[family].append(mixed(mixture, values))
    return {family: Paired(tuple(values)) for family, values in found.items()}


def _statistics(value: Paired, reference: Paired | None, best: Paired | None) -> dict[str, Any] | None:
    mean = value.mean()
    if mean is None:
        return None
    return {
        "mean": mean[0],
        "ci95": mean[1],
        "n": sum(known is not None for known in value.values),
        "against_reference": reference and value.against(reference),
        "against_best": best and value.against(best),
    }
