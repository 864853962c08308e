"""`twinweave evaluate`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..evaluation import TaskScore, evaluate_tasks, resolve_task
from ..files import write_json_atomic
from .lm_eval import score_beside_base
from .shared import MemoryOption, RetentionOption, dialled, open_run, out


def evaluate(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run, or of one of its models.")],
    task: Annotated[list[str] | None, typer.Option(help="A known task or a task file; may be repeated.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Score only the first rows of each task.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows scored at once.")] = None,
    base: Annotated[str | None, typer.Option(help="Where the base lies now, if it has moved.")] = None,
    memory: MemoryOption = None,
    retention: RetentionOption = None,
    lm_eval: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness instead, with commas between them.")
    ] = None,
    lm_eval_path: Annotated[
        Path | None, typer.Option(help="A folder with YAML tasks of your own for --lm-eval.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the scores to this file.")] = None,
) -> None:
    """Score a trained model, on its recipe's tasks or on others.

    With `--lm-eval` its base is scored too, and the scores are added to the run's results.json.

    Example: `twinweave evaluate runs/reverse --task my_task.yaml --retention 1.5`
    """
    scored: dict[str, Any] = {}
    if lm_eval is not None:
        scored["lm_eval"] = score_beside_base(
            run,
            lm_eval,
            lm_eval_path,
            base=base,
            memory=memory,
            retention=retention,
            limit=limit,
            batch_size=batch_size,
        )
    if lm_eval is None or task:
        model, tokenizer, recipe = open_run(run, base)
        tasks = [resolve_task(name) for name in task] if task else [recipe.target, *recipe.retained]
        if limit is not None:
            tasks = [t.model_copy(update={"limit": min(limit, t.limit or limit)}) for t in tasks]
        with dialled(model, memory, retention):
            size = batch_size or recipe.evaluation.batch_size
            scores = evaluate_tasks(model, tokenizer, tasks, batch_size=size, read=recipe.documents())
        out.print(_table(scores))
        scored |= {name: {"metrics": score.metrics, "count": score.count} for name, score in scores.items()}
    if json is not None:
        write_json_atomic(json, scored)


def _table(scores: dict[str, TaskScore]) -> Table:
    table = Table("task", "metric", "score", "rows")
    for name, score in scores.items():
        for metric, value in score.metrics.items():
            table.add_row(name, metric, f"{value:.4f}", str(score.count))
    return table
