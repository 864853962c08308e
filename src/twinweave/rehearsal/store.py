"""The file beside a run that holds what its base wrote, so that it is written once.

Knows nothing about how it is written. It names the base's fingerprint and the settings in its header; another base or
other settings are refused.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..errors import DamagedFileError
from ..files import atomic_files_into, read_safetensors
from ..processes import is_first, wait_for
from .rows import Written

NAME = "self_written.safetensors"


def load_sequences(folder: Path, identity: dict[str, object], write: Callable[[], list[Written]]) -> list[Written]:
    """The sequences of `folder`, made by `write` (in the first of a run's processes) if they are not there yet.

    `identity`: what they depend on (base, tokenizer, settings), as plain values. Raises DamagedFileError when the
    folder holds those of something else, or a damaged file.
    """
    file = folder / NAME
    if not file.is_file() and is_first():
        _save(folder, identity, write())
    wait_for(file)
    tensors = read_safetensors(file)
    try:
        with safe_open(file, "pt") as opened:
            found = json.loads(opened.metadata()["identity"])
        rows = tensors["ids"].split(tensors["lengths"].tolist())
        written = [
            Written(ids.tolist(), answer if answer >= 0 else None)
            for ids, answer in zip(rows, tensors["answers"].tolist(), strict=True)
        ]
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise DamagedFileError(
            f"{file} is no file of self-written text ({error}). Remove it: it is made again."
        ) from error
    if differing := sorted(key for key in {*found, *identity} if found.get(key) != identity.get(key)):
        raise DamagedFileError(
            f"{file} was written for something else: {', '.join(differing)} differ. Remove it, or choose another "
            "output folder."
        )
    return written


def _save(folder: Path, identity: dict[str, object], written: list[Written]) -> None:
    with atomic_files_into(folder) as place:
        save_file(
            {
                "ids": torch.tensor([token for text in written for token in text.ids], dtype=torch.int32),
                "lengths": torch.tensor([len(text.ids) for text in written]),
                "answers": torch.tensor([-1 if text.answer is None else text.answer for text in written]),
            },
            place / NAME,
            metadata={"identity": json.dumps(identity)},
        )
