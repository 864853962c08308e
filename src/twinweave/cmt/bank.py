"""The bank of compressed documents: a table of LanceDB on disk, one row for each memory.

Knows nothing about models. Every change is one version of the table, whole or not there: whoever reads, and whatever is
killed, finds whole documents only.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from ..errors import BaseMismatchError, DamagedFileError, UnsupportedModelError, UsageError
from . import upkeep
from .conditions import all_of, one_of, sql_of
from .rows import Hit, Memory, as_arrow, gone, hit_of, hits_of, json, made_by, rows_of, schema_of

Where = str | Mapping[str, Any]

_WAIT = 300.0  # seconds for another writer to finish
_MORE = 4  # memories beyond those asked for, to see whether the last ones are equally near
_CACHED = 128 << 20  # bytes of the index that stay in memory, and as many of what is known about files
_OF_A_HIT = ["id", "part", "metadata", "key", "memory", "_distance"]
_OF_A_DOCUMENT = ["id", "parts", "tokens", "digest", "metadata"]
_NAME = re.compile(r"[A-Za-z0-9_.-]+\.lance")
_PLACE_IN_SOURCE = re.compile(r", \S+\.rs:\d+:\d+")


class MemoryBank:
    """The bank at `path`, a folder that ends in `.lance` (or a place on an object store that LanceDB knows).

    `compressor`: the fingerprint of what makes its memories; those of another are refused. `shape`: (k, D). Without
    them the bank is opened for whatever has made it. Nothing is written before the first `add`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        compressor: str | None = None,
        shape: tuple[int, int] | None = None,
    ) -> None:
        self.path, self.compressor, self.shape = os.fspath(path).rstrip("/"), compressor, shape
        self._local = "://" not in self.path
        # by its whole path, since the working directory may change
        place = os.path.abspath(os.path.expanduser(self.path)) if self._local else self.path
        self._folder, _, name = place.rpartition("/")
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"The bank {self.path!r} is no name of a bank. Let it have letters from a to z, digits, _, - and dots, "
                "and end in .lance, such as bank.lance."
            )
        self.place, self._name = place, name.removesuffix(".lance")
        try:
            import lancedb
        except ImportError as error:
            raise UnsupportedModelError(
                "A bank of memories is a table of LanceDB, which is not installed. Install it: "
                "pip install 'twinweave[memory]'"
            ) from error
        self._lancedb = lancedb
        self._table: Any = None
        self._open()

    # --- reading ----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """The number of documents."""
        return self._count("part = 0")

    @property
    def exists(self) -> bool:
        """Whether there is a bank yet."""
        return self._open() is not None

    @property
    def memories(self) -> int:
        """The number of memories: a long document has several."""
        return self._count("parts > 0")

    def ids_of(self, digests: Sequence[str]) -> dict[str, str]:
        """Those of the texts that are in the bank: SHA-256 -> id."""
        return {row["digest"]: row["id"] for row in self._rows_with("digest", digests)}

    def digests_of(self, ids: Sequence[str]) -> dict[str, str]:
        """Those of the documents that are in the bank: id -> SHA-256 of its text."""
        return {row["id"]: row["digest"] for row in self._rows_with("id", ids)}

    def documents(self, where: Where | None = None, limit: int | None = None) -> Iterator[dict[str, Any]]:
        """Facts about each document, in the order of their ids: id, parts, tokens, digest and metadata.

        `where`: see `search`. Raises UsageError for a condition that cannot be read.
        """
        table = self._open()
        if table is None:
            return
        from lancedb.query import ColumnOrdering

        condition = sql_of(where)
        query = table.search().where(all_of("part = 0", condition)).select(_OF_A_DOCUMENT)
        query = query.order_by([ColumnOrdering(column_name="id", ascending=True)])
        with self._errors(condition):
            for batch in (query if limit is None else query.limit(limit)).to_batches():
                for row in batch.to_pylist():
                    yield row | {"metadata": json.loads(row["metadata"])}

    def search(self, keys: Tensor, top_k: int, where: Where | None = None) -> list[list[Hit]]:
        """For each key [B, D] the `top_k` memories nearest to it, the nearest first; fewer in a smaller bank.

        where: only documents with this metadata: {"source": "a.md", "year": [2024, 2025]}, or a condition of
        LanceDB's SQL. Raises UsageError for one that cannot be read.
        """
        condition, table = sql_of(where), self._open()
        found: list[list[Hit]] = [[] for _ in keys]
        if table is None:
            return found
        assert self.shape is not None
        keys, limit, asked = keys.detach().float().cpu(), top_k + _MORE, list(range(len(keys)))
        while asked:
            cut = []
            for number, rows in zip(asked, self._nearest(table, keys[asked], limit, condition), strict=True):
                ranked = hits_of(rows, keys[number])
                if len(ranked) >= limit and ranked[-1][0] == ranked[top_k - 1][0]:
                    cut.append(number)  # of many that are equally near LanceDB gives any
                found[number] = [hit_of(hit, self.shape) for hit in ranked[:top_k]]
            asked, limit = cut, limit * 8
        return found

    def versions(self) -> list[dict[str, Any]]:
        """The states that can be restored, oldest first: version, when it was written, and its number of memories.

        Those of the last week are kept.
        """
        table = self._open()
        return [
            {"version": v["version"], "written": v["timestamp"], "memories": int(v["metadata"]["total_rows"])}
            for v in (table.list_versions() if table is not None else ())
        ]

    def stats(self) -> dict[str, Any]:
        """Numbers of documents, memories and tokens, bytes on disk (of all versions), the version, the compressor, and
        the index with the number of memories in it."""
        table = self._open()
        facts: dict[str, Any] = {
            "documents": len(self),
            "memories": self.memories,
            "tokens": 0,
            "bytes": 0,
            "version": None,
        }
        facts |= {"compressor": self.compressor, "index": None, "indexed": 0}
        if table is None:
            return facts
        index = upkeep.index_of(table)
        if index is not None:
            facts |= {"index": index.index_type, "indexed": index.num_indexed_rows}
        tokens = table.search().where("part = 0").select(["tokens"]).to_batches()
        facts["tokens"] = sum(sum(batch["tokens"].to_pylist()) for batch in tokens)
        facts["bytes"] = _size_of(Path(self.place)) if self._local else None
        return facts | {"version": table.version}

    # --- writing ----------------------------------------------------------------------------------------------------

    def add(self, memories: Sequence[Memory]) -> dict[str, str]:
        """Add documents, all in one change, each with all its parts. A document whose id is there is replaced.

        A new one whose text is in the bank under another id, as another process may have added it meanwhile, is left
        out; returns those: id -> the id that the text has. Raises UsageError for part of a document, and
        DamagedFileError where the bank cannot be written.
        """
        if not memories:
            return {}
        if self.compressor is None or self.shape is None:
            raise UsageError(f"There is no bank at {self.path}. Say whose memories it shall hold.")
        rows, schema = rows_of(memories, self.compressor, self.shape), schema_of(self.compressor, self.shape)
        parts = {memory.id: memory.parts for memory in memories}
        with self.writing(), self._errors():
            table = self._open() or self._create(schema)
            before = {row["id"]: row["parts"] for row in self._rows_with("id", list(parts))}
            digests = {memory.id: memory.digest for memory in memories if memory.id not in before}
            # whoever loses this text to the same change does not keep it from having another name
            held = {digest: name for digest, name in self.ids_of([*digests.values()]).items() if name not in parts}
            left_out = {name: held[digest] for name, digest in digests.items() if digest in held}
            rows = [row for row in rows if row["id"] not in left_out]
            if not rows:
                return left_out
            left = [
                gone(name, part, self.compressor)
                for name, count in before.items()
                for part in range(parts[name], count)
            ]
            if before:
                # rows that are no longer any memory's are marked by the change itself: a merge that deletes rows would
                # read the whole bank into memory
                merge = table.merge_insert(["id", "part"]).when_matched_update_all().when_not_matched_insert_all()
                merge.execute(as_arrow(rows + left, schema), on_bad_vectors="null")
                if left:
                    table.delete("parts = 0")
            else:
                table.add(as_arrow(rows, schema))
            upkeep.tidy(table)
        return left_out

    def remove(self, ids: Sequence[str]) -> list[str]:
        """Take documents out, all in one change; the ids that were there."""
        if not self.exists:
            return []
        with self.writing(), self._errors():
            there = sorted({row["id"] for row in self._rows_with("id", list(ids))})
            if there:
                self._open().delete(" OR ".join(one_of("id", there)))
        return there

    def restore(self, version: int) -> None:
        """Make the bank what it was at that version, as a new version. Raises UsageError for one that is not there."""
        known = [v["version"] for v in self.versions()]
        if version not in known:
            has = f"those from {known[0]} to {known[-1]} that `versions` lists" if known else "none"
            raise UsageError(f"The bank {self.path} has no version {version}; it has {has}.")
        with self.writing(), self._errors():
            self._open().restore(version)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Only one process writes at a time; the others wait."""
        if not self._local:  # there LanceDB itself refuses the second of two changes at the same time
            yield
            return
        Path(self._folder).mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{self.place}.lock", timeout=_WAIT)
        try:
            lock.acquire()
        except Timeout as error:
            raise UsageError(
                f"Another process has been writing to {self.path} for {_WAIT / 60:.0f} minutes. Wait until it is done, "
                "or stop it."
            ) from error
        try:
            yield
        finally:
            lock.release()

    # --- the table --------------------------------------------------------------------------------------------------

    def _open(self) -> Any:
        """The table, or None where there is none yet."""
        # a process that was killed while it made the table leaves a folder without a version
        if self._table is None and (not self._local or (Path(self.place) / "_versions").is_dir()):
            try:
                table = self._connect().open_table(self._name)
            except (ValueError, RuntimeError, OSError) as error:
                if not self._local:
                    return None
                raise DamagedFileError(
                    f"{self.path} is no bank that can be opened ({_line(error)}). Choose another place."
                ) from error
            self._check(table)
            self._table = table
        return self._table

    def _connect(self) -> Any:
        session = self._lancedb.Session(index_cache_size_bytes=_CACHED, metadata_cache_size_bytes=_CACHED)
        # every read looks for a newer version, since another process may write
        return self._lancedb.connect(self._folder or "/", read_consistency_interval=timedelta(0), session=session)

    def _create(self, schema: Any) -> Any:
        if self._local and Path(self.place).is_dir():
            ours = {"data", "_transactions", "_versions", "_indices", "_deletions", "_refs", "model.json"}
            if strange := sorted(p.name for p in Path(self.place).iterdir() if p.name not in ours):
                raise UsageError(f"{self.path} holds {strange[0]} and is no bank. Choose another place.")
        self._table = self._connect().create_table(self._name, schema=schema)
        return self._table

    def _check(self, table: Any) -> None:
        """Raise BaseMismatchError for another compressor's bank; where none is known, its own is taken."""
        found = made_by(table.schema)
        if found is None:
            raise DamagedFileError(f"{self.path} is another table of LanceDB, and no bank. Choose another place.")
        if self.compressor is None:
            self.compressor, self.shape = found
        if found != (self.compressor, self.shape):
            raise BaseMismatchError(
                f"The bank {self.path} was written by another compressor ({found[0]}) than this one "
                f"({self.compressor}). Load the model that wrote it, or start another bank and add the documents again."
            )

    def _nearest(self, table: Any, keys: Tensor, limit: int, condition: str | None) -> list[Any]:
        """For each key [B, D] the rows of the memories nearest to it, as tables of Arrow."""
        query = table.search(keys.numpy(), vector_column_name="key").distance_type("cosine").limit(limit)
        with self._errors(condition):
            query = upkeep.with_index(query, upkeep.index_of(table))
            if condition:
                query = query.where(condition, prefilter=True)
            found = query.select(_OF_A_HIT).to_arrow()
        if "query_index" not in found.column_names:
            return [found]
        import pyarrow.compute as pc

        return [found.filter(pc.equal(found["query_index"], number)) for number in range(len(keys))]

    def _count(self, condition: str) -> int:
        table = self._open()
        with self._errors():
            return 0 if table is None else int(table.count_rows(condition))

    def _rows_with(self, column: str, values: Sequence[str]) -> list[dict[str, Any]]:
        """id, digest and parts of the documents with one of these values."""
        table = self._open()
        rows: list[dict[str, Any]] = []
        for condition in one_of(column, values) if table is not None else ():
            query = table.search().where(all_of("part = 0", condition)).select(["id", "digest", "parts"])
            with self._errors():
                rows += query.to_arrow().to_pylist()
        return rows

    @contextmanager
    def _errors(self, condition: str | None = None) -> Iterator[None]:
        """LanceDB's errors in our words; `condition`: one that the user gave."""
        try:
            yield
        except (ValueError, RuntimeError, OSError) as error:
            if condition and (isinstance(error, ValueError) or "filter" in str(error) or "ecution error" in str(error)):
                raise UsageError(f"The condition {condition} cannot be used ({_line(error)}).") from error
            raise DamagedFileError(f"The bank {self.path} could not be used ({_line(error)}).") from error


def _size_of(folder: Path) -> int:
    size = 0
    for file in folder.rglob("*"):
        try:
            size += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:  # whoever writes may put files together meanwhile
            continue
    return size


def _line(error: Exception) -> str:
    return _PLACE_IN_SOURCE.sub("", " ".join(str(error).split()))[:300]
