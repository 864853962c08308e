"""`twinweave evaluate`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..evaluation import evaluate_tasks, resolve_task
from ..files import write_json_atomic
from .shared import MemoryOption, RetentionOption, dialled, open_run, out


def evaluate(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run, or of one of its models.")],
    task: Annotated[list[str] | None, typer.Option(help="A known task or a task file; may be repeated.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Score only the first rows of each task.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows scored at once.")] = None,
    base: Annotated[str | None, typer.Option(help="Where the base lies now, if it has moved.")] = None,
    memory: MemoryOption = None,
    retention: RetentionOption = None,
    json: Annotated[Path | None, typer.Option(help="Also write the scores to this file.")] = None,
) -> None:
    """Score a trained model, on its recipe's tasks or on others.

    Example: `twinweave evaluate runs/reverse --task my_task.yaml --retention 1.5`
    """
    model, tokenizer, recipe = open_run(run, base)
    tasks = [resolve_task(name) for name in task] if task else [recipe.target, *recipe.retained]
    if limit is not None:
        tasks = [t.model_copy(update={"limit": min(limit, t.limit or limit)}) for t in tasks]
    with dialled(model, memory, retention):
        scores = evaluate_tasks(model, tokenizer, tasks, batch_size=batch_size or recipe.evaluation.batch_size)
    table = Table("task", "metric", "score", "rows")
    for name, score in scores.items():
        for metric, value in score.metrics.items():
            table.add_row(name, metric, f"{value:.4f}", str(score.count))
    out.print(table)
    if json is not None:
        write_json_atomic(json, {name: {"metrics": s.metrics, "count": s.count} for name, s in scores.items()})
