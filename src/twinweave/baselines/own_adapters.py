"""Adapters that are a method of their own: the recipe's configuration, turned into theirs.

They adapt the same modules, at about the size of the recipe's adapter. Knows nothing about training.
"""

import re
import warnings
from copy import deepcopy
from dataclasses import fields
from typing import Any

from peft import AdaLoraConfig, LoraConfig, OFTConfig, OSFConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from ..rehearsal.terms import Materials

_WHERE = ("task_type", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
_RANK = 16


def osf_model(base: PreTrainedModel, peft_config: PeftConfig, materials: Materials | None) -> PeftModel:
    """OSF (orthogonal subspace fine-tuning): each weight's smallest singular directions are trained, as many as the
    recipe's rank, with gradients kept out of the others. Raises ValueError for a rank below 1."""
    if isinstance(peft_config, OSFConfig):
        return get_peft_model(base, peft_config)
    rank = rank_of(peft_config)
    shapes = {name: module.weight.shape for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    kept = {name: max(1, min(shape) - rank) for name, shape in shapes.items()}
    config = OSFConfig(**where_of(peft_config, OSFConfig), rank_pattern={_whole(n): value for n, value in kept.items()})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following rank_pattern keys did not match")
        model = get_peft_model(base, config)
    targeted: list[str] = model.targeted_module_names
    config.rank_pattern = {_whole(name): kept[name] for name in targeted if name in kept}
    return model


def oft_model(base: PreTrainedModel, peft_config: PeftConfig, materials: Materials | None) -> PeftModel:
    """OFT (orthogonal fine-tuning): inputs are rotated in blocks of four times the recipe's rank, which are as many
    parameters as LoRA has on a square weight. Raises ValueError for a rank below 1."""
    if isinstance(peft_config, OFTConfig):
        return get_peft_model(base, peft_config)
    config = OFTConfig(**where_of(peft_config, OFTConfig), r=0, oft_block_size=4 * rank_of(peft_config))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Invalid `oft_block_size`")  # PEFT takes the nearest that fits
        return get_peft_model(base, config)


def _whole(name: str) -> str:
    return f"^{re.escape(name)}$"


def rank_of(peft_config: PeftConfig) -> int:
    """The rank of a LoRA configuration, 16 for adapters without one. Raises ValueError below 1."""
    if not isinstance(peft_config, LoraConfig):
        return _RANK
    rank = peft_config.init_r if isinstance(peft_config, AdaLoraConfig) else peft_config.r
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"`r` should be a positive integer, and it is {rank!r}")
    return rank


def where_of(peft_config: PeftConfig, kind: type[PeftConfig]) -> dict[str, Any]:
    """What a configuration says about where it adapts, for a configuration of another kind."""
    known = {field.name for field in fields(kind)}
    return {
        name: deepcopy(getattr(peft_config, name)) for name in _WHERE if name in known and hasattr(peft_config, name)
    }
