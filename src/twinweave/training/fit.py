"""Training one method on one seed: from a recipe to the folders `best` and `last`.

Knows nothing about tasks, scores or other methods. A folder that holds `training.json` is finished; otherwise training
goes on from its last whole checkpoint.
"""

import contextlib
import json
import math
import resource
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed

from ..data import CompletionCollator, TrainingData, prepare_training_data
from ..errors import DataError, RecipeError
from ..evaluation import read_examples
from ..files import atomic_directory, write_json_atomic
from ..methods import Method
from . import checkpoints
from .base import free_memory, load_base, load_window
from .frozen_choice import frozen_store_for, remove_store
from .recipe import Recipe, TrainingSection
from .trainer import TwinweaveTrainer

FINISHED = "training.json"


@dataclass(frozen=True)
class Training:
    """What training one model took and how its losses went. Losses are nats per trained token."""

    train_seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    trainable_parameters: int
    steps: int
    best_step: int
    best_validation_loss: float | None
    last_validation_loss: float | None
    curve: dict[str, list[list[float]]]


def fit(
    recipe: Recipe,
    method: Method,
    seed: int,
    data: TrainingData,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    frozen_folder: Path | None = None,
) -> Training:
    """Train `method` on `data` and leave the models `folder/best` and `folder/last`. Raises TrainingError.

    `frozen_folder`: where trainings on the same rows share the store that `training.frozen_store=auto` makes; whoever
    gives it removes it. Without it the store is the training's own.
    """
    finished = folder / FINISHED
    if finished.is_file():
        return Training(**json.loads(finished.read_text(encoding="utf-8")))
    assert method.build is not None
    section = recipe.training
    steps = total_steps(section, len(data.train))
    set_seed(seed)
    base = load_base(recipe.base)
    model = method.build(base, recipe.peft_config(steps), recipe.imsm_config())
    arguments, collator = _arguments(section, seed, steps, folder, data), CompletionCollator(tokenizer)
    own_frozen_folder = folder / "frozen"
    trainer = TwinweaveTrainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.validation if len(data.validation) else None,
        data_collator=collator,
        frozen_store=frozen_store_for(
            section, model, data, collator, tokenizer, arguments, frozen_folder or own_frozen_folder
        ),
        own_learning_rates={p: getattr(section, key) for p, key in method.own_learning_rates.items()},
    )
    _reset_peak_memory()
    trainer.train_or_resume()
    with trainer.writing("the trained model"):
        model.save_pretrained(str(folder / "last"))
        _copy_model(trainer.best_checkpoint(), folder / "best")
    training = Training(
        train_seconds=trainer.seconds,
        tokens_per_second=trainer.tokens / trainer.seconds,
        peak_memory_bytes=_peak_memory(),
        trainable_parameters=model.get_nb_trainable_parameters()[0],
        **_losses(trainer),
    )
    write_json_atomic(finished, asdict(training))
    checkpoints.clear(folder)
    if frozen_folder is None:
        remove_store(own_frozen_folder, decision=True)
    del trainer, model, base
    free_memory()
    return training


def load_training_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, seed: int) -> TrainingData:
    """The recipe's rows as token ids; the seed decides which are held out for validation. Raises DataError."""
    section, target = recipe.train, recipe.target
    has_examples = target.kind in ("generation", "completion_loss")
    data = prepare_training_data(
        section.data,
        tokenizer,
        max_length=min(section.max_length, load_window(recipe.base)),
        prompt_template=section.prompt,
        completion_template=section.completion,
        validation=section.validation,
        validation_fraction=section.validation_fraction,
        test=read_examples(target) if has_examples else None,
        limit=section.limit,
        seed=seed,
        split=section.split,
    )
    if not len(data.train):
        raise DataError(f"{section.data} leaves no rows to train on. Give more rows, or a validation file.")
    return data


def total_steps(section: TrainingSection, rows: int) -> int:
    """How many optimizer steps the recipe asks for on so many training rows."""
    if section.max_steps is not None:
        return section.max_steps
    per_epoch = math.ceil(math.ceil(rows / section.batch_size) / section.gradient_accumulation)
    return math.ceil(per_epoch * section.epochs)


def _arguments(section: TrainingSection, seed: int, steps: int, folder: Path, data: TrainingData) -> TrainingArguments:
    by_epoch = section.evaluate_every == "epoch"
    interval = {} if by_epoch else {"eval_steps": section.evaluate_every, "save_steps": section.evaluate_every}
    strategy = "epoch" if by_epoch else "steps"
    try:
        return TrainingArguments(
            output_dir=str(folder),
            seed=seed,
            num_train_epochs=section.epochs,
            max_steps=section.max_steps or -1,
            per_device_train_batch_size=section.batch_size,
            per_device_eval_batch_size=section.batch_size,
            gradient_accumulation_steps=section.gradient_accumulation,
            learning_rate=section.learning_rate,
            optim=section.optimizer,
            weight_decay=section.weight_decay,
            lr_scheduler_type=section.scheduler,
            warmup_steps=round(section.warmup * steps),
            max_grad_norm=section.max_grad_norm,
            bf16=section.precision == "bf16",
            gradient_checkpointing=section.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if section.gradient_checkpointing else None,
            eval_strategy=strategy if len(data.validation) else "no",
            save_strategy=strategy,
            metric_for_best_model="loss" if len(data.validation) else None,
            greater_is_better=False,
            prediction_loss_only=True,
            logging_steps=section.log_every,
            report_to=section.report_to or "none",
            remove_unused_columns=False,
            label_names=["labels"],
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            use_cpu=not torch.accelerator.is_available(),
            **interval,  # type: ignore[arg-type]
        )
    except ValueError as error:
        raise RecipeError(f"training: {error}") from error


def _copy_model(checkpoint: Path, goal: Path) -> None:
    """The model's own files out of a checkpoint, without the optimizer and the trainer's state."""
    with atomic_directory(goal) as folder:
        for file in checkpoint.iterdir():
            if file.name.startswith(("adapter_", "imsm_")):
                shutil.copy2(file, folder / file.name)


def _losses(trainer: TwinweaveTrainer) -> dict[str, Any]:
    history = trainer.state.log_history
    train = [[entry["step"], entry["loss"]] for entry in history if "loss" in entry]
    validation = [[entry["step"], entry["eval_loss"]] for entry in history if "eval_loss" in entry]
    return {
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step or trainer.state.global_step,
        "best_validation_loss": min((loss for _, loss in validation), default=None),
        "last_validation_loss": validation[-1][1] if validation else None,
        "curve": {"train": train, "validation": validation},
    }


def _reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):  # Linux: forget the highest resident size, so that each model is measured alone
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory() -> int:
    """Bytes: the most that was allocated on the GPU, or the process's highest resident size on the CPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
