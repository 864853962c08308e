"""Saving and loading a memory model: PEFT's own files for the compressor's adapter, and the rest beside them.

Knows nothing about how the model runs, or about banks. Files are safetensors and JSON.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import DamagedFileError, UsageError
from ..files import atomic_files_into, read_safetensors, write_json_atomic
from ..fingerprint import BaseFingerprint, fingerprint
from ..pretrained import MISMATCH_ALLOWED, base_of, check_same_base, local_folder, recorded_base
from .config import CMTConfig

if TYPE_CHECKING:
    from .model import MemoryModel

CONFIG_NAME = "cmt_config.json"
WEIGHTS_NAME = "cmt.safetensors"
ADAPTER_NAME = "adapter_model.safetensors"
_OWN = ("aggregator.", "prefix.", "compressor.tokens")
_PEFT = "compressor.peft."


def save(
    model: "MemoryModel",
    path: str | os.PathLike[str],
    *,
    state_dict: dict[str, Tensor] | None = None,
    is_main_process: bool = True,
    **kwargs: Any,
) -> None:
    """Write what is trained, and the settings, into folder `path`.

    `state_dict`: the weights, from a trainer that has them elsewhere; other arguments are those of transformers'
    save_pretrained, of which there is nothing to heed.
    """
    if not kwargs.get("safe_serialization", True):
        raise UsageError("safe_serialization=False would pickle the weights; only safetensors are written.")
    if not is_main_process:
        return
    state = model.state_dict() if state_dict is None else state_dict
    own = {k: v.detach().cpu().contiguous() for k, v in state.items() if k.startswith(_OWN)}
    adapter = {k.removeprefix(_PEFT): v for k, v in state.items() if k.startswith(_PEFT)}
    peft = model.compressor.peft
    with atomic_files_into(path) as folder:
        peft.save_pretrained(str(folder), state_dict=adapter, save_embedding_layers=False)
        save_file(own, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        revision = peft.active_peft_config.revision
        base = recorded_base(model.base, model.base_fingerprint, revision)
        write_json_atomic(folder / CONFIG_NAME, {"cmt": model.settings.to_dict(), "base": base})


def load(
    cls: "type[MemoryModel]",
    path: str | os.PathLike[str],
    base: PreTrainedModel | str | None,
    bank: str | os.PathLike[str] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    is_trainable: bool,
    allow_base_mismatch: bool,
    revision: str | None,
    base_kwargs: dict[str, Any],
) -> "MemoryModel":
    """See `MemoryModel.from_pretrained`."""
    folder = local_folder(path, revision)
    settings = _read_settings(folder)
    weights, adapter = read_safetensors(folder / WEIGHTS_NAME), read_safetensors(folder / ADAPTER_NAME)
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(
            f"The adapter_config.json in {folder} cannot be read ({error}). Save it again."
        ) from error
    base = base_of(folder, settings["base"], base, base_kwargs)
    if not allow_base_mismatch:  # before the base is wrapped, so that it stays as it was
        check_same_base(folder, settings["base"], fingerprint(base), MISMATCH_ALLOWED)
    config.inference_mode = not is_trainable
    made = CMTConfig.from_dict(settings["cmt"])
    model = cls(base, replace(made, init_text=None), config, tokenizer=tokenizer)
    model.settings = made
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items() if k.startswith(_OWN)}
    found = {k: tuple(v.shape) for k, v in weights.items()}
    if found != expected:
        names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise DamagedFileError(
            f"{folder / WEIGHTS_NAME} does not fit {CONFIG_NAME} beside it: {names[0]} has shape {found.get(names[0])} "
            f"where {expected.get(names[0])} is needed. Save the model again."
        )
    model.load_state_dict(weights, strict=False)
    try:
        result: Any = set_peft_model_state_dict(model.compressor.peft, adapter)
    except RuntimeError as error:  # torch's word for tensors of another shape
        raise DamagedFileError(
            f"{folder / ADAPTER_NAME} does not fit adapter_config.json beside it: {error}"
        ) from error
    if lacking := [name for name in result.missing_keys if model.compressor.prefix in name]:
        raise DamagedFileError(f"{folder / ADAPTER_NAME} lacks {lacking[0]}. Save the model again.")
    for name, parameter in model.named_parameters():
        if name.startswith(_OWN):
            parameter.requires_grad_(is_trainable)
    model.train(is_trainable)
    if bank is not None:
        model.open_bank(bank)
    return model


def read_config(path: str) -> CMTConfig:
    """The settings of the model saved in the folder `path`. Raises DamagedFileError."""
    return CMTConfig.from_dict(_read_settings(local_folder(path, None))["cmt"])


def _read_settings(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise DamagedFileError(f"{folder} has no {CONFIG_NAME}, so no memory model was saved there.")
    try:
        settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        BaseFingerprint(**settings["base"]["fingerprint"])
        CMTConfig.from_dict(settings["cmt"])
        _ = settings["base"]["name_or_path"]
    except (ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
        raise DamagedFileError(f"{file} cannot be read ({error!r}). Save the model again.") from error
    return settings
