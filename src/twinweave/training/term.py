"""Training with more than the task's loss. Knows nothing about what the term is."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from ..imsm import IMSMModel
from ..rehearsal import Term


class TermTrainer(Trainer):
    """A Trainer that adds a method's own term to the loss, once for each optimizer step; logged as `term`.

    Goes before any other Trainer, such as TRL's: `class RehearsingSFTTrainer(TermTrainer, SFTTrainer)`.
    """

    def __init__(self, *args: Any, term: Term | None = None, **kwargs: Any) -> None:
        self._term, self._terms_since_log = term, list[Tensor]()
        super().__init__(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As in transformers, with the method's own term added in training; validation is of the task alone."""
        asked = self._term is not None and model.training and self.accelerator.sync_gradients  # once for a step
        if asked and isinstance(self.model, IMSMModel):
            inputs = {**inputs, "output_gate": True}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if asked and self._term is not None:
            # DDP takes what one of its forwards leaves out for unused; its module is the same model without that
            runnable = model.module if isinstance(model, DistributedDataParallel) else model
            term = self._term(runnable, inputs, outputs, self.state.global_step)
            if term is not None:
                self._terms_since_log.append(term.detach())
                scaled = num_items_in_batch is not None and self.model_accepts_loss_kwargs
                loss = loss + term * (1 if scaled else self.current_gradient_accumulation_steps)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in transformers, with the mean of the method's own term since the last log."""
        if self._terms_since_log and "loss" in logs:
            own = torch.stack(self._terms_since_log).mean()
            logs["term"] = self.accelerator.reduce(own, reduction="mean").item()
            self._terms_since_log.clear()
        super().log(logs, *args, **kwargs)
