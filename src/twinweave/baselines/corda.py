"""CorDA in its knowledge-preserved mode (Yang et al., 2024): LoRA starts in the directions general text uses least.

In PEFT's version (which needs a package that PEFT does not install) the start B₀A₀ is taken out of the base's weights.
Here they stay as they are: a second, frozen LoRA adds −B₀A₀ instead, which is the same function. What is saved is both
as one LoRA of twice the rank, for the base as it is. Knows nothing about training loops.
"""

import math
import os
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, PeftModelForCausalLM
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..imsm.adapters import adapter_layers, adapters_off, dropout_off
from ..imsm.starts import START, save_joined
from ..progress import track
from ..rehearsal import RehearsalRows
from ..rehearsal.terms import Materials
from .own_adapters import rank_of, where_of

COVARIANCE_ROWS = 256
_TRAINED, _START = "default", START


class CordaModel(PeftModelForCausalLM):
    """A LoRA and its frozen start, saved as one plain LoRA."""

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """`adapter_config.json` and `adapter_model.safetensors` of a LoRA of twice the rank."""
        save_joined(self, save_directory, is_main_process, state_dict)


def corda_model(base: PreTrainedModel, peft_config: PeftConfig, materials: Materials | None) -> CordaModel:
    """The base with CorDA's LoRA, its start found with the covariances of general text.

    Without `materials` the start is LoRA's usual one: that is a model of the right size, to be trained by nobody.
    Raises ValueError for settings that do not fit, RecipeError where there is no general text.
    """
    config = _lora_config(peft_config)
    model = CordaModel(base, config)
    model.add_adapter(_START, _frozen(config))
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        if _TRAINED not in layer.lora_A:
            raise ValueError(f"CorDA starts linear layers only, and {type(layer.get_base_layer()).__name__} is none")
    if materials is not None:
        for layer, covariance in zip(layers, _covariances(model, layers, materials.general_text()), strict=True):
            _set_start(layer, covariance)
    model.base_model.set_adapter([_TRAINED, _START])  # type: ignore[operator]
    for name, parameter in model.named_parameters():
        if f".{_START}." in name:
            parameter.requires_grad_(False)
    return model


def _lora_config(peft_config: PeftConfig) -> LoraConfig:
    """The recipe's configuration as a plain LoRA."""
    rank = rank_of(peft_config)
    if not isinstance(peft_config, LoraConfig) or isinstance(peft_config, AdaLoraConfig):
        return LoraConfig(**where_of(peft_config, LoraConfig), r=rank, lora_alpha=rank)
    config = deepcopy(peft_config)
    config.use_dora, config.init_lora_weights = False, True
    return config


def _frozen(config: LoraConfig) -> LoraConfig:
    config = deepcopy(config)
    config.lora_dropout, config.modules_to_save = 0.0, None
    return config


@torch.no_grad()
def _covariances(model: PeftModel, layers: Sequence[LoraLayer], general: RehearsalRows) -> list[Tensor]:
    """For each layer the mean over tokens of xxᵀ, x its input when the base reads general text; fp32, [in, in]."""
    runnable: Any = model
    read: list[Tensor] = [torch.zeros(())] * len(layers)
    sums = [torch.zeros(()) for _ in layers]

    def remember(number: int, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        read[number] = inputs[0]

    hooks = [layer.register_forward_pre_hook(partial(remember, i)) for i, layer in enumerate(layers)]  # type: ignore[attr-defined]
    count = min(COVARIANCE_ROWS, len(general.rows))
    try:
        with adapters_off(adapter_layers(model)), dropout_off(model):
            for number in track(range(count), "Covariances of general text"):  # row by row: there is no padding
                batch = general.collator([general.rows[number]])
                runnable(input_ids=batch["input_ids"].to(model.device), use_cache=False)
                for i, x in enumerate(read):
                    rows = x.flatten(0, -2).float()
                    sums[i] = sums[i].to(x.device) + rows.T @ rows / len(rows) / count
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def least_used_directions(weight: Tensor, covariance: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A₀ [rank, in] and B₀ [out, rank] with B₀A₀ = the part of the weight [out, in] that matters least for inputs of
    that covariance C: of the singular values of WC the smallest, and C⁻¹ behind it (CorDA, equation 4).

    As in PEFT, C gets 1 % of its mean variance on its diagonal, and twice as much until it can be inverted.
    """
    if not 0 < rank <= min(weight.shape):
        raise ValueError(f"rank {rank} is larger than a weight of shape {tuple(weight.shape)} has")
    unit, share = torch.eye(len(covariance), device=covariance.device), 0.01
    while True:
        damped = covariance + share * covariance.diagonal().mean() * unit
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, unit) < 0.05:
            break
        share *= 2
    u, s, vh = torch.linalg.svd(weight.float() @ damped, full_matrices=False)
    root = s[-rank:].sqrt()
    return root[:, None] * (vh[-rank:] @ inverse), u[:, -rank:] * root


@torch.no_grad()
def _set_start(layer: Any, covariance: Tensor) -> None:
    """B₀A₀ in the trained LoRA, −B₀A₀ in the frozen one."""
    base_layer, rank = layer.get_base_layer(), layer.r[_TRAINED]
    a, b = layer.lora_A[_TRAINED].weight, layer.lora_B[_TRAINED].weight
    weight = base_layer.weight.T if isinstance(base_layer, Conv1D) else base_layer.weight
    start_a, start_b = least_used_directions(weight, covariance, rank)
    a.copy_(start_a / math.sqrt(layer.scaling[_TRAINED]))
    b.copy_(start_b / math.sqrt(layer.scaling[_TRAINED]))
    layer.lora_A[_START].weight.copy_(a)
    layer.lora_B[_START].weight.copy_(-b)
