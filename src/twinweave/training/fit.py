"""Training one method on one seed: from a recipe to the folders `best` and `last`.

Knows nothing about tasks, scores or other methods. A folder that holds `training.json` is finished; otherwise training
goes on from its last whole checkpoint.
"""

import contextlib
import json
import math
import os
import resource
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.integrations import is_deepspeed_available

from ..data import Collator, TrainingData, collator_for
from ..errors import RecipeError, TrainingError
from ..files import atomic_directory, write_json_atomic
from ..imsm import DomainGuard, GuardSettings, IMSMModel, fit_guard
from ..imsm.labels import FrozenStates
from ..imsm.saving import write_guard
from ..methods import Method, Model
from ..processes import is_first, process_count, wait_for
from ..progress import track
from ..rehearsal import Materials, RehearsalRows, Term
from . import checkpoints
from .base import free_memory, load_base
from .frozen_choice import frozen_store_for, rehearsal_store_folder, remove_store
from .frozen_store import FrozenStore
from .recipe import Recipe, TrainingSection
from .trainer import TwinweaveTrainer

FINISHED = "training.json"
PUBLISHED_GATE_RATE, PUBLISHED_WIDTH = 1e-3, 4096
_GUARDED_ROWS = 10_000  # more training rows move the guard's few statistics by less than validation can tell


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
    *,
    setting: Mapping[str, float] | None = None,
    rehearsal: RehearsalRows | None = None,
    frozen_folder: Path | None = None,
) -> Training:
    """Train `method` on `data` and leave the models `folder/best` and `folder/last`. Raises TrainingError.

    `setting`: knob -> value, where the method has one. `rehearsal`: general text for methods that use it.
    `frozen_folder`: where trainings on the same rows share the store that `training.frozen_store=auto` makes; whoever
    gives it removes it. Without it the store is the training's own.
    """
    finished = folder / FINISHED
    if finished.is_file():
        return Training(**json.loads(finished.read_text(encoding="utf-8")))
    assert method.build is not None
    multiple = partial(_multiple, method, setting or {})
    section = _at_setting(recipe.training, multiple, len(data.train))
    steps = total_steps(section, len(data.train))
    set_seed(seed)
    base = load_base(recipe.base)
    materials = Materials(seed, steps, multiple("term"), rehearsal)
    model = method.build(base, recipe.adapter(steps), recipe.settings(), materials)
    trainable = model.get_nb_trainable_parameters()[0]  # of the whole model, which may be spread over processes later
    if not trainable:
        return _as_it_is(model, folder)
    arguments, collator = _arguments(section, seed, steps, folder, data), collator_for(data, tokenizer)
    stores = partial(frozen_store_for, section, model, tokenizer=tokenizer, arguments=arguments, collator=collator)
    own_frozen_folder = folder / "frozen"
    frozen = _frozen_folder(section, frozen_folder or own_frozen_folder)
    rows = datasets.concatenate_datasets([data.train, data.validation])
    trainer = TwinweaveTrainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.validation if len(data.validation) else None,
        data_collator=collator,
        term=_term(method, model, materials, partial(stores, folder=rehearsal_store_folder(frozen))),
        frozen_store=stores(rows, readings=_readings(section, len(data.train), arguments.world_size), folder=frozen),
        own_learning_rates=(
            {"gate.": multiple("gate_learning_rate") * _gate_rate(section, model)}
            if isinstance(model, IMSMModel)
            else {}
        ),
    )
    guard = None
    if isinstance(model, IMSMModel) and method.guarded and recipe.guard is not None and is_first():
        # before the training, which may spread the base over processes; it depends on the base and the rows alone
        guard = _fitted_guard(model, data, collator, section.batch_size, recipe.guard)
        model.guard = None
    _reset_peak_memory()
    trainer.train_or_resume()
    state = trainer.gathered_state()
    training = Training(
        train_seconds=trainer.seconds,
        tokens_per_second=trainer.tokens_of_all() / trainer.seconds,
        peak_memory_bytes=_peak_memory(),
        trainable_parameters=trainable,
        **_losses(trainer),
    )
    if is_first():
        with trainer.writing("the trained model"):
            model.save_pretrained(str(folder / "last"), state_dict=state)
            if guard is not None:
                write_guard(guard, folder / "last")
            _copy_model(trainer.best_checkpoint(), folder / "best", guard)
        write_json_atomic(finished, asdict(training))
        checkpoints.clear(folder)
        if frozen_folder is None:
            remove_store(own_frozen_folder, decision=True)
    wait_for(finished)
    del trainer, model, base
    free_memory()
    return training


