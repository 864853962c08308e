"""What the contract is checked on: a maker of one base, a maker of one adapter, and both of them wrapped.

Knows nothing about which bases and adapters there are, nor about what is checked.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftModelForCausalLM
from torch import Tensor, nn
from transformers import PreTrainedModel

from twinweave import IMSMConfig, IMSMModel, get_imsm_model

PAD = 0


@dataclass
class Subject:
    """One base with one kind of adapter.

    `make_base(**changes)` gives an fp32 model in evaluation mode, with the same random weights at every call; `changes`
    go into its config (`tie_word_embeddings`). `make_peft(base)` gives an adapter that fits it. Token ids from `first`
    to `vocab` - 1 are ordinary ones, and 0 is free for padding. `prepare` is called with every freshly wrapped model
    (PeftModel or IMSMModel), before its weights are moved; for adapters that want a start of their own.
    `trainable_again`: PEFT can go on with the training of a saved adapter. `control`: for an
    adapter of twinweave's own, the same with LoRA: only what LoRA breaks as well is excused.
    """

    name: str
    make_base: Callable[..., PreTrainedModel]
    make_peft: Callable[[PreTrainedModel], PeftConfig]
    vocab: int = 61
    first: int = 5
    imsm: dict[str, Any] = field(default_factory=lambda: {"gate_rank": 3})
    prepare: Callable[[PeftModelForCausalLM], None] = lambda model: None
    trainable_again: bool = True
    control: Callable[[], "Subject"] | None = None
    _pristine: PreTrainedModel | None = None
    _moved: IMSMModel | None = None

    def base(self, **changes: Any) -> PreTrainedModel:
        """A fresh base without gradients: matmul may take another kernel for weights that require one."""
        if changes:
            return self.make_base(**changes).requires_grad_(False)
        if self._pristine is None:
            self._pristine = self.make_base().requires_grad_(False)
        return copy.deepcopy(self._pristine)

    def twin(self, moved: bool = True, base: PreTrainedModel | None = None) -> IMSMModel:
        """The IMSM model in evaluation mode; `moved`: adapter and gate are away from their start, as after training."""
        base = self.base() if base is None else base
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = get_imsm_model(base, self.make_peft(base), IMSMConfig(**self.imsm))
            self.prepare(model)
        if moved:
            move_trainable(model)
        return self.dressed(model.eval())

    def plain_from(self, folder: str) -> Any:
        """Plain PEFT's reading of a saved folder, over a fresh base."""
        model = PeftModel.from_pretrained(self.base(), folder, is_trainable=self.trainable_again)
        return self.dressed(model.eval())

    def dressed(self, model: Any) -> Any:
        """A PeftModel or IMSMModel, as the checks call it: with what this adapter has to be told at every call."""
        return model

    def moved(self) -> IMSMModel:
        """The moved twin, made once, for checks that change nothing but its plan, its retention and its guard."""
        if self._moved is None:
            self._moved = self.twin()
        self._moved.plan, self._moved.retention, self._moved.guard = "auto", 0.0, None
        return self._moved

    def plain(self, like: IMSMModel | None = None, base: PreTrainedModel | None = None) -> PeftModelForCausalLM:
        """Plain PEFT over a fresh base: with the adapter of `like`, or as it starts."""
        base = self.base() if base is None else base
        config = self.make_peft(base)
        config.task_type = "CAUSAL_LM"
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = PeftModelForCausalLM(base, config)
            self.prepare(model)
        if like is not None:
            own = {name: t for name, t in like.state_dict().items() if not name.startswith(("gate.", "guard."))}
            model.load_state_dict(own)
        return self.dressed(model.eval())

    def tokens(self, rows: int, length: int, seed: int = 0) -> Tensor:
        """Token ids [rows, length] without padding or special tokens."""
        return torch.randint(self.first, self.vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def move_trainable(model: nn.Module, seed: int = 1) -> None:
    """Move everything trainable away from its start, as training would: the adapter a little, the gate a lot."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(((0.4 if name.startswith("gate.") else 0.2) * noise).to(parameter.dtype))


def start_clusters(model: PeftModelForCausalLM) -> None:
    """Let SLIM see two batches in training mode, so that it has clusters and they have slid."""
    model.train()
    with torch.no_grad():
        for seed in (1, 2):
            model(input_ids=torch.randint(10, 60, (4, 8), generator=torch.Generator().manual_seed(seed)))
    model.eval()
