"""`twinweave read`."""

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from ..genadapter import AdapterState
from ..progress import say, track
from .adapters import LORA_NAME, ReaderRecord, belong, free_or_ours, note_other_rounding, read_record, write_adapter
from .texts import documents_of


class Precision(StrEnum):
    """What a base is loaded in, and its LoRA is written in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def read(
    texts: Annotated[
        list[str],
        typer.Argument(metavar="TEXT...", help="Files, folders of .txt and .md files, - (standard input), or a text."),
    ],
    out: Annotated[Path, typer.Option(help="The folder of the adapter; one that exists is added to.")],
    reader: Annotated[
        str | None,
        typer.Option(help="The folder of a generator or of its run; pocket (the default) is shipped with twinweave."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Where the base lies now, if it has moved.")] = None,
    dtype: Annotated[
        Precision | None, typer.Option(help="Of the base, and of the LoRA file (float32).", show_default=False)
    ] = None,
) -> None:
    """Read texts once, and write what was read as a LoRA.

    Each file is a text of its own. Texts that the folder has read before are skipped.

    Example: `twinweave read notes.md "Wanda Crane keeps a swan." --out wanda`
    """
    documents = documents_of(texts)
    old = read_record(out) if free_or_ours(out) else None
    if old and dtype and dtype != old.dtype:
        raise UsageError(
            f"{out} was read in {old.dtype}; in {dtype} a text gives other numbers. Leave --dtype out, or choose "
            "another folder with --out."
        )
    asked = ReaderRecord(
        reader or (old.reader if old else "pocket"),
        base or (old.base if old and not reader else None),
        str(old.dtype if old else dtype or "float32"),
    )
    state = AdapterState.load(out) if old else None
    known = [d for d in documents if state and d.digest in state.documents]
    for document in known:
        say(f"skipped {document.name}: read before")
    new = [d for d in documents if d not in known]
    if not new:
        typer.echo(f"documents: 0 read, all {len(known)} known before\nadapter:   {out}")
        return
    opened = asked.open()
    begun = time.monotonic()  # what another text costs, and not what the base takes to load
    record = asked.made_by(opened)
    if state is None:
        state = opened.empty_state()
    else:
        belong(state, opened, out, asked.reader)
        note_other_rounding(out, read_record(out), record)
    tokens = state.tokens
    for document in track(new, "Reading"):
        state = opened.read(document.source, state=state)
    write_adapter(out, state, opened, record)
    tokens, seconds = state.tokens - tokens, time.monotonic() - begun
    typer.echo(
        f"documents: {len(new)} read, {len(known)} known before; {state.documents.total()} in all\n"
        f"tokens:    {tokens:,} read; {state.tokens:,} in all\n"
        f"time:      {seconds:.1f} seconds\n"
        f"LoRA:      rank {opened.settings.rank}, {(out / LORA_NAME).stat().st_size:,} bytes\n"
        f"adapter:   {out}"
    )
