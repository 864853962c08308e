"""`twinweave evaluate --lm-eval`: tasks of lm-evaluation-harness, beside the base, kept in the run's results.json."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.table import Table

from ..compare.store import add_lm_scores
from ..errors import UsageError
from ..imsm import IMSMConfig, IMSMModel
from ..training import load_base
from .shared import dialled, locate, open_run, out


def score_beside_base(
    run: Path,
    tasks: str,
    folder: Path | None,
    *,
    base: str | None,
    memory: str | None,
    retention: float | None,
    limit: int | None,
    batch_size: int | None,
) -> list[dict[str, Any]]:
    """Score the run's model and its base on `tasks`, show both, and write them into the run's results.json."""
    from ..evaluation.lm_eval import find_tasks, score_lm_tasks  # an optional package, and slow to load

    names = [name for part in tasks.split(",") if (name := part.strip())]
    if not names:
        raise UsageError(f"--lm-eval is '{tasks}'; name at least one task.")
    if folder is not None and not folder.is_dir():
        raise UsageError(f"--lm-eval-path: there is no folder {folder}.")
    manager = find_tasks(names, str(folder) if folder is not None else None)
    trained, owner = locate(run)
    model, tokenizer, recipe = open_run(run, base)
    settings: dict[str, Any] = {"batch_size": batch_size or recipe.evaluation.batch_size, "limit": limit}
    with dialled(model, memory, retention):
        found = score_lm_tasks(model, tokenizer, names, manager, **settings)
    woven = isinstance(model, IMSMModel)
    # some plain adapters change the base's weights, so that switching them off gives something else
    with model.use_memory("original") if isinstance(model, IMSMModel) else nullcontext():
        alone = model if woven else load_base(recipe.base)
        before = score_lm_tasks(alone, tokenizer, names, manager, **settings)
    setting = {
        "model": str(trained.resolve().relative_to(owner.resolve())),
        "memory": memory or "interwoven" if woven else None,
        "retention": IMSMConfig(retention=model.retention).to_dict()["retention"] if woven else None,
        "limit": limit,
    }
    entries = [
        setting
        | {k: v for k, v in score.to_dict().items() if k != "value"}
        | {"score": score.value, "base": own.value, "base_stderr": own.stderr}
        | {"forgetting": _lost(own.value, score.value, score.higher_is_better)}
        for score, own in zip(found, before, strict=True)
    ]
    out.print(_table(entries))
    print(f"results: {add_lm_scores(owner, entries)}")
    return entries


def _lost(base: float | None, score: float | None, higher_is_better: bool) -> float | None:
    """By how much the score is worse than the base's."""
    if base is None or score is None:
        return None
    return base - score if higher_is_better else score - base


def _table(entries: list[dict[str, Any]]) -> Table:
    table = Table("task", "metric", "base", "model", "forgetting", "rows")
    for e in entries:
        base, score = _shown(e["base"], e["base_stderr"]), _shown(e["score"], e["stderr"])
        arrow = "↑" if e["higher_is_better"] else "↓"
        table.add_row(e["task"], f"{e['metric']} {arrow}", base, score, _shown(e["forgetting"]), str(e["count"]))
    return table


def _shown(value: float | None, stderr: float | None = None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" + (f" ± {stderr:.4f}" if stderr is not None else "")
