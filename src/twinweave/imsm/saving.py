"""Saving and loading an IMSM model: PEFT's own adapter files, and gate, guard and settings beside them.

Knows nothing about how the model runs. Files are safetensors and JSON; pickled weights are refused.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ..errors import DamagedFileError
from ..files import atomic_files_into, read_safetensors, write_json_atomic
from ..fingerprint import BaseFingerprint, fingerprint
from ..pretrained import MISMATCH_ALLOWED, base_of, check_same_base, local_folder, recorded_base
from .checks import check_base, check_goes_on
from .config import IMSMConfig
from .guard import DomainGuard, GuardSettings, misfit_of_guard

if TYPE_CHECKING:
    from .model import IMSMModel

CONFIG_NAME = "imsm_config.json"
GATE_NAME = "imsm_gate.safetensors"
GUARD_NAME = "imsm_guard.safetensors"
ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_NAME = "adapter_model.safetensors"


def save(model: "IMSMModel", path: str | os.PathLike[str], save_adapter: Callable[..., None], **kwargs: Any) -> None:
    """Write the model into folder `path`; `save_adapter` is PEFT's own save_pretrained, `kwargs` are its options."""
    if not kwargs.get("safe_serialization", True):
        raise DamagedFileError("safe_serialization=False would pickle the adapter; only safetensors are written.")
    # the base is never written, not even the embeddings that PEFT adds when an adapter sits on them
    kwargs.setdefault("save_embedding_layers", False)
    with atomic_files_into(path) as folder:
        save_adapter(str(folder), **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        save_file(_gate_weights(model, kwargs.get("state_dict")), folder / GATE_NAME, metadata={"format": "pt"})
        base: Any = model.get_base_model()
        settings = model.imsm_config.to_dict()
        settings["retention"] = IMSMConfig(retention=model.retention).to_dict()["retention"]
        write_json_atomic(
            folder / CONFIG_NAME,
            {
                "imsm": settings,
                "base": recorded_base(base, model.base_fingerprint, model.active_peft_config.revision),
            },
        )
        if model.guard is not None:
            write_guard(model.guard, folder)


def write_guard(guard: DomainGuard, folder: Path) -> None:
    """Add a guard to a folder in which the rest of a model was saved."""
    save_file({name: t.cpu() for name, t in guard.state_dict().items()}, folder / GUARD_NAME, metadata={"format": "pt"})
    settings = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    settings["guard"] = guard.settings.model_copy(update={"strength": guard.strength}).model_dump()
    write_json_atomic(folder / CONFIG_NAME, settings)  # last: without it the guard's file counts for nothing


def _gate_weights(model: "IMSMModel", state_dict: dict[str, Any] | None) -> dict[str, torch.Tensor]:
    """The gate's tensors, from a gathered state dict where a sharded trainer passes one."""
    if state_dict is not None:
        gathered = {k.removeprefix("gate."): v for k, v in state_dict.items() if k.startswith("gate.")}
        if gathered:
            return {k: v.detach().cpu().contiguous() for k, v in gathered.items()}
    return {k: v.detach().cpu().contiguous() for k, v in model.gate.state_dict().items()}


def load(
    cls: "type[IMSMModel]",
    path: str | os.PathLike[str],
    base: PreTrainedModel | str | None,
    is_trainable: bool,
    allow_base_mismatch: bool,
    revision: str | None,
    base_kwargs: dict[str, Any],
) -> "IMSMModel":
    """See `IMSMModel.from_pretrained`."""
    folder = local_folder(path, revision)
    settings = _read_settings(folder)
    check_adapter_files(folder)
    if not (folder / GATE_NAME).is_file():
        raise DamagedFileError(f"{folder} has no {GATE_NAME}. Save the model again.")
    recorded = settings["base"]
    base = base_of(folder, recorded, base, base_kwargs)
    check_base(base)
    if not allow_base_mismatch:  # before the base is wrapped, so that it stays as it was
        check_recorded_base(folder, fingerprint(base), MISMATCH_ALLOWED)
    peft_config = read_adapter_config(folder)
    if is_trainable:
        check_goes_on(peft_config)
    peft_config.inference_mode = not is_trainable
    model = cls(base, peft_config, IMSMConfig.from_dict(settings["imsm"]))
    try:
        result = model.load_adapter(str(folder), "default", is_trainable=is_trainable)
    except RuntimeError as error:  # torch's word for tensors of another shape
        raise DamagedFileError(
            f"{folder / ADAPTER_NAME} does not fit {ADAPTER_CONFIG_NAME} beside it: {error}"
        ) from error
    if missing := not_loaded(model, result.missing_keys):
        raise DamagedFileError(
            f"{folder / ADAPTER_NAME} lacks {len(missing)} of the adapter's tensors, the first being "
            f"{missing[0]}. Save the model again."
        )
    model.gate.requires_grad_(is_trainable)
    return model.train(is_trainable)


def not_loaded(model: "IMSMModel", missing: Sequence[str]) -> list[str]:
    """Those of the names that were in no file under any name: layers may share a tensor, which is saved once."""
    if not missing:
        return []
    state = model.state_dict()
    loaded = {tensor.data_ptr() for name, tensor in state.items() if name not in set(missing)}
    return [name for name in missing if name not in state or state[name].data_ptr() not in loaded]


def load_gate_if_present(model: "IMSMModel", path: Any) -> None:
    """Load the gate's weights from folder `path` into `model`; nothing happens where there is none."""
    file = Path(path) / GATE_NAME
    if not file.is_file():
        return
    weights = read_safetensors(file)
    expected = {name: tuple(tensor.shape) for name, tensor in model.gate.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found != expected:
        raise DamagedFileError(f"{file} holds a gate of shapes {found}; this model's gate needs {expected}.")
    model.gate.load_state_dict(weights)


def load_guard_if_present(model: "IMSMModel", path: Any) -> None:
    """Give `model` the guard saved in folder `path`, none if it was saved without; nothing where no model was saved."""
    folder = Path(path)
    if not (folder / CONFIG_NAME).is_file():
        return
    settings = _read_settings(folder).get("guard")
    if settings is None:
        model.guard = None
        return
    weights = read_safetensors(folder / GUARD_NAME)
    if fault := misfit_of_guard(weights, model.gate.hidden_size):
        raise DamagedFileError(f"{folder / GUARD_NAME} {fault}. Save the model again, or fit the guard again.")
    guard = DomainGuard(GuardSettings(**settings), **weights)
    model.guard = guard.to(model.get_output_embeddings().weight.device)


def check_recorded_base(folder: Path, found: BaseFingerprint, otherwise: str = "") -> None:
    """Raise BaseMismatchError unless the model saved in `folder` was made for the base with that fingerprint."""
    check_same_base(folder, _read_settings(folder)["base"], found, otherwise)


def read_adapter_config(folder: Path) -> PeftConfig:
    """PEFT's own configuration of a saved adapter. Raises DamagedFileError for one that cannot be read."""
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(
            f"{folder / ADAPTER_CONFIG_NAME} cannot be read ({error!r}). Save the model again."
        ) from error


def _read_settings(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise DamagedFileError(
            f"{folder} has no {CONFIG_NAME}, so it is not a saved IMSM model. A plain adapter is loaded with "
            "PeftModel.from_pretrained."
        )
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        BaseFingerprint(**settings["base"]["fingerprint"])
        IMSMConfig.from_dict(settings["imsm"])
        GuardSettings(**settings.get("guard") or {})
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(f"{file} cannot be read ({error!r}). Save the model again.") from error
    return settings


def check_adapter_files(folder: Path) -> None:
    """Raise DamagedFileError unless `folder` holds a whole adapter of PEFT's, as safetensors."""
    if not (folder / ADAPTER_CONFIG_NAME).is_file():
        raise DamagedFileError(f"{folder} has no {ADAPTER_CONFIG_NAME}. Save the model again.")
    if not (folder / ADAPTER_NAME).is_file() and (folder / "adapter_model.bin").is_file():
        raise DamagedFileError(
            f"{folder / 'adapter_model.bin'} is a pickle, which can run any code when it is loaded, so it is refused. "
            "Convert it to safetensors where you trust it."
        )
    read_safetensors(folder / ADAPTER_NAME)
