"""From finished cells to one results.json: averages, intervals over seeds, differences from plain PEFT.

Knows nothing about models. The schema is the one described in docs/results.md.
"""

from collections.abc import Iterable
from typing import Any

from ..evaluation import METRICS, Task, mean_ci95, paired_difference, retained_score
from ..methods import label_of
from ..training import Recipe
from .frontier import REFERENCE, forgetting_by_family, frontier
from .provenance import provenance

_OUTSIDE_RUNS = ("lens",)


def assemble(recipe: Recipe, base: dict[str, Any], cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole results.json. `cells` are records as `compare.run` makes them."""
    empty = {"train_seconds": 0.0, "tokens_per_second": 0.0, "peak_memory_bytes": 0, "trainable_parameters": 0,
             "curve": {"train": [], "validation": []}}  # fmt: skip
    counts = base.get("counts", {})
    # Derived here and not where a cell is scored: cells of earlier versions are kept on disk without it.
    cells = [cell | {"forgetting_by_family": forgetting_by_family(recipe, base, cell)} for cell in cells]
    return {
        "schema": 1,
        "name": recipe.name,
        "base": {key: value for key, value in base.items() if key != "counts"},
        "tasks": {
            task.name: _describe(task, "target" if task is recipe.target else "retained", counts.get(task.name, 0))
            for task in (recipe.target, *recipe.retained)
        },
        "runs": [empty | {k: v for k, v in cell.items() if k not in _OUTSIDE_RUNS} for cell in cells],
        "summary": [_summarise(recipe, group) for group in _groups(cells)],
        "comparisons": _comparisons(cells),
        "frontier": frontier(recipe, base, cells),
        "lens": [entry for cell in cells for entry in _lens(cell)],
        "recipe": recipe.to_dict(),
        "provenance": provenance(),
    }


def average_scores(recipe: Recipe, scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """`target_score`, the target's primary metric, and `retained_score`, the retained tasks' mean (losses negated)."""
    primary = {task.name: scores[task.name][task.metric] for task in recipe.retained}
    better = {task.name: task.higher_is_better for task in recipe.retained}
    return {
        "target_score": scores[recipe.target.name][recipe.target.metric],
        "retained_score": retained_score(primary, better) if primary else 0.0,
    }


def _describe(task: Task, role: str, count: int) -> dict[str, Any]:
    return {
        "role": role,
        "family": task.family,
        "kind": task.kind,
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "unit": METRICS[task.metric].unit,
        "count": count,
        "description": task.description,
    }


def _groups(cells: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Cells of the same method and setting, over seeds, in the order of their first appearance."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["method"], *sorted(cell["setting"].items())), []).append(cell)
    return list(groups.values())


def _summarise(recipe: Recipe, group: list[dict[str, Any]]) -> dict[str, Any]:
    target_mean, target_ci95 = mean_ci95([cell["target_score"] for cell in group])
    forgetting_mean, forgetting_ci95 = mean_ci95([cell["forgetting"] for cell in group])
    return {
        "method": group[0]["method"],
        "setting": group[0]["setting"],
        "label": label_of(group[0]["method"], recipe.peft_type),
        "seeds": len(group),
        "target_mean": target_mean,
        "target_ci95": target_ci95,
        "forgetting_mean": forgetting_mean,
        "forgetting_ci95": forgetting_ci95,
    }


def _comparisons(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every group against plain PEFT, paired by seed."""
    reference = {cell["seed"]: cell for cell in cells if cell["method"] == REFERENCE}
    found = []
    for group in _groups(cells):
        pairs = [(cell, reference[cell["seed"]]) for cell in group if cell["seed"] in reference]
        if group[0]["method"] == REFERENCE or not pairs:
            continue
        found.append(
            {
                "method": group[0]["method"],
                "setting": group[0]["setting"],
                "against": REFERENCE,
                "seeds": len(pairs),
                "target_difference": _difference(pairs, "target_score"),
                "forgetting_difference": _difference(pairs, "forgetting"),
            }
        )
    return found


def _difference(pairs: list[tuple[dict[str, Any], dict[str, Any]]], key: str) -> dict[str, Any]:
    return dict(paired_difference([cell[key] for cell, _ in pairs], [other[key] for _, other in pairs]))


def _lens(cell: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"method": cell["method"], "seed": cell["seed"], **entry} for entry in cell.get("lens", [])]
