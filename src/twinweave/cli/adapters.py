"""The folder of a generated adapter: what was read, the LoRA made of it, and which reader made both.

It is written whole or not at all. No command lives here.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from pathlib import Path

import torch
import transformers

from ..errors import BaseMismatchError, DamagedFileError, UsageError
from ..files import atomic_directory, write_json_atomic
from ..genadapter import AdapterState, GenerativeAdapter
from ..genadapter.state import STATE_NAME
from ..progress import say
from .shared import lasting, open_reader

READER_NAME = "reader.json"
LORA_NAME = "adapter_model.safetensors"
_OURS = (STATE_NAME, READER_NAME, LORA_NAME, "adapter_config.json")


@dataclass(frozen=True)
class ReaderRecord:
    """How a text has to be read again to give the same numbers: written beside every state.

    `reader`: `pocket`, or a folder. `base`: where the base lay, None for where the generator says. `dtype`: the base's.
    """

    reader: str
    base: str | None
    dtype: str
    fingerprint: str = ""
    device: str = ""
    torch: str = ""
    transformers: str = ""

    def open(self) -> GenerativeAdapter:
        """The reader on its base, in the precision it had."""
        return open_reader(self.reader, self.base, self.dtype)

    def made_by(self, reader: GenerativeAdapter) -> "ReaderRecord":
        """This record with what identifies `reader` and decides how it rounds."""
        return ReaderRecord(
            lasting(self.reader) or self.reader,
            lasting(self.base),
            self.dtype,
            reader.fingerprint(),
            str(reader.device.type),
            torch.__version__,
            transformers.__version__,
        )


def read_record(folder: Path) -> ReaderRecord:
    """What `reader.json` in `folder` says. Raises DamagedFileError."""
    file = folder / READER_NAME
    if not file.is_file():
        raise DamagedFileError(f"{folder} holds no generated adapter ({READER_NAME} is missing). Make one with `read`.")
    try:
        record = ReaderRecord(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DamagedFileError(
            f"{file} cannot be read ({error}). Read the texts again, into another folder."
        ) from error
    if record.dtype not in ("float32", "bfloat16") or not isinstance(record.reader, str):
        raise DamagedFileError(f"{file} names no reader that there is. Read the texts again, into another folder.")
    return record


def check_replaceable(folder: Path) -> None:
    """Raises UsageError for the working directory and those around it: a folder is replaced whole, and whoever works
    in it would be nowhere afterwards."""
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UsageError(
            f"{folder} is the folder you are in, or one around it, and it would be replaced. Name another, or go to "
            "the folder it is in and name it from there."
        )


def free_or_ours(folder: Path) -> bool:
    """Whether `folder` is a generated adapter's; False where nothing is there. Raises UsageError for something else."""
    check_replaceable(folder)
    if (folder / READER_NAME).is_file():
        return True
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is no generated adapter. Choose another folder with --out.")
    return False


def write_adapter(folder: Path, state: AdapterState, reader: GenerativeAdapter, record: ReaderRecord) -> None:
    """Write state, LoRA and record into `folder` in one step; other files in it stay."""
    with atomic_directory(folder) as temporary:
        if folder.is_dir():
            shutil.copytree(
                folder, temporary, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*_OURS, ".tmp-*")
            )
        state.save(temporary)
        reader.export_lora(state, temporary, dtype=getattr(torch, record.dtype))
        write_json_atomic(temporary / READER_NAME, asdict(record))


def answering(run: str, folders: Sequence[Path], base: str | None) -> tuple[GenerativeAdapter, AdapterState]:
    """The reader in `run`, and the state of having read what all of `folders` have read.

    Raises DamagedFileError for a folder without a state, BaseMismatchError for one of another reader, and UsageError
    for folders that were read in different precision.
    """
    states = [AdapterState.load(folder) for folder in folders]  # before a large base is
    found = {folder: read_record(folder) for folder in folders if (folder / READER_NAME).is_file()}
    records = list(found.values())
    if len({record.dtype for record in records}) > 1:
        read_in = ", ".join(f"{folder} in {record.dtype}" for folder, record in found.items())
        raise UsageError(
            f"These adapters were read in different precision and cannot be added up: {read_in}. Read the texts again "
            "with one --dtype for all."
        )
    record = records[0] if records else ReaderRecord(run, None, "float32")
    reader = open_reader(run, base or record.base, record.dtype)
    for folder, state in zip(folders, states, strict=True):
        belong(state, reader, folder, run)
    counts = sum((state.documents for state in states[1:]), states[0].documents)
    if len(states) > 1 and (several := sum(count > 1 for count in counts.values())):
        say(f"{several} of the texts are in more than one of the adapters, and count as often")
    return reader, reduce(add, states)


def belong(state: AdapterState, reader: GenerativeAdapter, folder: Path, where: str) -> None:
    """Give the state in `folder` the reader that was found in `where`. Raises BaseMismatchError for another's."""
    if state.generator != reader.fingerprint():
        raise BaseMismatchError(
            f"{folder} was read by another generator (fingerprint {state.generator}) than the one in {where} "
            f"({reader.fingerprint()}). Name the one that has read it, or read the texts again into another folder."
        )
    reader.check_state(state)
    state.reader = reader


def note_other_rounding(folder: Path, before: ReaderRecord, now: ReaderRecord) -> None:
    """Say so where the texts were read by other software or on another device: a trace of rounding may stay."""
    different = [
        f"{name} {old} then, {new} now"
        for name in ("device", "torch", "transformers")
        if (old := getattr(before, name)) != (new := getattr(now, name))
    ]
    if different:
        say(
            f"{folder} was read elsewhere ({'; '.join(different)}), where numbers may round otherwise: what is taken "
            "out may leave as much as rounding does"
        )
