"""The frozen-memory store: what training reads of the original memory of every row, computed once, read from disk.

Knows nothing about recipes, methods or epochs. A store is a folder:

    identity.json             what the states depend on beside the rows; written first
    shard-00000.safetensors   some rows' keys, counts, checksums, states and query means; each whole or not there
    manifest.json             the shards and their sizes; written last, so a folder without it is not finished

Rows are found by a key over their tokens and labels, whatever batch, order and padding they come in. Nothing but the
keys is held in memory: a batch's states are read from the files when they are asked for.
"""

import hashlib
import json
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import DamagedFileError, DataError, UsageError
from ..files import atomic_files_into, write_json_atomic
from ..imsm.labels import FrozenStates
from ..progress import progress_bar
from .frozen_files import (
    IDENTITY,
    MANIFEST,
    Entry,
    StoreIdentity,
    check_identity,
    claim,
    fix,
    holds,
    manifest_of,
    read_entries,
    read_facts,
    to_bytes,
    to_tensor,
    writing,
)
from .frozen_rows import Row, Rows, plan_rows, plan_shards, row_bytes, row_key
from .frozen_source import FrozenSource, source_of

SHARD_BYTES = 256 * 2**20
# How far a row computed again, in another batch or on another device, may be from what is stored, relative to its size.
_TOLERANCE, _TOLERANCE_OF_HALVES = 1e-3, 5e-2
_INPUTS = ("input_ids", "attention_mask", "labels", "query_mask")

Collator = Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]


def identity_of(model: object, tokenizer: PreTrainedTokenizerBase, autocast: str | None) -> StoreIdentity:
    """The identity of a store for this model and tokenizer; `autocast`: the dtype of the training's autocast."""
    source = _source(model)
    dtype = str(source.base.dtype).removeprefix("torch.")
    return StoreIdentity(source.fingerprint.to_dict(), tokenizer_digest(tokenizer), dtype, autocast)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash over what decides a text's token ids, not over how batches are padded or cut."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    facts = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    facts = {name: value for name, value in facts.items() if name not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def stored_bytes(rows: Sequence[Row], model: object) -> int:
    """The disk that the rows' states and query means will take."""
    source = _source(model)
    return sum(row_bytes(row, source.width, source.base.dtype.itemsize) for row in rows)


