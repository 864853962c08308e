"""Saving and loading a generator, and writing generated adapters as LoRA files of PEFT.

Knows nothing about how the model runs. Files are safetensors and JSON.
"""

import json
import os
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from ..errors import DamagedFileError, UsageError
from ..files import atomic_files_into, read_safetensors, write_json_atomic
from ..fingerprint import BaseFingerprint, fingerprint
from ..pretrained import MISMATCH_ALLOWED, base_of, check_same_base, local_folder, recorded_base
from .config import GenerativeAdapterConfig

if TYPE_CHECKING:
    from .model import GenerativeAdapter

CONFIG_NAME = "generator_config.json"
GENERATOR_NAME = "generator.safetensors"
_PREFIX = "generators."


def save(
    model: "GenerativeAdapter",
    path: str | os.PathLike[str],
    *,
    state_dict: dict[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    is_main_process: bool = True,
    **kwargs: Any,
) -> None:
    """Write generator and settings into folder `path`.

    `state_dict`: the weights, from a trainer that has them elsewhere. `dtype`: of the file (the generator's own);
    other arguments are those of transformers' save_pretrained, of which there is nothing to heed.
    """
    if not kwargs.get("safe_serialization", True):
        raise UsageError("safe_serialization=False would pickle the generator; only safetensors are written.")
    if not is_main_process:
        return
    state = model.state_dict() if state_dict is None else state_dict
    weights = {k.removeprefix(_PREFIX): v for k, v in state.items() if k.startswith(_PREFIX)}
    weights = {k: v.detach().to("cpu", dtype or v.dtype).contiguous() for k, v in weights.items()}
    with atomic_files_into(path) as folder:
        save_file(weights, folder / GENERATOR_NAME, metadata={"format": "pt"})
        write_json_atomic(
            folder / CONFIG_NAME,
            {
                "generative_adapter": model.settings.to_dict(),
                "modules": [target.name for target in model.targets],
                "base": recorded_base(model.base, model.base_fingerprint),
            },
        )


def load(
    cls: "type[GenerativeAdapter]",
    path: str | os.PathLike[str],
    base: PreTrainedModel | str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    allow_base_mismatch: bool,
    revision: str | None,
    base_kwargs: dict[str, Any],
) -> "GenerativeAdapter":
    """See `GenerativeAdapter.from_pretrained`."""
    folder = local_folder(path, revision)
    recorded = _read_settings(folder)
    base = base_of(folder, recorded["base"], base, base_kwargs)
    if not allow_base_mismatch:
        check_same_base(folder, recorded["base"], fingerprint(base), MISMATCH_ALLOWED)
    model = cls(base, GenerativeAdapterConfig.from_dict(recorded["generative_adapter"]), tokenizer)
    _check_modules(folder, recorded["modules"], [target.name for target in model.targets])
    load_weights(model, folder)
    return model.eval()


def read_config(path: str | os.PathLike[str]) -> GenerativeAdapterConfig:
    """The settings of the generator saved in the folder `path`. Raises DamagedFileError."""
    return GenerativeAdapterConfig.from_dict(_read_settings(local_folder(path, None))["generative_adapter"])


def load_weights(model: "GenerativeAdapter", folder: Path) -> None:
    """Give `model` the weights saved in `folder`. Raises DamagedFileError unless they fit exactly."""
    weights = read_safetensors(folder / GENERATOR_NAME)
    expected = {name: tuple(tensor.shape) for name, tensor in model.generators.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found != expected:
        names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise DamagedFileError(
            f"{folder / GENERATOR_NAME} does not fit {CONFIG_NAME} beside it: {names[0]} has shape "
            f"{found.get(names[0])} where {expected.get(names[0])} is needed. Save the generator again."
        )
    model.generators.load_state_dict(weights)


def save_lora(
    model: "GenerativeAdapter",
    factors: Mapping[str, tuple[Tensor, Tensor]],
    path: str | os.PathLike[str],
    dtype: torch.dtype,
) -> None:
    """Write LoRA pairs A [r, in] and B [out, r] with scaling 1 as plain PEFT does, into folder `path`."""
    names = [target.name for target in model.targets]
    config = LoraConfig(
        r=model.settings.rank,
        lora_alpha=model.settings.rank,
        lora_dropout=0.0,
        target_modules=_short(names, model.base),
        fan_in_fan_out=any(isinstance(target.module, Conv1D) for target in model.targets),
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.base.config._name_or_path or None,
        inference_mode=True,
    )
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.to("cpu", dtype).contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.to("cpu", dtype).contiguous()
    with atomic_files_into(path) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(folder))


def _short(names: list[str], base: PreTrainedModel) -> list[str]:
    """The endings that stand for exactly these modules, since servers know those; full names where there are none."""
    endings = {name.rsplit(".", 1)[-1] for name in names}
    meant = {name for name, _ in base.named_modules() if name.rsplit(".", 1)[-1] in endings}
    return sorted(endings) if meant == set(names) else sorted(names)


def _read_settings(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise DamagedFileError(f"{folder} has no {CONFIG_NAME}, so no generator of adapters was saved there.")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        BaseFingerprint(**settings["base"]["fingerprint"])
        GenerativeAdapterConfig.from_dict(settings["generative_adapter"])
        _ = settings["base"]["name_or_path"], list(settings["modules"])
    except (ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
        raise DamagedFileError(f"{file} cannot be read ({error!r}). Save the generator again.") from error
    return settings


def _check_modules(folder: Path, recorded: list[str], found: list[str]) -> None:
    """Generators are saved by number: on other layers than they were trained for they would load all the same."""
    for number, (saved, here) in enumerate(zip_longest(recorded, found)):
        if saved != here:
            raise DamagedFileError(
                f"{folder / CONFIG_NAME} does not fit the base: layer {number} that was adapted is {saved}, and {here} "
                "is found in its place. Load the base that it was trained on, or save the generator again."
            )
