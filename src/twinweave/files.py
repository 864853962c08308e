"""Writing files so that a reader sees the old content or the new, never half of one.

Everything is written to a temporary sibling first and then renamed. Knows nothing about what is written.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .errors import DamagedFileError


def temporary_sibling(path: Path) -> Path:
    """A fresh name beside `path`, on the same file system, so that a rename to `path` is atomic."""
    return path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text to `path` in one step; parent folders are created."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(path)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json_atomic(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON in one step. NaN and infinity are refused: they are not JSON."""
    write_text_atomic(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes `path` when the block ends without an error.

    An existing `path` is replaced. After an error nothing is left behind and an existing `path` is untouched.
    """
    path = Path(path).resolve()  # the folder behind a link is replaced, not the link
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(path)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            old = temporary_sibling(path)
            os.replace(path, old)
            try:
                os.replace(temporary, path)
            except OSError:
                os.replace(old, path)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_files_into(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary folder whose files move into the (possibly filled) folder `path` at the end.

    For formats that share a folder with other files. Each file appears whole; after an error none appears.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    # inside, since the folder may be a mount point, whose parent is another file system
    temporary = path / f".tmp-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        yield temporary
        for source in sorted(p for p in temporary.rglob("*") if p.is_file()):
            goal = path / source.relative_to(temporary)
            goal.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, goal)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises DamagedFileError for a missing, cut or pickled file."""
    path = Path(path)
    if not path.is_file():
        raise DamagedFileError(f"{path} does not exist.")
    with path.open("rb") as file:
        head = file.read(9)
    # a safetensors file starts with the length of its header, which may well look like the start of a pickle
    if not head.endswith(b"{") and head[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise DamagedFileError(
            f"{path} is a pickle under the name of a safetensors file. It is refused, since loading a pickle can run "
            "any code. Save it again as safetensors where you trust it."
        )
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise DamagedFileError(
            f"{path} is damaged or cut short ({error}). Copy it again from where it came, or save it again."
        ) from error
