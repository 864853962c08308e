"""From documents to rows of the bank: which of them are new, and one change for each batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import UsageError
from .aggregator import pooled
from .bank import MemoryBank
from .reading import Reader, Text
from .rows import Memory, json_of

Document = tuple[Text, str | None, Mapping[str, Any]]
"""A text, its id (or None) and its metadata."""
_AT_ONCE = 16  # texts of one pass of the compressor


@dataclass(frozen=True)
class Entry:
    """What became of a document: the id it has in the bank, and how many of its tokens were compressed."""

    id: str
    outcome: Literal["added", "known", "replaced"]
    tokens: int


def memorize(reader: Reader, bank: MemoryBank, batch: Sequence[Document]) -> list[Entry]:
    """One change of the bank: those of the documents that are not in it, with all their parts. Of two under one name
    the last counts, and a text that any of them has is in the bank afterwards."""
    for _, name, metadata in batch:
        if name is not None and (not isinstance(name, str) or not name.strip()):
            raise UsageError(f"{name!r} is no id. Give each document a name that is a text.")
        json_of(metadata)
    read = [reader.parts_of(text) for text, *_ in batch]
    name_of = bank.ids_of([digest for digest, _ in read])
    names = [name or digest[:16] for (_, name, _), (digest, _) in zip(batch, read, strict=True)]
    digest_of = bank.digests_of(list({*names, *name_of.values()}))
    last = {name: number for number, name in enumerate(names)}
    new: dict[str, int] = {}
    entries = [Entry("", "known", 0)] * len(batch)
    undecided = list(range(len(batch)))
    while undecided:
        for number in undecided:
            name, (digest, parts) = names[number], read[number]
            if digest in name_of:
                entries[number] = Entry(name_of[digest], "known", 0)
                continue
            before = digest_of.get(name)
            if before is not None:
                name_of.pop(before, None)  # whoever brings that text again brings something new
            outcome: Literal["added", "replaced"] = "added" if before is None else "replaced"
            entries[number] = Entry(name, outcome, sum(map(len, parts)))
            digest_of[name], name_of[digest], new[name] = digest, name, number
        # the document that a text was known by may have got another text since, and this one keeps it then
        undecided = [
            number
            for number, entry in enumerate(entries)
            if entry.outcome == "known" and read[number][0] not in name_of and last[names[number]] == number
        ]
    bank.add(_memories_of(reader, batch, read, new))
    return entries


def _memories_of(
    reader: Reader,
    batch: Sequence[Document],
    read: Sequence[tuple[str, list[list[int]]]],
    new: Mapping[str, int],
) -> list[Memory]:
    """The memories of those of the documents that `new` names."""
    rows = [(name, number, part, ids) for name, number in new.items() for part, ids in enumerate(read[number][1])]
    rows.sort(key=lambda row: len(row[-1]))  # those of a pass are about as long as each other
    memories: list[Memory] = []
    for start in range(0, len(rows), _AT_ONCE):
        group = rows[start : start + _AT_ONCE]
        blocks = reader.compressed(*reader.padded([ids for *_, ids in group]))
        for (name, number, part, _), block, key in zip(group, blocks, pooled(blocks), strict=True):
            digest, parts = read[number]
            tokens = sum(map(len, parts))
            memories.append(Memory(name, digest, key, block, part, len(parts), tokens, batch[number][2]))
    return memories