def _as_it_is(model: Model, folder: Path) -> Training:
    """An adapter that is left as it was found."""
    nothing: dict[str, list[list[float]]] = {"train": [], "validation": []}
    training = Training(0.0, 0.0, _peak_memory(), 0, 0, 0, None, None, nothing)
    if is_first():
        for name in ("best", "last"):
            model.save_pretrained(str(folder / name))
        write_json_atomic(folder / FINISHED, asdict(training))
    wait_for(folder / FINISHED)
    return training


def _frozen_folder(section: TrainingSection, folder: Path) -> Path:
    return folder if section.frozen_store in ("auto", "off") else Path(section.frozen_store)


def _term(method: Method, model: Model, materials: Materials, store: Callable[..., FrozenStore | None]) -> Term | None:
    """What the method adds to the loss; `store` makes one of rehearsed rows, where it is worth it."""
    if method.term is None:
        return None
    if (general := materials.rehearsal) is not None:
        readings = materials.steps / general.settings.every * general.batch_size / len(general.rows)
        if (stored := store(general.rows, readings=readings)) is not None:
            materials = replace(materials, frozen=partial(_stored, stored))
    return method.term(model, materials)


def _gate_rate(section: TrainingSection, model: IMSMModel) -> float:
    return section.gate_learning_rate or PUBLISHED_GATE_RATE * math.sqrt(PUBLISHED_WIDTH / model.gate.hidden_size)


def _multiple(method: Method, setting: Mapping[str, float], of: str) -> float:
    """What the method's knob multiplies `of` by."""
    return setting.get(method.knob.name, 1.0) if method.knob and method.knob.multiplies == of else 1.0


def _at_setting(section: TrainingSection, multiple: Callable[[str], float], rows: int) -> TrainingSection:
    changed: dict[str, float] = {"learning_rate": section.learning_rate * multiple("learning_rate")}
    if (share := multiple("steps")) != 1:
        changed["max_steps"] = max(1, round(share * total_steps(section, rows)))
    return section.model_copy(update=changed)


def _readings(section: TrainingSection, rows: int, processes: int) -> float:
    """How often a training reads each of its rows."""
    if section.max_steps is None:
        return section.epochs
    return section.max_steps * section.batch_size * section.gradient_accumulation * processes / rows


def _stored(store: FrozenStore, batch: Mapping[str, Tensor]) -> FrozenStates:
    labels = batch["labels"]
    return store.batch(
        batch["input_ids"], batch["attention_mask"], labels, device=labels.device, query_mask=batch["query_mask"]
    )


def total_steps(section: TrainingSection, rows: int) -> int:
    """How many optimizer steps the recipe asks for on so many training rows."""
    if section.max_steps is not None:
        return section.max_steps
    per_epoch = math.ceil(math.ceil(rows / (section.batch_size * process_count())) / section.gradient_accumulation)
    return math.ceil(per_epoch * section.epochs)


def _arguments(section: TrainingSection, seed: int, steps: int, folder: Path, data: TrainingData) -> TrainingArguments:
    by_epoch = section.evaluate_every == "epoch"
    interval = {} if by_epoch else {"eval_steps": section.evaluate_every, "save_steps": section.evaluate_every}
    strategy = "epoch" if by_epoch else "steps"
    wants_deepspeed = section.deepspeed is not None or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if wants_deepspeed and not is_deepspeed_available():
        raise TrainingError("DeepSpeed is asked for and is not installed here. Install it: pip install deepspeed")
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
            deepspeed=section.deepspeed,
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


def _fitted_guard(
    model: IMSMModel, data: TrainingData, collator: Collator, batch_size: int, settings: GuardSettings
) -> DomainGuard:
    """The guard for the training rows, calibrated on the validation rows."""

    def batches(rows: datasets.Dataset, title: str) -> Iterator[dict[str, Tensor]]:
        for start in track(range(0, len(rows), batch_size), title):
            yield collator([rows[i] for i in range(start, min(start + batch_size, len(rows)))])

    train = data.train.shuffle(seed=0).select(range(min(len(data.train), _GUARDED_ROWS)))
    return fit_guard(
        model, batches(train, "domain guard"), batches(data.validation, "domain guard, calibration"), settings
    )


def _copy_model(checkpoint: Path, goal: Path, guard: DomainGuard | None) -> None:
    """The model's own files out of a checkpoint, without the optimizer and the trainer's state; and the guard."""
    with atomic_directory(goal) as folder:
        for file in checkpoint.iterdir():
            if file.name.startswith(("adapter_", "imsm_", "generator", "cmt")):
                shutil.copy2(file, folder / file.name)
        if guard is not None:
            write_guard(guard, folder)


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
