"""Which model a bank belongs to: written into the bank's folder, so that a question needs the bank alone. No command
lives here."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .. import pocket
from ..cmt import MemoryBank, MemoryModel
from ..cmt.saving import CONFIG_NAME
from ..errors import DamagedFileError, UsageError
from ..files import write_json_atomic
from ..training.base import default_device
from .shared import lasting

RECORD_NAME = "model.json"


@dataclass(frozen=True)
class ModelRecord:
    """`model`: `pocket`, or a folder. `base`: where its base lies, None for what the model says. `dtype`: precision."""

    model: str
    base: str | None = None
    dtype: str = "float32"

    def open(self, bank: str) -> MemoryModel:
        """The memory model with the bank at `bank`."""
        return open_memory(self.model, bank, self.base, self.dtype)

    def write(self, bank: MemoryBank) -> None:
        """Remember this in the bank's folder; paths become whole ones."""
        record = ModelRecord(lasting(self.model) or self.model, lasting(self.base), self.dtype)
        if "://" not in bank.place and read_record(bank) != record:
            write_json_atomic(Path(bank.place) / RECORD_NAME, asdict(record))

    def begin(self, bank: MemoryBank) -> None:
        """Remember this before the bank has a document, unless the folder is something else's."""
        folder = Path(bank.place)
        if bank.exists or not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            self.write(bank)


def read_record(bank: MemoryBank) -> ModelRecord | None:
    """What the bank's folder remembers, or None. Raises DamagedFileError."""
    file = Path(bank.place) / RECORD_NAME
    if not file.is_file():
        return None
    try:
        record = ModelRecord(**json.loads(file.read_text(encoding="utf-8")))
        if not isinstance(record.model, str) or record.dtype not in ("float32", "bfloat16"):
            raise TypeError("it names no model")
    except (ValueError, TypeError) as error:
        raise DamagedFileError(f"{file} cannot be read ({error}). Delete it, and give --model once more.") from error
    return record


def open_memory(where: str, bank: str, base: str | None = None, dtype: str = "float32") -> MemoryModel:
    """A saved memory model with the bank at `bank`, ready for documents and questions.

    `where`: the folder of a memory model, that of a run with one, or `pocket`. `base`: where the base lies now;
    `dtype`: its precision. Raises UsageError where there is no model, and what MemoryModel.from_pretrained raises.
    """
    shipped = where == "pocket"
    run = pocket.memory_dir() if shipped else Path(where)
    folders = [run, run / "best", *sorted(run.glob("cells/*/best"))]
    folder = next((folder for folder in folders if (folder / CONFIG_NAME).is_file()), None)
    if folder is None:
        raise UsageError(
            f"There is no memory model in {where} ({CONFIG_NAME} is missing). Give the folder of one, of a run that "
            "trained one, or pocket."
        )
    if shipped and base is None:
        base = str(pocket.base_dir())
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    model = MemoryModel.from_pretrained(folder, base, **options)
    model.to(default_device())
    model.open_bank(bank)
    return model


def existing(path: str) -> MemoryBank:
    """The bank at `path`. Raises UsageError where there is none."""
    bank = MemoryBank(path)
    if not bank.exists:
        raise UsageError(f"There is no bank at {path}. Make one with `twinweave memory add`, or name it with --bank.")
    return bank
