"""The files of a frozen-memory store: what they hold, and what can be wrong with them.

Knows nothing about models. The layout is described in `frozen_store.py`.
"""

import contextlib
import json
import shutil
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import BaseMismatchError, DamagedFileError, TrainingError, TwinweaveError, UsageError
from ..files import read_safetensors
from ..fingerprint import BaseFingerprint
from .frozen_rows import Row

FORMAT = 1
IDENTITY, MANIFEST = "identity.json", "manifest.json"
_MANIFEST_KEYS = {"identity", "rows", "positions", "width", "dtype", "shards"}


@dataclass(frozen=True)
class StoreIdentity:
    """What stored states depend on beside the rows themselves."""

    base: dict[str, Any]
    """The base's fingerprint."""
    tokenizer: str
    dtype: str
    """Of the base's weights."""
    autocast: str | None
    format: int = FORMAT


@dataclass(frozen=True)
class Entry:
    """Where a row's states [n, d] and queries [m, d] begin, in bytes of the shard."""

    shard: int
    states: int
    n: int
    queries: int
    m: int
    checksum: int


def is_finished(folder: Path) -> bool:
    """Whether a build came to its end there."""
    return (folder / MANIFEST).is_file()


def fix(folder: Path) -> str:
    """What to do about a store that cannot be used, as a sentence."""
    return f"Delete {folder}, or choose another folder with training.frozen_store=FOLDER."


def manifest_of(
    folder: Path, names: Sequence[str], rows: Sequence[Row], width: int, identity: StoreIdentity
) -> dict[str, Any]:
    """What the manifest of a store of these shards says."""
    dtypes = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    return {
        "identity": asdict(identity),
        "rows": len(rows),
        "positions": sum(row.positions for row in rows),
        "width": width,
        "dtype": dtypes[_header(folder / names[0])[0]["states"]["dtype"]] if names else "float32",
        "shards": [{"name": name, "bytes": (folder / name).stat().st_size} for name in names],
    }


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where the data behind it begin."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        return json.loads(opened.read(length)), 8 + length


def _small(file: Path) -> tuple[list[bytes], list[list[int]], list[int], dict[str, int]]:
    """What a shard says of its rows: keys, counts, checksums; and the byte at which each tensor begins."""
    header, start = _header(file)
    begins = {name: start + value["data_offsets"][0] for name, value in header.items() if name != "__metadata__"}
    with file.open("rb") as opened:

        def read(name: str, dtype: Any) -> Any:
            opened.seek(begins[name])
            first, last = header[name]["data_offsets"]
            return numpy.frombuffer(opened.read(last - first), dtype=dtype)

        keys = read("keys", numpy.uint8).tobytes()
        names = [keys[i : i + 16] for i in range(0, len(keys), 16)]
        return names, read("counts", "<i8").reshape(-1, 2).tolist(), read("checksums", "<i8").tolist(), begins


def read_entries(number: int, file: Path, width: int, dtype: torch.dtype, folder: Path) -> dict[bytes, Entry]:
    """Where each row of shard `number` is. Raises DamagedFileError."""
    try:
        keys, counts, checksums, begins = _small(file)
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise DamagedFileError(f"{file} is damaged ({error!r}). {fix(folder)}") from error
    entries, states, queries = {}, begins["states"], begins["queries"]
    for key, (n, m), checksum in zip(keys, counts, checksums, strict=True):
        entries[key] = Entry(number, states, n, queries, m, checksum)
        states, queries = states + n * width * dtype.itemsize, queries + m * width * 4
    return entries


def holds(file: Path, rows: Sequence[Row]) -> bool:
    """Whether the shard is whole and is the one that was planned."""
    if not file.is_file():
        return False
    try:
        read_safetensors(file)
        return _small(file)[0] == [row.key for row in rows]
    except (TwinweaveError, ValueError, KeyError, struct.error):
        return False


def claim(folder: Path, identity: StoreIdentity) -> None:
    """See that the folder is free for a store of that identity; remove what a killed build had not finished."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file. Choose a folder with training.frozen_store=FOLDER.")
    if (folder / IDENTITY).is_file():
        check_identity(folder, StoreIdentity(**read_facts(folder / IDENTITY)), identity)
    elif folder.is_dir() and any(not path.name.startswith(f".{IDENTITY}.tmp-") for path in folder.iterdir()):
        raise UsageError(
            f"{folder} is no frozen-memory store and is not empty. Choose another folder with "
            "training.frozen_store=FOLDER."
        )
    for trace in folder.glob(".*tmp-*") if folder.is_dir() else ():
        shutil.rmtree(trace) if trace.is_dir() else trace.unlink()


def check_identity(folder: Path, found: StoreIdentity, expected: StoreIdentity) -> None:
    """Raise BaseMismatchError for another base and UsageError for any other difference."""
    if found.format != expected.format:
        raise UsageError(f"{folder} has format {found.format}; this version reads {FORMAT}. {fix(folder)}")
    if differences := BaseFingerprint(**found.base).differences(BaseFingerprint(**expected.base)):
        raise BaseMismatchError(
            f"{folder} was made with another base: what differs is {'; '.join(differences)}. {fix(folder)}"
        )
    for name in ("tokenizer", "dtype", "autocast"):
        was, now = getattr(found, name), getattr(expected, name)
        if was != now:
            raise UsageError(f"{folder} was made with another {name} ({was}, now {now}). {fix(folder)}")


def read_facts(file: Path) -> dict[str, Any]:
    """The content of identity.json or manifest.json. Raises DamagedFileError."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        known = StoreIdentity.__dataclass_fields__
        identity = values.get("identity", values)
        if set(identity) != set(known) or ("identity" in values and set(values) != _MANIFEST_KEYS):
            raise ValueError("not the keys of a frozen-memory store")
        return dict(values)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"{file} cannot be read ({error}). {fix(file.parent)}") from error


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a failure to write within the block into a TrainingError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"The frozen-memory store {folder} could not be written ({error}). See that the disk has space, then run "
            "the same command to go on, or use training.frozen_store=off."
        ) from error


def to_bytes(tensor: Tensor) -> bytes:
    """The values of a CPU tensor as they are written."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def to_tensor(content: bytes, dtype: torch.dtype, width: int) -> Tensor:
    """The inverse of `to_bytes`: [rows, width]."""
    if not content:
        return torch.empty(0, width, dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=dtype).view(-1, width)
