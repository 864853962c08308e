"""transformers' Trainer with what it lacks: whole checkpoints, own learning rates, a stop at a loss that is no number.

Knows nothing about recipes, methods or scores.
"""

import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraModel, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..cmt import MemoryModel
from ..errors import DamagedFileError, TrainingError
from ..files import read_safetensors
from ..genadapter import GenerativeAdapter
from ..imsm import IMSMModel
from ..progress import progress_bar
from . import checkpoints
from .distractors import DistractorCallback
from .frozen_store import FrozenStore
from .term import TermTrainer

TRAINED_NAME = "trained.safetensors"
_ALLOCATOR = "adalora_allocator/"
# A run's settings cannot change halfway: what it measures would belong to neither of them.
_FIX_OF_A_BAD_LOSS = (
    "Lower training.learning_rate (or use training.precision=fp32) and start again with another output=FOLDER"
)
# Until the adapter has moved (a warm-up's first step has rate 0) the memories are equal, and the gate's gradient is
# zero only if they are so to the last bit. Stored states come from other batches: Adam would take their rounding for a
# gradient and make full steps of it. In bf16 the rounding outweighs the adapter for longer, so the warm-up is waited
# out: from then on, training with a store differs less from training without than other padding makes it differ.
_STEPS_BEFORE_STORE = 2
_ALLOCATOR_TABLES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class TwinweaveTrainer(TermTrainer):
    """A Trainer for adapters, used as transformers documents it.

    `own_learning_rates`: prefix of parameter names -> learning rate of those parameters.
    `frozen_store`: the original memory of every row of the data, read instead of running frozen passes once the
    warm-up is over. `term`: what the method adds to the task's loss, logged as `term`.
    After `train()`: `seconds` (of training, over all resumed parts) and `tokens` (trained on, padding excluded).
    """

    def __init__(
        self,
        *args: Any,
        own_learning_rates: Mapping[str, float] | None = None,
        frozen_store: FrozenStore | None = None,
        **kwargs: Any,
    ) -> None:
        self._own_learning_rates = dict(own_learning_rates or {})
        self._frozen_store = frozen_store
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self._bar = ProgressBarCallback()
        self.add_callback(self._bar)
        self.add_callback(LogAtCheckpointsCallback())
        learns = getattr(self.model, "trains_adapter", True)
        if learns and isinstance(getattr(self.model, "base_model", None), AdaLoraModel):
            self.add_callback(AdaLoraCallback())
        if isinstance(self.model, MemoryModel):
            self.add_callback(DistractorCallback())
        self.seconds = 0.0
        self.tokens = 0
        self._started = time.perf_counter()

    @property
    def run_folder(self) -> Path:
        """Where the run's checkpoints are."""
        return Path(str(self.args.output_dir))

    def train_or_resume(self) -> None:
        """Train to the end, from the last whole checkpoint if there is one. Raises TrainingError."""
        done = checkpoints.complete_checkpoints(self.run_folder)
        if done:
            facts = checkpoints.facts_of(done[-1])
            self.seconds, self.tokens = facts["seconds"], facts["tokens"]
        self._started = time.perf_counter()
        try:
            self.train(resume_from_checkpoint=str(done[-1]) if done else None)
        finally:
            self._bar.bar.stop()
        self.seconds += time.perf_counter() - self._started

    def best_checkpoint(self) -> Path:
        """The checkpoint with the lowest validation loss (the last one where nothing was validated)."""
        done = checkpoints.complete_checkpoints(self.run_folder)
        best = [p for p in done if p.name == f"checkpoint-{self.state.best_global_step}"]
        return (best or done)[-1]

    def tokens_of_all(self) -> int:
        """`tokens` of all processes together; to be asked in each of them."""
        counted = torch.tensor(self.tokens, device=self.args.device)
        return int(self.accelerator.reduce(counted))

    def gathered_state(self) -> dict[str, Tensor] | None:
        """The model's weights put together from all processes, for `save_pretrained`; None where each has them whole.
        To be asked in each process; the first one gets them."""
        return self.accelerator.get_state_dict(self.model_wrapped) if self._is_sharded else None

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Turn a failure to write within the block into a TrainingError that says what is safe.

        On a full disk only Python's own writes raise OSError; torch and safetensors have errors of their own.
        """
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = f"{what} could not be written ({_first_line(error)})"
            fix = f"See that the disk of {self.run_folder} has space and can be written to"
            raise TrainingError(self._stopped(reason, f"{fix}, then run the same command to go on")) from error

    # --- what differs from transformers ---------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in transformers, with a parameter group for each prefix that has its own learning rate."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        trained: nn.Module = model or self.model  # type: ignore[assignment]
        named = list(trained.named_parameters())
        for prefix, rate in self._own_learning_rates.items():
            own = [p for name, p in named if p.requires_grad and name.removeprefix("module.").startswith(prefix)]
            ids = {id(p) for p in own}
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in ids]
            if own:
                optimizer.add_param_group({"params": own, "lr": rate, "weight_decay": self.args.weight_decay})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As in transformers; raises TrainingError when the loss is no number, before the weights are touched."""
        self.tokens += sum(int(inputs[name].sum()) for name in ("attention_mask", "context_mask") if name in inputs)
        warm = self.state.global_step >= max(_STEPS_BEFORE_STORE, self.args.get_warmup_steps(self.state.max_steps))
        loss = super().training_step(model, self._at_labels(inputs, from_store=warm), *args, **kwargs)
        if not math.isfinite(loss.item()):
            raise TrainingError(
                self._stopped(f"the loss is {loss.item()} at step {self.state.global_step + 1}", _FIX_OF_A_BAD_LOSS)
            )
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """As in transformers; where only the loss is asked for, logits are made for the labels only."""
        if prediction_loss_only:
            inputs = self._at_labels(inputs)
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def _at_labels(self, inputs: dict[str, Any], from_store: bool = True) -> dict[str, Any]:
        """What an IMSMModel needs to compute the same loss from the label positions alone."""
        own_loss = self.label_smoother is not None or self.compute_loss_func is not None  # they want every logit
        if not isinstance(self.model, IMSMModel) or own_loss or "labels" not in inputs or "shift_labels" in inputs:
            return inputs
        inputs = {**inputs, "logits_at_labels": True}
        if self._frozen_store is not None and from_store:
            inputs["frozen"] = self._frozen_store.batch(
                inputs["input_ids"],
                inputs.get("attention_mask"),
                inputs["labels"],
                device=self.args.device,
                query_mask=inputs.get("query_mask"),
            )
        return inputs

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in transformers; raises TrainingError when the loss is no number, before such weights are kept."""
        metrics = super().evaluate(*args, **kwargs)
        loss = metrics.get("eval_loss", 0.0)
        if not math.isfinite(loss):
            reason = f"the validation loss is {loss} after step {self.state.global_step}"
            raise TrainingError(self._stopped(reason, _FIX_OF_A_BAD_LOSS))
        return metrics

    def _get_output_dir(self, trial: Any) -> str:
        return str(checkpoints.staging_folder(self.run_folder))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not isinstance(self.model, GenerativeAdapter | MemoryModel):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:  # transformers would write the base too
            self.model.save_pretrained(output_dir or self.run_folder, state_dict=state_dict)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        staging = checkpoints.staging_folder(self.run_folder)
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        step = self.state.global_step
        try:
            with self.writing(f"the checkpoint of step {step}"):
                super()._save_checkpoint(model, trial)
                if self.args.should_save and not self._is_sharded:
                    self._save_trained(staging / f"checkpoint-{step}" / TRAINED_NAME)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    seconds = self.seconds + time.perf_counter() - self._started
                    checkpoints.publish(self.run_folder, step, {"seconds": seconds, "tokens": self.tokens})
        except Exception:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        if self.args.should_save:
            checkpoints.keep_only(self.run_folder, {step, self.state.best_global_step or step})

    # PEFT's own files are not enough to go on from: an AdaLoRA adapter is written with its pruned ranks cut away, and
    # without the importances its allocator has gathered. So a checkpoint also holds what is trained, as it is.

    @property
    def _is_sharded(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _save_trained(self, path: Path) -> None:
        save_file({name: t.detach().cpu().contiguous() for name, t in self._trained_state().items()}, path)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._is_sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        path = Path(resume_from_checkpoint) / TRAINED_NAME
        saved, state = read_safetensors(path), self._trained_state()
        allocator = _allocator(self.model)
        if allocator is not None:
            allocator.peft_config.rank_pattern = PeftConfig.from_pretrained(resume_from_checkpoint).rank_pattern
        with torch.no_grad():
            for name, tensor in saved.items():
                if name in state:
                    state[name].copy_(tensor)
                elif allocator is not None and name.startswith(_ALLOCATOR):
                    table, _, key = name.removeprefix(_ALLOCATOR).partition("/")
                    getattr(allocator, table)[key] = tensor.to(self.args.device)
                else:
                    raise DamagedFileError(f"{path} holds '{name}', which this model does not train.")
        if missing := sorted(set(state) - set(saved)):
            raise DamagedFileError(f"{path} lacks '{missing[0]}'. Remove that checkpoint to go on from an older one.")

    def _trained_state(self) -> dict[str, Tensor]:
        """Every trained parameter, those of adapters beside the trained one (what CorDA started from), the buffers of
        the adapter (SLIM's clusters), and the importances of AdaLoRA's allocator where there is one."""
        model: Any = self.model
        beside = [f".{name}." for name in getattr(model, "peft_config", {}) if name != "default"]
        named = list(model.named_parameters())
        state: dict[str, Tensor] = {n: p for n, p in named if p.requires_grad or any(name in n for name in beside)}
        if isinstance(model, PeftModel) and not model.active_peft_config.is_prompt_learning:
            own = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
            state |= {n: b for n, b in model.named_buffers() if n.replace(".default", "") in own}
        allocator = _allocator(model)
        for table in _ALLOCATOR_TABLES if allocator is not None else ():
            state |= {f"{_ALLOCATOR}{table}/{key}": t for key, t in getattr(allocator, table).items()}
        return state

    def _stopped(self, reason: str, fix: str) -> str:
        done = checkpoints.complete_checkpoints(self.run_folder)
        kept = f"The last good checkpoint is {done[-1]}" if done else "There is no checkpoint yet"
        return f"Training stopped: {reason}. {kept}. {fix}."


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(".")


def _allocator(model: Any) -> Any:
    """AdaLoRA's rank allocator, or None."""
    return getattr(getattr(model, "base_model", None), "rankallocator", None)


class AdaLoraCallback(TrainerCallback):
    """Calls AdaLoRA's rank allocator, which needs the gradients of the step just taken."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Between the optimizer's step and the reset of the gradients."""
        model: PeftModel = kwargs["model"]
        model.base_model.update_and_allocate(state.global_step + 1)  # type: ignore[operator]


class LogAtCheckpointsCallback(TrainerCallback):
    """Logs the loss with each checkpoint: what has gathered since the last log is not part of one."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After the callback that decides about saving, which is always the first."""
        control.should_log = control.should_log or control.should_save

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """As `on_step_end`."""
        control.should_log = control.should_log or control.should_save


class ProgressBarCallback(TrainerCallback):
    """A bar with the time left and the running loss."""

    def __init__(self) -> None:
        self.bar = progress_bar()
        self.task: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar."""
        if state.is_world_process_zero:
            self.bar = progress_bar()
            self.bar.start()
            self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One step further."""
        if self.task is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the loss of the last steps."""
        if self.task is not None and logs and "loss" in logs:
            self.bar.update(self.task, description=f"training, loss {logs['loss']:.3f}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the bar away."""
        self.bar.stop()
