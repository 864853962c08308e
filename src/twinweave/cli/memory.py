"""`twinweave memory`: a bank of documents that a model answers from."""

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ..cmt import MemoryBank, MemoryModel
from ..cmt.rows import Hit
from ..errors import UsageError
from ..progress import progress_bar, say
from .banks import ModelRecord, existing, open_memory, read_record
from .read import Precision
from .shared import out
from .texts import Streamed, bytes_of, stream_of

memory = typer.Typer(
    help="Keep documents in a bank, and ask a model that answers from it.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

_SHOWN = 100
_NAMED = 5  # replaced documents that are named
BankOption = Annotated[str, typer.Option(help="The bank, a folder that ends in .lance.")]
ModelOption = Annotated[
    str | None,
    typer.Option(
        help="The folder of a memory model or of its run; pocket is shipped with twinweave. The bank remembers it."
    ),
]
BaseOption = Annotated[str | None, typer.Option(help="Where the base lies now, if it has moved.")]
WhereOption = Annotated[
    list[str] | None,
    typer.Option(help="Only documents with this metadata, KEY=VALUE; one key given twice: either value."),
]


@memory.command()
def add(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE...", help="Files, folders (.txt, .md, .jsonl), or - (standard input)."),
    ],
    bank: BankOption = "memory.lance",
    model: ModelOption = None,
    base: BaseOption = None,
    dtype: Annotated[Precision | None, typer.Option(help="Of the base (float32).", show_default=False)] = None,
) -> None:
    """Compress documents once, and keep them.

    Each file is a document, and each line of a JSONL file: `{"text": …, "id": …, …}`, where the rest is metadata. Texts
    that are in the bank already are skipped; another text under the same path or id replaces the old one. What cannot
    be read is said and skipped. Whenever it is stopped, the same command does the rest.

    Example: `twinweave memory add notes/ articles.jsonl --bank notes.lance`
    """
    size = bytes_of(files)  # a path that is not there is said before a large base is loaded
    opened = _opened(bank, model, base, dtype and str(dtype))
    record, memories = opened
    begun, counts, tokens = time.monotonic(), Counter[str](), 0
    replaced: list[str] = []
    skipped: list[str] = []
    with progress_bar() as bar:
        task = bar.add_task("Adding (KiB)", total=size // 1024 if size and "-" not in files else None)
        read = [0]
        for entries in memories.memorizing(_counted(stream_of(files, skipped), read, record, memories)):
            record.write(memories.bank)
            counts.update(entry.outcome for entry in entries)
            if len(replaced) <= _NAMED:
                replaced += [entry.id for entry in entries if entry.outcome == "replaced"]
            tokens += sum(entry.tokens for entry in entries)
            bar.update(task, completed=read[0] // 1024)
    seconds = max(time.monotonic() - begun, 1e-9)
    total = counts.total()
    typer.echo(
        f"documents: {counts['added']} added, {counts['replaced']} replaced, {counts['known']} known before; "
        f"{len(memories.bank)} in all\n"
        f"{_named(replaced)}"
        f"tokens:    {tokens:,} compressed\n"
        f"time:      {seconds:.1f} seconds ({total / seconds:,.1f} documents/s, {tokens / seconds:,.0f} tokens/s)\n"
        f"bank:      {bank}"
    )
    if skipped:
        say(f"{len(skipped)} skipped, since they could not be read. Mend them, and run the command again.")
        raise typer.Exit(1)


@memory.command()
def ask(
    question: Annotated[str, typer.Argument(help="What is asked.")],
    bank: BankOption = "memory.lance",
    top_k: Annotated[int | None, typer.Option(min=1, help="Memories to answer from (the model's own number).")] = None,
    where: WhereOption = None,
    show: Annotated[bool, typer.Option(help="Show the memories that were found, too.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens to write.")] = 64,
    contrast: Annotated[float, typer.Option(min=0.0, help="Of contrastive decoding, with a second pass.")] = 0.0,
    model: ModelOption = None,
    base: BaseOption = None,
) -> None:
    """Answer a question from the documents in the bank.

    Example: `twinweave memory ask "What is the pet of Wanda Crane?" --show`
    """
    condition = conditions_of(where)
    existing(bank)
    _, opened = _opened(bank, model, base, None)
    answer = opened.generate(
        question, top_k=top_k, where=condition, contrast=contrast, max_new_tokens=max_new_tokens, do_sample=False
    )
    hits, least = opened.search(question, top_k, condition)[0], opened.settings.min_similarity
    if reason := _unused(hits, least, condition):
        say(escape(f"The answer is the base's own, without a memory: {reason}."))
    typer.echo(answer)
    if show:
        table = Table("document", "part", "similarity", "metadata")
        for hit in hits:
            far = "" if least is None or hit.similarity >= least else " (too far, not used)"
            table.add_row(escape(hit.id), str(hit.part), f"{hit.similarity:.3f}{far}", escape(_json(hit.metadata)))
        out.print(table)


@memory.command(name="list")
def list_documents(
    bank: BankOption = "memory.lance",
    where: WhereOption = None,
    limit: Annotated[int, typer.Option(min=1, help="The most documents to show.")] = _SHOWN,
) -> None:
    """Show the documents in the bank, by their ids.

    Example: `twinweave memory list --where source=notes/a.md`
    """
    opened = existing(bank)
    table = Table("id", "tokens", "parts", "metadata")
    found = list(opened.documents(conditions_of(where), limit + 1))
    for row in found[:limit]:
        table.add_row(escape(row["id"]), f"{row['tokens']:,}", str(row["parts"]), escape(_json(row["metadata"])))
    out.print(table)
    if len(found) > limit:
        typer.echo(f"the first {limit} are shown; more with --limit, or fewer with --where")


@memory.command()
def forget(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Documents to take out, as `list` shows them.")],
    bank: BankOption = "memory.lance",
) -> None:
    """Take documents out of the bank. `restore` brings them back for a week.

    Example: `twinweave memory forget notes/a.md`
    """
    opened = existing(bank)
    as_given = opened.digests_of(ids)
    ids = [name if name in as_given else os.path.normpath(name) for name in ids]
    there = opened.digests_of(ids)
    if strange := [name for name in ids if name not in there]:
        raise UsageError(
            f"The bank {bank} has no document {', '.join(strange)}. Nothing was taken out; see `twinweave memory list`."
        )
    typer.echo(f"documents: {len(opened.remove(ids))} taken out; {len(opened)} left\nbank:      {bank}")


@memory.command()
def stats(bank: BankOption = "memory.lance") -> None:
    """Say how much is in the bank, and how it is kept.

    Example: `twinweave memory stats --bank notes.lance`
    """
    opened = existing(bank)
    facts, record = opened.stats(), read_record(opened)
    index = "none; every key is looked at"
    if facts["index"]:
        index = f"{facts['index']}, {facts['indexed']:,} of {facts['memories']:,} memories in it"
    size = "unknown" if facts["bytes"] is None else f"{facts['bytes']:,} on disk, with the versions of the last week"
    typer.echo(
        f"documents: {facts['documents']:,}\n"
        f"memories:  {facts['memories']:,}\n"
        f"tokens:    {facts['tokens']:,}\n"
        f"bytes:     {size}\n"
        f"index:     {index}\n"
        f"model:     {record.model if record else 'unknown'} (compressor {facts['compressor']})\n"
        f"version:   {facts['version']}"
    )


@memory.command()
def versions(bank: BankOption = "memory.lance") -> None:
    """Show the states of the bank that can be restored; those of the last week are kept.

    Example: `twinweave memory versions`
    """
    table = Table("version", "written", "memories")
    for version in existing(bank).versions():
        table.add_row(str(version["version"]), f"{version['written']:%Y-%m-%d %H:%M:%S}", f"{version['memories']:,}")
    out.print(table)


@memory.command()
def restore(
    version: Annotated[int, typer.Argument(help="The number of a version, as `versions` shows it.")],
    bank: BankOption = "memory.lance",
) -> None:
    """Make the bank what it was. This is a change like others, and can be undone in the same way.

    Example: `twinweave memory restore 12`
    """
    opened = existing(bank)
    opened.restore(version)
    typer.echo(f"documents: {len(opened)}\nbank:      {bank}")


def conditions_of(given: Iterable[str] | None) -> dict[str, list[Any]] | None:
    """KEY=VALUE as a condition. A value that is JSON (2024, true, null, "2024") is that, any other is a text."""
    found: dict[str, list[Any]] = {}
    for condition in given or ():
        key, equals, value = condition.partition("=")
        if not key or not equals:
            raise UsageError(f"--where {condition} is no condition. Write KEY=VALUE, such as source=a.md.")
        try:
            found.setdefault(key, []).append(json.loads(value))
        except ValueError:
            found.setdefault(key, []).append(value)
    return found or None


def _opened(bank: str, model: str | None, base: str | None, dtype: str | None) -> tuple[ModelRecord, MemoryModel]:
    """The model that the bank remembers, or another place where it lies now, with the bank."""
    old = read_record(MemoryBank(bank))
    record = ModelRecord(
        model or (old.model if old else "pocket"),
        base or (old.base if old and not model else None),
        dtype or (old.dtype if old else "float32"),
    )
    return record, open_memory(record.model, bank, record.base, record.dtype)


def _counted(
    documents: Iterable[Streamed], read: list[int], record: ModelRecord, memories: MemoryModel
) -> Iterator[tuple[Any, str | None, dict[str, Any]]]:
    """The documents for the model, which the bank remembers once there is one of them."""
    for number, (source, name, metadata, size) in enumerate(documents):
        if not number:
            record.begin(memories.bank)
        read[0] += size
        yield source, name, metadata


def _named(replaced: list[str]) -> str:
    """A line with the documents that were replaced, if they are few."""
    return f"replaced:  {', '.join(replaced)}\n" if 0 < len(replaced) <= _NAMED else ""


def _unused(hits: Sequence[Hit], least: float | None, condition: Any) -> str | None:
    """Why a question was answered without memories; None if it was not."""
    if not hits:
        return "no document has what --where asks for" if condition else "the bank is empty"
    if least is None or hits[0].similarity >= least:
        return None
    return f"the nearest is similar to the question by {hits[0].similarity:.3f}, and the model takes {least} at least"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
