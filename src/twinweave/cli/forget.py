"""`twinweave forget`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from ..genadapter import AdapterState
from ..progress import track
from .adapters import belong, check_replaceable, note_other_rounding, read_record, write_adapter
from .texts import documents_of


def forget(
    adapter: Annotated[Path, typer.Argument(help="The folder that `read` wrote.")],
    texts: Annotated[
        list[str], typer.Argument(metavar="TEXT...", help="The texts to take out, word for word as they were read.")
    ],
    reader: Annotated[str | None, typer.Option(help="Where the generator lies now, if it has moved.")] = None,
    base: Annotated[str | None, typer.Option(help="Where the base lies now, if it has moved.")] = None,
) -> None:
    """Take texts out of an adapter again, as if they had never been read.

    They are read once more and subtracted; the numbers left are those without them, to the last bit.

    Example: `twinweave forget wanda notes.md`
    """
    check_replaceable(adapter)
    old = read_record(adapter)
    state = AdapterState.load(adapter)
    documents = documents_of(texts)
    if strange := [d.name for d in documents if d.digest not in state.documents]:
        raise UsageError(
            f"{adapter} has never read {', '.join(strange)}, at least not word for word. Nothing was taken out; give "
            "the texts as they were read."
        )
    if not state.additive:
        raise UsageError(
            f"{adapter} was read in sequential mode, where every text depends on those before it, so none can be taken "
            "out. Read the others again, into another folder."
        )
    asked = replace(old, reader=reader or old.reader, base=base or old.base)
    opened = asked.open()
    belong(state, opened, adapter, asked.reader)
    record = asked.made_by(opened)
    note_other_rounding(adapter, old, record)
    for document in track(documents, "Forgetting"):
        again = opened.read(document.source)
        for _ in range(state.documents[document.digest]):
            state = state - again
    write_adapter(adapter, state, opened, record)
    typer.echo(
        f"documents: {len(documents)} taken out; {state.documents.total()} left\n"
        f"tokens:    {state.tokens:,} left\n"
        f"adapter:   {adapter}"
    )
