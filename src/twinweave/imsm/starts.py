"""LoRA's starts that PEFT makes by taking a part of the base's weights into the adapter, made with the base as it is.

Knows nothing about memories. PiSSA, OLoRA, CorDA and LoRA-GA start from factors B₀A₀ and put W − s·B₀A₀ in the place of
the base's weight W. Here W stays, and a second, frozen LoRA adds −s·B₀A₀: the same function, the same gradients, and
the base is still there. What is saved is both as one LoRA of twice the rank, for the base as it is, which is also what
PEFT converts such an adapter into.
"""

import copy
import math
import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UnsupportedModelError
from ..files import read_safetensors

START = "imsm_start"


def moved_start(peft_config: PeftConfig) -> str | None:
    """The start of `peft_config` that PEFT would make out of the base's weights; None if it leaves them alone."""
    start = str(getattr(peft_config, "init_lora_weights", True)).lower()
    return start if start.startswith(("pissa", "olora", "corda", "lora_ga")) else None


def without_start(peft_config: PeftConfig) -> LoraConfig:
    """The configuration with LoRA's usual start. Raises UnsupportedModelError where this start cannot be made."""
    if type(peft_config) is not LoraConfig or peft_config.use_dora or peft_config.lora_bias:
        raise UnsupportedModelError(
            f"init_lora_weights={moved_start(peft_config)!r} can only be taken out again from a plain LoRA. Use "
            "use_dora=False and lora_bias=False, or init_lora_weights=True."
        )
    config = copy.deepcopy(peft_config)
    config.init_lora_weights = True
    return config


def give_start(model: PeftModel, peft_config: PeftConfig, adapter_name: str) -> None:
    """Give the fresh LoRA `adapter_name` of `model` the start that `peft_config` asks for."""
    usual = without_start(peft_config)
    usual.lora_dropout, usual.modules_to_save, usual.trainable_token_indices = 0.0, None, None
    with model._changing_adapters():
        PeftModel.add_adapter(model, START, usual)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            _start_layer(layer, peft_config, adapter_name)
    activate(model, adapter_name)


def activate(model: PeftModel, adapter_name: str) -> None:
    """Make `adapter_name` and its start the active adapters, of which the start is never trained."""
    model.base_model.set_adapter([adapter_name, START])  # type: ignore[operator]
    for name, parameter in model.named_parameters():
        if f".{START}." in name:
            parameter.requires_grad_(False)


@torch.no_grad()
def _start_layer(layer: Any, peft_config: Any, adapter_name: str) -> None:
    start = moved_start(peft_config)
    if adapter_name not in layer.lora_A or not hasattr(layer.get_base_layer(), "weight"):
        raise UnsupportedModelError(
            f"init_lora_weights={start!r} starts linear layers only, and {type(layer.get_base_layer()).__name__} is "
            "none. Leave it out of target_modules."
        )
    if start == "lora_ga" and not hasattr(layer.get_base_layer(), "_peft_loraga_grad"):
        raise UnsupportedModelError("init_lora_weights='lora_ga' needs gradients: call PEFT's preprocess_loraga first.")
    if start == "olora" and layer.fan_in_fan_out:
        raise UnsupportedModelError("init_lora_weights='olora' takes no transposed weights (Conv1D). Use 'pissa'.")
    weight = layer.get_base_layer().weight
    if weight.is_meta:
        return
    a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    shapes, like = (a.shape, b.shape), a.data
    before, kept = weight.data, weight.data.clone()  # PEFT may write into it, or put another in its place
    try:
        _peft_start(layer, peft_config, adapter_name)
    except (ValueError, TypeError) as error:
        raise UnsupportedModelError(f"init_lora_weights={start!r}: {error}") from error
    finally:
        weight.data = before.copy_(kept)
        layer.get_base_layer().weight = weight
    a.data, b.data = a.data.to(like).contiguous(), b.data.to(like).contiguous()
    if (a.shape, b.shape) != shapes:
        raise UnsupportedModelError(f"r={shapes[0][0]} is more than a weight of shape {tuple(weight.shape)} has.")
    layer.lora_A[START].weight.data, layer.lora_B[START].weight.data = a.data.clone(), -b.data


def _peft_start(layer: Any, peft_config: Any, adapter_name: str) -> None:
    match moved_start(peft_config):
        case "olora":
            layer.olora_init(adapter_name)
        case "lora_ga":
            layer.lora_ga_init(adapter_name, peft_config.lora_ga_config)
        case "corda":
            layer.corda_init(adapter_name, peft_config.init_lora_weights)
        case _:
            layer.pissa_init(adapter_name, peft_config.init_lora_weights)


# --- files ----------------------------------------------------------------------------------------------------------


def save_joined(
    model: PeftModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    **kwargs: Any,
) -> None:
    """Write the first adapter and its start as one LoRA: `adapter_config.json`, `adapter_model.safetensors`.

    The arguments are those of PEFT's `save_pretrained`.
    """
    if not is_main_process:
        return
    folder, adapter_name = Path(save_directory), next(iter(model.peft_config))
    folder.mkdir(parents=True, exist_ok=True)
    trained = get_peft_model_state_dict(
        model, state_dict=state_dict, adapter_name=adapter_name, save_embedding_layers=False
    )
    whole = model.state_dict() if state_dict is None else state_dict
    start = {name.replace(f".{START}.", "."): tensor for name, tensor in whole.items() if f".{START}." in name}
    joined = {
        name: _joined(name, tensor, start[name]) if name in start else tensor.detach().cpu().contiguous()
        for name, tensor in trained.items()
    }
    model.create_or_update_model_card(str(folder))
    save_file(joined, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config[adapter_name]
    assert isinstance(config, LoraConfig)
    doubled(config).save_pretrained(str(folder))
    if others := [name for name in model.peft_config if name not in (adapter_name, START)]:
        PeftModel.save_pretrained(model, str(folder), selected_adapters=others, state_dict=state_dict, **kwargs)


def load_joined(model: PeftModel, folder: str | os.PathLike[str], adapter_name: str) -> Any:
    """Take what `save_joined` wrote apart again, into the adapter and its start. Returns PEFT's lists of keys."""
    own, start = read_safetensors(Path(folder) / "adapter_model.safetensors"), {}
    for name, tensor in list(own.items()):
        if name.endswith(("lora_A.weight", "lora_B.weight")):
            parts = tensor.chunk(2, dim=0 if "lora_A" in name else 1)
            own[name], start[name] = (part.contiguous() for part in parts)
    set_peft_model_state_dict(model, start, adapter_name=START)
    return set_peft_model_state_dict(model, own, adapter_name=adapter_name)


def _joined(name: str, tensor: Tensor, start: Tensor) -> Tensor:
    return torch.cat([tensor, start], dim=0 if "lora_A" in name else 1).detach().cpu().contiguous()


def doubled(config: LoraConfig) -> LoraConfig:
    """The configuration of a LoRA with twice the rank and the same scaling."""
    config = copy.deepcopy(config)
    factor = math.sqrt(2) if config.use_rslora else 2
    config.r, config.lora_alpha = 2 * config.r, factor * config.lora_alpha  # type: ignore[assignment]
    config.rank_pattern = {name: 2 * rank for name, rank in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {name: factor * alpha for name, alpha in (config.alpha_pattern or {}).items()}
    config.inference_mode = True
    return config
