"""The user's own general text, as sequences to rehearse. Knows nothing about what they are used for."""

from transformers import PreTrainedTokenizerBase

from ..data import load_rows
from ..data.collator import IGNORED_LABEL
from ..data.encode import bos_ids, encode_example, text_ids
from ..data.templates import to_example
from ..errors import DataError
from .rows import Written
from .settings import RehearsalSettings

_ANY = 2**30


def read_sequences(tokenizer: PreTrainedTokenizerBase, settings: RehearsalSettings) -> list[Written]:
    """`settings.text` in pieces of at most `settings.length` tokens, `settings.text_rows` of them at most.

    Rows with a `text` column are plain text; others are prompts with completions or conversations, whose end is cut off
    where they are longer. Raises DataError for
    a source that cannot be read.
    """
    assert settings.text is not None
    written: list[Written] = []
    for number, row in enumerate(load_rows(settings.text, limit=settings.text_rows), start=1):
        where = f"{settings.text} row {number}"
        if isinstance(row.get("text"), str):
            written += _pieces(bos_ids(tokenizer), text_ids(tokenizer, row["text"]), settings.length)
        else:
            encoded = encode_example(to_example(row, where=where), tokenizer, max_length=_ANY)
            answer = next(i for i, label in enumerate(encoded.labels) if label != IGNORED_LABEL)
            in_reach = 0 < answer < settings.length
            written.append(Written(encoded.input_ids[: settings.length], answer if in_reach else None))
        if len(written) >= settings.text_rows:
            break
    if not written:
        raise DataError(f"rehearsal.text: {settings.text} has no text. Give another source, or leave it out.")
    return written[: settings.text_rows]


def _pieces(start: list[int], ids: list[int], length: int) -> list[Written]:
    room = length - len(start)
    return [Written([*start, *ids[first : first + room]]) for first in range(0, len(ids), room)]
