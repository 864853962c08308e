"""Checking a recipe against the world before anything is trained: does the base load, do the rows encode?"""

from ..evaluation.rows import task_rows
from ..imsm.model import check_adapter, check_base
from ..training import Recipe, load_base, load_tokenizer, load_training_data
from ..training.fit import total_steps


def check_recipe(recipe: Recipe) -> list[tuple[str, str]]:
    """(part, what was found) for each part of the recipe. Raises the error that a run would end with."""
    tokenizer = load_tokenizer(recipe.base)
    base = load_base(recipe.base)
    check_base(base)
    config = recipe.peft_config()
    check_adapter(config)
    found = [("base", f"{type(base).__name__}, {base.num_parameters():,} parameters, {recipe.base.dtype}")]
    data = load_training_data(recipe, tokenizer, recipe.seeds[0])
    report = data.report
    found.append(
        (
            "train",
            f"{report.train_rows:,} rows, {report.validation_rows:,} to validate on, {report.cut_rows:,} cut; "
            f"{total_steps(recipe.training, len(data.train)):,} steps",
        )
    )
    for task in (recipe.target, *recipe.retained):
        found.append((f"task {task.name}", f"{sum(1 for _ in task_rows(task)):,} rows, {', '.join(task.metrics)}"))
    found += [("warning", warning) for warning in report.warnings]
    return found
