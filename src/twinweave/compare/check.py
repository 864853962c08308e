"""Checking a recipe against the world before anything is trained: does the base load, do the rows encode?"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch

from ..data import TrainingData
from ..errors import DataError, RecipeError, UnsupportedModelError
from ..evaluation import Task
from ..evaluation.rows import read_choices, read_examples, read_pairs, read_texts
from ..imsm.checks import check_adapter, check_base
from ..methods import Method, get_method
from ..rehearsal import RehearsalSettings, is_chat, read_sequences
from ..training import Recipe, free_memory, load_base, load_tokenizer, load_training_data, reading_size
from ..training.fit import total_steps

_READERS: dict[str, Callable[[Task], Sequence[Any]]] = {
    "generation": read_examples,
    "completion_loss": read_examples,
    "multiple_choice": read_choices,
    "minimal_pairs": read_pairs,
    "text_loss": read_texts,
}

_READ_WHOLE_WEIGHTS = ("peft_osf", "peft_corda", "peft_l2", "peft_ewc")


def check_recipe(recipe: Recipe) -> list[tuple[str, str]]:
    """(part, what was found) for each part of the recipe. Raises the error that a run would end with."""
    tokenizer = load_tokenizer(recipe.base)
    methods = [get_method(name) for name in dict.fromkeys((recipe.method, *recipe.methods))]
    kinds = dict.fromkeys(reading_size(recipe, method) for method in methods if method.build is not None)
    data = {reads: load_training_data(recipe, tokenizer, recipe.seeds[0], reads=reads) for reads in kinds}
    return check_run(recipe, methods, data)


def check_run(
    recipe: Recipe, methods: Sequence[Method], data: Mapping[int | None, TrainingData]
) -> list[tuple[str, str]]:
    """As `check_recipe`, for these methods and rows that are encoded already, for each of their reading sizes."""
    steps = {reads: total_steps(recipe.training, len(of_kind.train)) for reads, of_kind in data.items()}
    report = next(iter(data.values())).report
    rows = [(task, len(_READERS[task.kind](task))) for task in (recipe.target, *recipe.retained)]
    model: Any = load_base(recipe.base)
    check_base(model)
    _check_causal(model)
    check_adapter(recipe.peft_config(max(steps.values())))
    found = [
        ("base", f"{type(model).__name__}, {model.num_parameters():,} parameters, {_precision(recipe)}"),
        (
            "train",
            f"{report.train_rows:,} rows, {report.validation_rows:,} to validate on, {report.cut_rows:,} cut; "
            f"{' or '.join(f'{count:,}' for count in dict.fromkeys(steps.values()))} steps",
        ),
    ]
    if recipe.rehearsal is not None and any(method.rehearses != "never" for method in methods):
        found.append(("rehearsal", _check_rehearsal(recipe, recipe.rehearsal)))
    for method in methods:
        if method.rehearses == "always" and recipe.rehearsal is None:
            raise RecipeError(f"rehearsal: {method.name} needs general text, and the recipe's rehearsal is off.")
        if method.name in _READ_WHOLE_WEIGHTS and _is_quantised(model):
            raise RecipeError(
                f"methods: {method.name} computes with the base's weights, and this base is quantised. Leave the "
                "method out, or base.quantization."
            )
        if method.build is not None:
            # the weights of a saved adapter cannot be loaded onto nothing, and what reads is found by running the base
            whole = method.reads is not None or recipe.saved_adapter is not None
            bare = load_base(recipe.base) if whole else _without_weights(model)
            built = method.build(bare, recipe.adapter(steps[reading_size(recipe, method)]), recipe.settings())
            found.append((f"method {method.name}", f"{built.get_nb_trainable_parameters()[0]:,} parameters to train"))
            for dialled in methods:
                if dialled.dial and dialled.dial.of == method.name and not dialled.guarded:  # no guard is fitted yet
                    with dialled.dial.apply(built, 1.0):
                        pass
    found += [(f"task {task.name}", f"{count:,} rows, {', '.join(task.metrics)}") for task, count in rows]
    if read := recipe.documents():
        found.append(("evaluation.read", f"{len(read):,} documents"))
    elif recipe.target.context is None:
        found += [("warning", _reads_nothing(recipe.target, method)) for method in methods if method.reads]
    found += [("warning", warning) for warning in report.warnings]
    free_memory()
    return found


def _reads_nothing(target: Task, method: Method) -> str:
    return (
        f"Nothing is read for task {target.name}, so the score of {method.name} is the base's. Give the task a "
        "`context`, or name texts in evaluation.read."
    )


def _without_weights(base: Any) -> Any:
    """A base of the same structure: some adapters take long to be made of weights, and each wants a base of its own."""
    with torch.device("meta"):
        return type(base)._from_config(deepcopy(base.config), dtype=base.dtype)


def _is_quantised(base: Any) -> bool:
    return getattr(base.config, "quantization_config", None) is not None


def _precision(recipe: Recipe) -> str:
    base = recipe.base
    return base.dtype if base.quantization is None else f"{base.quantization} in {base.dtype}"


def _check_rehearsal(recipe: Recipe, settings: RehearsalSettings) -> str:
    """What there will be to rehearse. Raises DataError for text that cannot be read, or none at all."""
    tokenizer = load_tokenizer(recipe.base)
    kind = "conversations" if is_chat(tokenizer, settings) else "texts"
    own = len(read_sequences(tokenizer, settings)) if settings.text is not None else 0
    if not settings.sequences and not own:
        raise DataError("rehearsal leaves nothing to rehearse: give sequences, or text, or set rehearsal=off.")
    return f"{settings.sequences:,} {kind} that the base will write, {own:,} pieces of your own"


@torch.inference_mode()
def _check_causal(base: Any) -> None:
    """No config says reliably whether attention looks ahead (BERT has a causal class too), so the model is asked."""
    device = next(base.parameters()).device
    one, other = (torch.tensor([[1, 2, 3, last]], device=device) for last in (1, 2))
    first, second = (base(input_ids=ids).logits[:, :-1].float() for ids in (one, other))
    # LLM.int8 rounds every token by what is large in any of them
    tolerance = 1e-3 if not _is_quantised(base) else 0.1
    if (first - second).abs().max() > tolerance * first.abs().max():
        raise UnsupportedModelError(
            f"The base {base.config._name_or_path} ({type(base).__name__}) is not a causal language model: what it "
            "predicts depends on later tokens. Give a base that was trained to continue text."
        )
