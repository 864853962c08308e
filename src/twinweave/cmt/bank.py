"""The bank of compressed documents: a table of LanceDB on disk, one row for each memory.

Knows nothing about models. Every change is one version of the table, whole or not there: whoever reads, and whatever is
killed, finds whole documents only.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from ..errors import BaseMismatchError, DamagedFileError, UnsupportedModelError, UsageError

INDEXED_FROM = 20_000
"""Memories from which on an index is kept: below, looking at every key takes milliseconds."""
_UNINDEXED = 0.1  # the share of new memories that the index may lack, which every search looks at one by one
_FRAGMENTS = 64  # files of one change each that are put together
_PROBED = 1 / 3  # the share of the index's cells that are looked into
_LISTED = 500  # ids or digests that one query names
_WAIT = 60.0  # seconds for another writer to finish
_OF_A_HIT = ["id", "part", "metadata", "memory", "_distance"]
_NOT_A_BLOCK = ["id", "part", "parts", "digest", "tokens", "metadata", "compressor"]


@dataclass(frozen=True)
class Memory:
    """One memory: part `part` of the `parts` of a document that has `tokens` tokens in it.

    key [D]: what it is found by, of length 1. block [k, D]: the memory itself, kept in bfloat16.
    """

    id: str
    digest: str
    key: Tensor
    block: Tensor
    part: int = 0
    parts: int = 1
    tokens: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Hit:
    """A memory that was found for a question. similarity: the cosine of their keys."""

    id: str
    part: int
    similarity: float
    metadata: dict[str, Any]
    block: Tensor = field(repr=False)


class MemoryBank:
    """The bank at `path`, a folder that ends in `.lance` (or a place on an object store that LanceDB knows).

    `compressor`: the fingerprint of what makes its memories; those of another are refused. `shape`: (k, D). Nothing is
    written before the first `add`.
    """

    def __init__(self, path: str | os.PathLike[str], compressor: str, shape: tuple[int, int]) -> None:
        self.path, self.compressor, self.shape = os.fspath(path).rstrip("/"), compressor, shape
        folder, _, name = self.path.rpartition("/")
        if not name.endswith(".lance") or name == ".lance":
            raise UsageError(f"The bank {self.path!r} is no name of a bank. Let it end in .lance, such as bank.lance.")
        self._name = name.removesuffix(".lance")
        self._local = "://" not in self.path
        try:
            import lancedb
        except ImportError as error:
            raise UnsupportedModelError(
                "A bank of memories is a table of LanceDB, which is not installed. Install it: "
                "pip install 'twinweave[memory]'"
            ) from error
        # every read looks for a newer version, since another process may write
        self._folder = folder or ("." if not self.path.startswith("/") else "/")
        self._connect = lambda: lancedb.connect(self._folder, read_consistency_interval=timedelta(0))
        self._table: Any = None
        self._check()

    # --- reading ----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """The number of documents."""
        return self._count("part = 0")

    @property
    def memories(self) -> int:
        """The number of memories: a long document has several."""
        return self._count(None)

    def ids_of(self, digests: Sequence[str]) -> dict[str, str]:
        """Those of the texts that are in the bank: SHA-256 -> id."""
        return {row["digest"]: row["id"] for row in self._rows_with("digest", digests)}

    def digests_of(self, ids: Sequence[str]) -> dict[str, str]:
        """Those of the documents that are in the bank: id -> SHA-256 of its text."""
        return {row["id"]: row["digest"] for row in self._rows_with("id", ids)}

    def documents(self, where: str | Mapping[str, Any] | None = None, limit: int | None = None) -> list[dict[str, Any]]:
        """Facts about each document, in the order of their ids: id, parts, tokens (of its first part), digest and
        metadata. See `search` for `where`."""
        table = self._open()
        if table is None:
            return []
        query = table.search().where(_all_of("part = 0", sql_of(where))).select(_NOT_A_BLOCK)
        rows = self._run(lambda: query.limit(limit or max(table.count_rows(), 1)).to_list())
        return [_readable(row) for row in sorted(rows, key=lambda row: row["id"])]

    def search(self, keys: Tensor, top_k: int, where: str | Mapping[str, Any] | None = None) -> list[list[Hit]]:
        """For each key [B, D] the `top_k` memories nearest to it, the nearest first; fewer in a smaller bank.

        where: only documents with this metadata: {"source": "a.md", "year": [2024, 2025]}, or a condition of
        LanceDB's SQL. Raises UsageError for one that cannot be read.
        """
        table = self._open()
        if table is None or not table.count_rows():
            return [[] for _ in keys]
        condition = sql_of(where)
        indexed = next((index for index in table.list_indices() if "key" in index.columns), None)
        found = []
        for key in keys.float().cpu().numpy():
            query = table.search(key).distance_type("cosine").limit(top_k)
            if indexed is not None:
                query = query.nprobes(self._probes(table))
            if condition:
                query = query.where(condition, prefilter=True)
            rows = self._run(lambda query=query: query.select(_OF_A_HIT).to_arrow().to_pylist())
            # memories that are equally near come in the order of their names, whenever they were added
            rows.sort(key=lambda row: (row["_distance"], row["id"], row["part"]))
            found.append([self._hit(row) for row in rows])
        return found

    def versions(self) -> list[dict[str, Any]]:
        """The states that can be restored, oldest first: version, when it was written, and its number of memories."""
        table = self._open()
        listed = [] if table is None else table.list_versions()
        return [
            {"version": v["version"], "written": v["timestamp"], "memories": int(v["metadata"]["total_rows"])}
            for v in listed
        ]

    def stats(self) -> dict[str, Any]:
        """Numbers of documents, memories and tokens, bytes on disk, the version, and whether there is an index."""
        table = self._open()
        if table is None:
            return {"documents": 0, "memories": 0, "bytes": 0, "version": None, "indexed": 0}
        indices = [index for index in table.list_indices() if "key" in index.columns]
        indexed = table.index_stats(indices[0].name).num_indexed_rows if indices else 0
        size = sum(file.stat().st_size for file in Path(self.path).rglob("*") if file.is_file()) if self._local else 0
        return {
            "documents": len(self),
            "memories": self.memories,
            "bytes": size,
            "version": table.version,
            "indexed": indexed,
        }

    # --- writing ----------------------------------------------------------------------------------------------------

    def add(self, memories: Sequence[Memory]) -> None:
        """Add documents, all in one change, each with all its parts. A document whose id is there is replaced.

        Raises DamagedFileError where the bank cannot be written.
        """
        if not memories:
            return
        rows = self._arrow(memories)
        with self.writing():
            table = self._open() or self._create()
            ids = sorted({memory.id for memory in memories})
            known = self._rows_with("id", ids)
            if not known:
                self._run(lambda: table.add(rows))
            else:
                gone = " OR ".join(f"id IN ({_listed(part)})" for part in _in_parts(ids))
                merge = table.merge_insert(["id", "part"]).when_matched_update_all().when_not_matched_insert_all()
                self._run(lambda: merge.when_not_matched_by_source_delete(gone).execute(rows))
            self._tidy(table)

    def remove(self, ids: Sequence[str]) -> list[str]:
        """Take documents out, all in one change; the ids that were there."""
        with self.writing():
            table = self._open()
            there = sorted({row["id"] for row in self._rows_with("id", list(ids))})
            if there:
                self._run(lambda: table.delete(" OR ".join(f"id IN ({_listed(part)})" for part in _in_parts(there))))
        return there

    def restore(self, version: int) -> None:
        """Make the bank what it was at that version, as a new version. Raises UsageError for one that is not there."""
        known = [v["version"] for v in self.versions()]
        if version not in known:
            raise UsageError(
                f"The bank {self.path} has no version {version}; it has {', '.join(map(str, known[-10:])) or 'none'}."
            )
        with self.writing():
            self._run(lambda: self._open().restore(version))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Only one process writes at a time; the others wait."""
        if not self._local:
            with nullcontext():
                yield
            return
        Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{self.path}.lock", timeout=_WAIT)
        try:
            lock.acquire()
        except Timeout as error:
            raise UsageError(
                f"Another process has been writing to {self.path} for a minute. Wait until it is done, or stop it."
            ) from error
        try:
            yield
        finally:
            lock.release()

    # --- the table --------------------------------------------------------------------------------------------------

    def _open(self) -> Any:
        """The table, or None where there is none yet."""
        if self._table is None and (not self._local or Path(self.path).is_dir()):
            try:
                self._table = self._connect().open_table(self._name)
            except (ValueError, FileNotFoundError) as error:  # LanceDB's for a table that is not there
                if not self._local:
                    return None
                raise DamagedFileError(
                    f"{self.path} is no bank that can be opened ({_line(error)}). Choose another place."
                ) from error
        return self._table

    def _create(self) -> Any:
        self._table = self._run(lambda: self._connect().create_table(self._name, schema=self._schema()))
        return self._table

    def _schema(self) -> Any:
        import pyarrow as pa

        k, width = self.shape
        return pa.schema(
            [
                pa.field("id", pa.string(), nullable=False),
                pa.field("part", pa.int32(), nullable=False),
                pa.field("parts", pa.int32()),
                pa.field("digest", pa.string(), nullable=False),
                pa.field("tokens", pa.int32()),
                pa.field("metadata", pa.json_()),
                pa.field("compressor", pa.string(), nullable=False),
                pa.field("key", pa.list_(pa.float32(), width)),
                pa.field("memory", pa.binary(k * width * 2)),  # bfloat16
            ]
        )

    def _arrow(self, memories: Sequence[Memory]) -> Any:
        import pyarrow as pa

        schema = self._schema()
        columns: dict[str, Any] = {name: [getattr(m, name) for m in memories] for name in ("id", "part", "parts")}
        columns["digest"] = [m.digest for m in memories]
        columns["tokens"] = [m.tokens for m in memories]
        columns["metadata"] = pa.array([_json(m.metadata) for m in memories], pa.json_())
        columns["compressor"] = [self.compressor] * len(memories)
        keys = torch.stack([m.key for m in memories]).float().cpu().contiguous()
        columns["key"] = pa.FixedSizeListArray.from_arrays(pa.array(keys.flatten().numpy()), self.shape[1])
        blocks = [m.block.to("cpu", torch.bfloat16).contiguous().view(torch.uint8) for m in memories]
        columns["memory"] = pa.array([block.numpy().tobytes() for block in blocks], schema.field("memory").type)
        return pa.table(columns, schema=schema)

    def _hit(self, row: dict[str, Any]) -> Hit:
        block = torch.frombuffer(bytearray(row["memory"]), dtype=torch.bfloat16).view(self.shape).float()
        return Hit(row["id"], row["part"], 1 - row["_distance"], json.loads(row["metadata"]), block)

    def _count(self, condition: str | None) -> int:
        table = self._open()
        return 0 if table is None else int(self._run(lambda: table.count_rows(condition)))

    def _rows_with(self, column: str, values: Sequence[str]) -> list[dict[str, Any]]:
        """id and digest of the documents with one of these values."""
        table = self._open()
        rows: list[dict[str, Any]] = []
        for part in _in_parts(values) if table is not None else ():
            condition = f"part = 0 AND {column} IN ({_listed(part)})"
            query = table.search().where(condition).select(["id", "digest"])
            rows += self._run(lambda query=query: query.limit(max(table.count_rows(), 1)).to_list())
        return rows

    def _check(self) -> None:
        """Raise BaseMismatchError for a bank that another compressor has written."""
        table = self._open()
        if table is None:
            return
        expected = self._schema()
        if set(table.schema.names) != set(expected.names):
            raise DamagedFileError(f"{self.path} is another table of LanceDB, and no bank. Choose another place.")
        first = self._run(lambda: table.search().select(["compressor"]).limit(1).to_list())
        fits = all(table.schema.field(name).type == expected.field(name).type for name in ("key", "memory"))
        if not fits or (first and first[0]["compressor"] != self.compressor):
            wrote = first[0]["compressor"] if first else "one of other sizes"
            raise BaseMismatchError(
                f"The bank {self.path} was written by another compressor ({wrote}) than this one ({self.compressor}). "
                "Load the model that wrote it, or start another bank and add the documents again."
            )

    def _tidy(self, table: Any) -> None:
        """Put many small files together, and keep the index up to date once there is one or it pays."""
        count = table.count_rows()
        index = next((index for index in table.list_indices() if "key" in index.columns), None)
        unindexed = 0 if index is None else table.index_stats(index.name).num_unindexed_rows
        fragments = table.stats()["fragment_stats"]["num_fragments"]
        if index is None and count >= INDEXED_FROM:
            self._make_index(table)
        elif unindexed > _UNINDEXED * count or fragments > _FRAGMENTS:
            self._run(table.optimize)

    def _make_index(self, table: Any) -> None:
        from lancedb.index import IvfFlat

        self._run(lambda: table.create_index("key", config=IvfFlat(distance_type="cosine", num_partitions=None)))

    def _probes(self, table: Any) -> int:
        return max(8, round(_PROBED * table.count_rows() ** 0.5))

    def _run(self, action: Any) -> Any:
        """What the action gives; LanceDB's errors in our words."""
        try:
            return action()
        except (ValueError, RuntimeError, OSError) as error:
            if isinstance(error, ValueError) and "where" in str(error).lower():
                raise UsageError(f"The condition on the metadata cannot be read ({_line(error)}).") from error
            raise DamagedFileError(f"The bank {self.path} could not be used ({_line(error)}).") from error


def sql_of(where: str | Mapping[str, Any] | None) -> str | None:
    """A condition on metadata as LanceDB's SQL: every key has the value, or one of the values of a list."""
    if where is None or isinstance(where, str):
        return where or None
    parts = []
    for key, value in where.items():
        values = value if isinstance(value, list | tuple | set) else [value]
        parts.append(f"json_extract(metadata, {_quoted(_path_of(key))}) IN ({_listed([_json(v) for v in values])})")
    return " AND ".join(parts) or None


def _path_of(key: str) -> str:
    return f'$."{key}"'


def _all_of(*conditions: str | None) -> str:
    return " AND ".join(f"({condition})" for condition in conditions if condition)


def _listed(values: Sequence[str]) -> str:
    return ", ".join(_quoted(value) for value in values)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _in_parts(values: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(values), _LISTED):
        yield values[start : start + _LISTED]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _readable(row: dict[str, Any]) -> dict[str, Any]:
    return {
        **{name: row[name] for name in ("id", "parts", "tokens", "digest")},
        "metadata": json.loads(row["metadata"]),
    }


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
