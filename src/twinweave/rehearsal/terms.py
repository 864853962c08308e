"""What a method adds to the task's loss: the types of it, and IMSM's own.

Knows nothing about training loops. A term is asked once for each batch of the task and may abstain (None).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import kl_div

from ..errors import RecipeError
from ..imsm.labels import IGNORED, FrozenStates
from ..processes import mean_over_processes
from .rows import RehearsalRows

_TINY = torch.finfo(torch.float32).tiny  # so that the logarithm's gradient stays finite

Batch = Mapping[str, Tensor]
Term = Callable[[Any, Batch, Any, int], Tensor | None]
"""(the model as the trainer calls it, the task's batch, its outputs, the step) -> what is added to the loss."""


@dataclass(frozen=True)
class Materials:
    """What a method may use beside the task's rows."""

    seed: int
    steps: int
    """How many steps the training has: what fades is gone at the last one."""
    weight: float = 1.0
    """The value of the method's own knob, where it is a weight."""
    rehearsal: RehearsalRows | None = None
    frozen: Callable[[Batch], FrozenStates] | None = None
    """The original memory of a rehearsal batch, where a store has it."""

    def general_text(self) -> RehearsalRows:
        """The rows to rehearse on. Raises RecipeError where the recipe has none."""
        if self.rehearsal is None:
            raise RecipeError("rehearsal: this method needs general text, and the recipe's rehearsal is off.")
        return self.rehearsal


MakeTerm = Callable[[Any, Materials], Term | None]


def gate_rehearsal(model: PeftModel, materials: Materials) -> Term | None:
    """IMSM's rehearsal: on general text both memories are to say what the original one says, and the gate is told where
    each memory belongs. None where there is nothing to rehearse."""
    general = materials.rehearsal
    if general is None:
        return None
    settings = general.settings
    adapter_weight = settings.adapter_weight if getattr(model, "trains_adapter", True) else 0.0

    def term(model: Any, inputs: Batch, outputs: Any, step: int) -> Tensor | None:
        batch = on_device_of(inputs, general.batch(step, materials.seed))
        if batch is None:
            return None
        frozen = materials.frozen(batch) if materials.frozen is not None else None
        rehearse = "both" if adapter_weight else "gate"
        out = model(**batch, frozen=frozen, use_cache=False, rehearse=rehearse, output_gate=True)
        loss: Tensor = settings.weight * out.divergences[0]
        if adapter_weight:
            loss = loss + adapter_weight * out.divergences[1]
        loss = mean_over_processes(loss, out.logits.shape[1])
        told = settings.gate_weight * max(0.0, 1 - step / materials.steps)
        if told:
            loss = loss + told * (_surprise(out.gate) + _surprise(1 - _gate_at_labels(inputs, outputs)))
        return settings.every * loss

    return term


def _surprise(share: Tensor) -> Tensor:
    """-log of a memory's share, the mean over places and channels."""
    return mean_over_processes(-share.clamp_min(_TINY).log().mean(), share.numel())


def _gate_at_labels(inputs: Batch, outputs: Any) -> Tensor:
    """The gate where the task's labels are predicted, [N, d]; the trainer asked for it."""
    gate: Tensor = outputs["gate"]
    if inputs.get("logits_at_labels") is not None:
        return gate[0]
    return gate[:, :-1][inputs["labels"][:, 1:] != IGNORED]


def divergence(base: Tensor, other: Tensor) -> Tensor:
    """KL(base ‖ other) of next-token distributions in nats per position, from logits [N, V]; no gradient to `base`."""
    log_base = base.detach().float().log_softmax(-1)
    total = kl_div(other.float().log_softmax(-1), log_base, log_target=True, reduction="sum")
    return mean_over_processes(total / max(len(base), 1), len(base))


def on_device_of(inputs: Batch, batch: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """The batch where `inputs` are."""
    if batch is None:
        return None
    device = inputs["input_ids"].device
    return {name: tensor.to(device) for name, tensor in batch.items()}
