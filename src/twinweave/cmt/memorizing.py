"""From documents to rows of the bank: which of them are new, and one change for each batch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from ..errors import UsageError
from .aggregator import pooled
from .bank import MemoryBank
from .reading import Reader, Text
from .rows import Memory, json_of

Document = tuple[Text, str | None, Mapping[str, Any]]
"""A text, its id (or None) and its metadata."""
Outcome = Literal["added", "known", "replaced"]
_AT_ONCE = 16  # texts of one pass of the compressor


@dataclass(frozen=True)
class Entry:
    """What became of a document: the id it has in the bank, and how many of its tokens were compressed."""

    id: str
    outcome: Outcome
    tokens: int


def batches_of(documents: Iterable[Document], batch_size: int) -> Iterator[list[Document]]:
    """The documents, so many at a time. Raises UsageError for a number that is none."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise UsageError(f"batch_size is {batch_size!r}; it must be a whole number of at least 1.")
    stream = iter(documents)
    while batch := list(islice(stream, batch_size)):
        yield batch


def memorize(reader: Reader, bank: MemoryBank, batch: Sequence[Document]) -> list[Entry]:
    """One change of the bank: those of the documents that are not in it, with all their parts, as if one came after
    the other. A text whose old name another text of the batch takes stays in the bank under its new one."""
    for _, name, metadata in batch:
        if name is not None and (not isinstance(name, str) or not name.strip()):
            raise UsageError(f"{name!r} is no id. Give each document a name that is a text.")
        json_of(metadata)
    read = [reader.parts_of(text) for text, *_ in batch]
    digests = [digest for digest, _ in read]
    names = [name or digest[:16] for (_, name, _), digest in zip(batch, digests, strict=True)]
    outcomes, new, name_of = _placed(bank, names, digests)
    left_out = bank.add(_memories_of(reader, batch, read, new))
    entries = []
    for name, outcome, (digest, parts) in zip(names, outcomes, read, strict=True):
        if outcome == "known" or name in left_out:
            place = name_of.get(digest, name)
            entries.append(Entry(left_out.get(place, place), "known", 0))
        else:
            entries.append(Entry(name, outcome, sum(map(len, parts))))
    return entries


def _placed(
    bank: MemoryBank, names: Sequence[str], digests: Sequence[str]
) -> tuple[list[Outcome], dict[str, int], dict[str, str]]:
    """What becomes of each document, which of them are to be written (name -> number), and where each text is then."""
    name_of = bank.ids_of(digests)
    digest_of = bank.digests_of(list({*names, *name_of.values()}))
    outcomes: list[Outcome] = ["known"] * len(names)
    new: dict[str, int] = {}
    last = {name: number for number, name in enumerate(names)}
    waiting: Sequence[int] = range(len(names))
    while waiting:
        for number in waiting:
            name, digest = names[number], digests[number]
            if digest in name_of:
                continue
            before = digest_of.get(name)
            if before is not None and name_of.get(before) == name:
                del name_of[before]  # whoever brings that text again brings something new
            outcomes[number] = "added" if before is None else "replaced"
            digest_of[name], name_of[digest], new[name] = digest, name, number
        # a text that was known may have lost its name to one that came later; a name gets its last text only once, so
        # this ends
        waiting = [number for number in last.values() if digests[number] not in name_of]
    return outcomes, new, name_of


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
