"""Finding a saved model and the base it was made for. Knows nothing about what was made for the base."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from .errors import BaseMismatchError, DamagedFileError, UnsupportedModelError, UsageError
from .fingerprint import BaseFingerprint

MISMATCH_ALLOWED = ", or pass allow_base_mismatch=True to go on all the same"


def recorded_base(base: PreTrainedModel, found: BaseFingerprint, revision: str | None = None) -> dict[str, Any]:
    """What a saved model writes down about its base: where it came from, and its fingerprint."""
    return {
        "name_or_path": base.config._name_or_path or None,
        # transformers keeps no trace of it from 5.23 on; PEFT's configurations have a place for it
        "revision": getattr(base.config, "_commit_hash", None) or revision,
        "fingerprint": found.to_dict(),
    }


def base_of(
    folder: Path, recorded: Mapping[str, Any], base: PreTrainedModel | str | None, base_kwargs: dict[str, Any]
) -> PreTrainedModel:
    """The base of the model saved in `folder`: the loaded one, the one of that name, or None: the recorded one.

    `base_kwargs` say how to load it. Raises BaseMismatchError, UnsupportedModelError and UsageError.
    """
    if base is not None and not isinstance(base, str):
        if base_kwargs:
            raise UsageError(
                f"{', '.join(sorted(base_kwargs))}: these say how to load a base, but a loaded one was passed."
            )
        return base
    name = base or recorded["name_or_path"]
    if not name:
        raise BaseMismatchError(
            f"{folder} does not record the name of its base (it was made from a config). Pass base=MODEL."
        )
    if base is None and recorded.get("revision"):
        base_kwargs.setdefault("revision", recorded["revision"])
    try:
        return AutoModelForCausalLM.from_pretrained(name, **base_kwargs)
    except (OSError, ValueError, ImportError, SafetensorError) as error:  # ImportError: what its quantisation needs
        reason = " ".join(str(error).split())
        raise UnsupportedModelError(
            f"The base model {name} cannot be loaded ({reason:.300}). Say where it lies: base=MODEL, or --base on the "
            "command line."
        ) from error


def check_same_base(folder: Path, recorded: Mapping[str, Any], found: BaseFingerprint, otherwise: str = "") -> None:
    """Raise BaseMismatchError unless what is saved in `folder` was made for the base with that fingerprint."""
    if differences := BaseFingerprint(**recorded["fingerprint"]).differences(found):
        raise BaseMismatchError(
            f"{folder} was made for another base ({recorded['name_or_path']}): what differs is "
            f"{'; '.join(differences)}. Load that base{otherwise}."
        )


def local_folder(path: str | os.PathLike[str], revision: str | None) -> Path:
    """The folder itself, or what a hub name stands for at that revision. Raises DamagedFileError for neither."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if isinstance(path, str) and path.count("/") == 1 and not path.startswith((".", "/", "~")):
        try:
            return Path(snapshot_download(path, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
        except (OSError, ValueError, HfHubHTTPError) as error:
            raise DamagedFileError(
                f"{path}, revision {revision or 'main'}, is no folder here and cannot be had from the hub "
                f"({' '.join(str(error).split()):.200}). Check the name and the revision."
            ) from error
    raise DamagedFileError(f"There is no folder {folder}. Pass a folder written by save_pretrained, or a hub name.")
