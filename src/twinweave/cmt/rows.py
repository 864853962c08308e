"""What a bank's table holds: a row for each memory, as Arrow has it. Knows nothing about where it lies."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError, UsageError

_COMPRESSOR = b"twinweave.compressor"


@dataclass(frozen=True)
class Memory:
    """One memory: part `part` of the `parts` of a document that has `tokens` tokens in all.

    key [D]: what it is found by. block [k, D]: the memory itself, kept in bfloat16.
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
    """A memory that was found for a question. similarity: the cosine of their keys. block [k, D], in float32."""

    id: str
    part: int
    similarity: float
    metadata: dict[str, Any]
    block: Tensor = field(repr=False)


def schema_of(compressor: str, shape: tuple[int, int]) -> Any:
    """The columns of a bank for memories [k, D]; the compressor is named in the schema too, for a bank without rows."""
    import pyarrow as pa

    k, width = shape
    columns = [
        pa.field("id", pa.string(), nullable=False),
        pa.field("part", pa.int32(), nullable=False),
        pa.field("parts", pa.int32(), nullable=False),  # 0: the row is no memory any more, see `gone`
        pa.field("digest", pa.string(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
        pa.field("metadata", pa.json_()),
        pa.field("compressor", pa.string(), nullable=False),
        pa.field("key", pa.list_(pa.float32(), width)),
        pa.field("memory", pa.binary(k * width * 2)),  # bfloat16
    ]
    return pa.schema(columns, metadata={_COMPRESSOR: compressor.encode()})


def made_by(schema: Any) -> tuple[str, tuple[int, int]] | None:
    """The compressor of a bank and the shape (k, D) of its memories; None for a table that is no bank."""
    compressor = (schema.metadata or {}).get(_COMPRESSOR)
    if compressor is None:
        return None
    try:
        width = schema.field("key").type.list_size
        found = compressor.decode(), (schema.field("memory").type.byte_width // (2 * width), width)
    except (KeyError, AttributeError, UnicodeDecodeError):
        return None
    return found if schema.names == schema_of(*found).names else None


def rows_of(memories: Sequence[Memory], compressor: str, shape: tuple[int, int]) -> list[dict[str, Any]]:
    """Rows for whole documents. Raises UsageError for part of a document and metadata that is not JSON, and DataError
    for numbers that are not finite."""
    parts: dict[str, list[int]] = {}
    rows = []
    for memory in memories:
        parts.setdefault(memory.id, []).append(memory.part)
        if memory.key.shape != (shape[1],) or memory.block.shape != shape:
            raise UsageError(
                f"The memory of {memory.id!r} has a key {list(memory.key.shape)} and a block "
                f"{list(memory.block.shape)}; this bank keeps [{shape[1]}] and {list(shape)}."
            )
        block = memory.block.to("cpu", torch.bfloat16).contiguous()
        if not (bool(memory.key.isfinite().all()) and bool(block.isfinite().all())):
            raise DataError(
                f"The memory of {memory.id!r} has numbers that are not finite. Load the base in float32, or look at "
                "how the compressor was trained."
            )
        names = ("id", "part", "parts", "digest", "tokens")
        rows.append(
            {name: getattr(memory, name) for name in names}
            | {"metadata": json_of(memory.metadata), "compressor": compressor}
            | {"key": memory.key.float().cpu().numpy(), "memory": block.view(torch.uint8).numpy().tobytes()}
        )
    for memory in memories:
        if sorted(parts[memory.id]) != list(range(memory.parts)):
            raise UsageError(
                f"Document {memory.id!r} has {memory.parts} parts, and parts {sorted(parts[memory.id])} were given. "
                "Add all of a document at once, each part once."
            )
    return rows


def gone(name: str, part: int, compressor: str) -> dict[str, Any]:
    """The row of a part that a document had before it was replaced: nothing finds it, whoever may look for it."""
    rest = {"parts": 0, "digest": "", "tokens": 0, "metadata": "{}", "compressor": compressor}
    return {"id": name, "part": part, "key": None, "memory": None} | rest


def as_arrow(rows: Sequence[dict[str, Any]], schema: Any) -> Any:
    """The rows as a table of Arrow."""
    import pyarrow as pa

    columns = {name: pa.array([row[name] for row in rows], schema.field(name).type) for name in schema.names}
    return pa.table(columns, schema=schema)


def hits_of(found: Any, question: Tensor) -> list[tuple[float, str, int, dict[str, Any]]]:
    """The rows found for a question [D], the most similar first, as (-similarity, id, part, row).

    The cosine is computed here, in double precision and by rows alone, so that it does not depend on how they were
    found; memories that are equally near come in the order of their names.
    """
    rows = found.to_pylist()
    if not rows:
        return []
    keys = torch.tensor([row["key"] for row in rows], dtype=torch.float64)
    question = question.double().cpu()
    norms = (keys.square().sum(1) * question.square().sum()).sqrt().clamp(min=1e-30)
    similarities = ((keys * question).sum(1) / norms).tolist()
    ranked = zip((-s for s in similarities), rows, strict=True)
    return sorted(((s, row["id"], row["part"], row) for s, row in ranked), key=lambda hit: hit[:3])


def hit_of(ranked: tuple[float, str, int, dict[str, Any]], shape: tuple[int, int]) -> Hit:
    """One of `hits_of` as it is handed out."""
    negative, name, part, row = ranked
    block = torch.frombuffer(bytearray(row["memory"]), dtype=torch.bfloat16).view(shape).float()
    return Hit(name, part, -negative, json.loads(row["metadata"]), block)


def json_of(metadata: Any) -> str:
    """Metadata as JSON. Raises UsageError for what is none."""
    if not isinstance(metadata, Mapping):
        raise UsageError(f"Metadata is a {type(metadata).__name__}. Give a dict of names and values.")
    if strange := next((key for key in metadata if not isinstance(key, str) or not key), None):
        raise UsageError(f"Metadata has the name {strange!r}. Give names that are texts.")
    if "" in metadata:
        raise UsageError("Metadata has an empty name. Give names of at least a letter.")
    return json_value(dict(metadata))


def json_value(value: Any) -> str:
    """A value as the bank's JSON writes it. Raises UsageError for what is none."""
    try:
        text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
        text.encode()
    except (TypeError, ValueError) as error:  # half a character is a ValueError
        raise UsageError(
            f"Metadata has a value that JSON cannot hold ({error}). Leave it out, or make it a text."
        ) from error
    return text