class FrozenStore:
    """A finished store. Made by `FrozenStore.build`, found again by `FrozenStore.open`."""

    def __init__(self, folder: Path) -> None:
        manifest = read_facts(folder / MANIFEST)
        self.folder = folder
        self.identity = StoreIdentity(**manifest["identity"])
        self.width: int = manifest["width"]
        self._dtype: torch.dtype = getattr(torch, manifest["dtype"])
        self._files = [folder / shard["name"] for shard in manifest["shards"]]
        for file, shard in zip(self._files, manifest["shards"], strict=True):
            size = file.stat().st_size if file.is_file() else None
            if size != shard["bytes"]:
                reason = "is missing" if size is None else f"has {size:,} of {shard['bytes']:,} bytes"
                raise DamagedFileError(f"{file} {reason}. {fix(folder)}")
        self._index: dict[bytes, Entry] = {}
        for number, file in enumerate(self._files):
            self._index |= read_entries(number, file, self.width, self._dtype, folder)
        if len(self._index) != manifest["rows"]:
            raise DamagedFileError(
                f"{folder} holds {len(self._index):,} of the {manifest['rows']:,} rows that its manifest names. "
                f"{fix(folder)}"
            )

    def __len__(self) -> int:
        return len(self._index)

    @classmethod
    def build(
        cls,
        model: object,
        dataset: Rows,
        collator: Collator,
        folder: Path,
        *,
        identity: StoreIdentity,
        batch_size: int = 16,
        shard_bytes: int = SHARD_BYTES,
        rows: Sequence[Row] | None = None,
    ) -> "FrozenStore":
        """Compute and write the original memory of every row of `dataset`, as `collator` batches them.

        Goes on from the whole shards that a killed build left. `rows`: what `plan_rows` gives, if it is known.
        Raises UsageError for a folder that holds something else, TrainingError when it cannot be written.
        """
        source = _source(model)
        rows = plan_rows(dataset, source.has_queries) if rows is None else rows
        width = source.width
        claim(folder, identity)
        shards, names = list(plan_shards(rows, width, source.base.dtype.itemsize, shard_bytes)), []
        with writing(folder), progress_bar() as bar:
            write_json_atomic(folder / IDENTITY, asdict(identity))
            task = bar.add_task("original memory", total=len(rows))
            for number, shard in enumerate(shards):
                file = folder / f"shard-{number:05d}.safetensors"
                if not holds(file, shard):
                    tensors = _compute(
                        source, dataset, collator, shard, identity, batch_size, lambda n: bar.advance(task, n)
                    )
                    with atomic_files_into(folder) as temporary:
                        save_file(tensors, temporary / file.name)
                else:
                    bar.advance(task, len(shard))
                names.append(file.name)
            for file in set(folder.glob("shard-*.safetensors")) - {folder / name for name in names}:
                file.unlink()
            write_json_atomic(folder / MANIFEST, manifest_of(folder, names, rows, width, identity))
        return cls(folder)

    @classmethod
    def open(
        cls,
        folder: Path,
        model: object,
        dataset: Rows,
        collator: Collator,
        *,
        identity: StoreIdentity,
        samples: int = 4,
        rows: Sequence[Row] | None = None,
    ) -> "FrozenStore":
        """The store in `folder`, if it is whole and is what this model gives for this dataset.

        `samples` rows, chosen at random, are computed again and compared. Raises BaseMismatchError for another base,
        UsageError for other settings, DataError for rows that are not in it, and DamagedFileError.
        """
        check_identity(folder, StoreIdentity(**read_facts(folder / MANIFEST)["identity"]), identity)
        store, source = cls(folder), _source(model)
        rows = plan_rows(dataset, source.has_queries) if rows is None else rows
        if missing := sum(row.key not in store._index for row in rows):
            raise DataError(
                f"{folder} was made for other rows: {missing:,} of {len(rows):,} are not in it. {fix(folder)}"
            )
        store._check_sample(source, dataset, collator, random.SystemRandom().sample(rows, min(samples, len(rows))))
        return store

    def batch(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor,
        device: torch.device | str = "cpu",
        query_mask: Tensor | None = None,
    ) -> FrozenStates:
        """The states of a batch, all [B, T], on `device`. Raises DataError for a row that is not in the store."""
        given = [None if t is None else t.cpu() for t in (input_ids, labels, query_mask)]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        states: list[Tensor] = []
        queries: list[Tensor] = []
        for number, attended in enumerate(mask.cpu().bool()):
            key = row_key(*(None if t is None else t[number][attended].numpy() for t in given))
            entry = self._index.get(key)
            if entry is None:
                raise DataError(
                    f"Row {number} of the batch ({int(attended.sum())} tokens) is not in the frozen-memory store "
                    f"{self.folder}. {fix(self.folder)}"
                )
            for parts, part in zip((states, queries), self._read(entry), strict=True):
                parts.append(part)
        return FrozenStates(torch.cat(states).to(device), torch.cat(queries).to(device))

    def _read(self, entry: Entry) -> tuple[Tensor, Tensor]:
        """A row's states [n, d] and queries [m, d]."""
        file, size = self._files[entry.shard], self.width * self._dtype.itemsize
        try:
            with file.open("rb", buffering=0) as opened:  # not mapped: a file that is cut short would kill the process
                opened.seek(entry.states)
                states = opened.read(entry.n * size)
                opened.seek(entry.queries)
                queries = opened.read(entry.m * self.width * 4)
        except OSError as error:
            raise DamagedFileError(f"{file} cannot be read ({error}). {fix(self.folder)}") from error
        if zlib.crc32(queries, zlib.crc32(states)) != entry.checksum:
            raise DamagedFileError(f"{file} is damaged: a row is not what was written. {fix(self.folder)}")
        return to_tensor(states, self._dtype, self.width), to_tensor(queries, torch.float32, self.width)

    def _check_sample(self, source: FrozenSource, dataset: Rows, collator: Collator, rows: Sequence[Row]) -> None:
        if not rows:
            return
        batch = collator([dataset[row.index] for row in rows])
        again = _frozen_states(source, batch, self.identity)
        stored = self.batch(
            batch["input_ids"], batch.get("attention_mask"), batch["labels"], query_mask=batch.get("query_mask")
        )
        exact = self.identity.autocast is None and self.identity.dtype in ("float32", "float64")
        tolerance = _TOLERANCE if exact else _TOLERANCE_OF_HALVES
        for found, kept in ((again.states, stored.states), (again.queries, stored.queries)):
            difference = (found.float() - kept.float()).norm().item()
            if not difference <= tolerance * found.float().norm().item():
                raise DamagedFileError(
                    f"{self.folder} is stale: {len(rows)} of its rows, computed again, differ from what is stored by "
                    f"{difference / max(found.float().norm().item(), 1e-30):.2g} of their size. {fix(self.folder)}"
                )


def _source(model: object) -> FrozenSource:
    source = source_of(model)
    if source is None:
        raise UsageError(f"A {type(model).__name__} reads no original memory, so there is nothing to store.")
    return source


def _frozen_states(source: FrozenSource, batch: Mapping[str, Tensor], identity: StoreIdentity) -> FrozenStates:
    """The original memory of a batch on the CPU, in the same autocast as in training."""
    device = source.base.device
    inputs = {name: batch[name].to(device) for name in _INPUTS if name in batch}
    dtype = getattr(torch, identity.autocast) if identity.autocast else None
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        frozen = source.states(**inputs)
    return FrozenStates(frozen.states.cpu(), frozen.queries.float().cpu())


def _compute(
    source: FrozenSource,
    dataset: Rows,
    collator: Collator,
    rows: Sequence[Row],
    identity: StoreIdentity,
    batch_size: int,
    advance: Callable[[int], None],
) -> dict[str, Tensor]:
    """The tensors of one shard."""
    made = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        made.append(_frozen_states(source, collator([dataset[row.index] for row in part]), identity))
        advance(len(part))
    states, queries = torch.cat([f.states for f in made]), torch.cat([f.queries for f in made])
    counts = [[row.positions for row in rows], [row.queries for row in rows]]
    per_row = zip(states.split(counts[0]), queries.split(counts[1]), strict=True)
    checksums = [zlib.crc32(to_bytes(m), zlib.crc32(to_bytes(s))) for s, m in per_row]
    return {
        "keys": torch.frombuffer(bytearray(b"".join(row.key for row in rows)), dtype=torch.uint8).view(-1, 16),
        "counts": torch.tensor(counts).T.contiguous(),
        "checksums": torch.tensor(checksums),
        "states": states,
        "queries": queries,
    }
