"""What `read`, `forget` and `memory add` are given, as texts with the name that a user knows each by.

Knows nothing about models.
"""

import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape

from ..cmt.rows import json_of
from ..errors import DataError, UsageError
from ..progress import say
from ..text import digest_and_pieces

_ENDINGS = (".txt", ".md")
# A path that is misspelt should not be read as a text for having a space in it.
_LIKE_A_PATH = re.compile(r"\s*(~|/|\.\.?/).*|.*\.[A-Za-z][A-Za-z0-9]{1,4}")


@dataclass(frozen=True)
class Document:
    """A text: its name for messages, the text itself or the file it is in, and its SHA-256."""

    name: str
    source: str | Path
    digest: str


def documents_of(arguments: Iterable[str]) -> list[Document]:
    """The texts that the arguments stand for, in their order; one that is given twice comes once.

    A file, a folder (its .txt and .md files, those of folders in it too, sorted), `-` (standard input), or, where there
    is no such path and there is white space in it, the text itself. Every text is looked through to its end.
    Raises UsageError for a word that is no path, or what looks like a path and is none, and DataError for a text that
    is missing, empty or not UTF-8.
    """
    found: dict[str, Document] = {}
    for argument in arguments:
        for name, source in _sources(argument):
            document = Document(name, source, _digest(name, source))
            if document.digest in found:
                say(f"skipped {name}: the same text as {found[document.digest].name}")
            else:
                found[document.digest] = document
    return list(found.values())


def bytes_of(arguments: Iterable[str]) -> int:
    """The size of what `stream_of` reads, without standard input. Raises UsageError for a path that is not there, so
    that nothing is begun."""
    return sum(file.stat().st_size for argument in arguments for file in _stored(argument))


Streamed = tuple[str | Path, str | None, dict[str, Any], int]
"""A text or the file it is in, its id, metadata, and its bytes."""


def stream_of(arguments: Iterable[str], skipped: list[str]) -> Iterator[Streamed]:
    """The documents of files, folders, JSONL files (one on each line: `text`, an `id` if it has one, and the rest is
    metadata) and `-` (standard input), one at a time.

    A file's id is its path, normalised. A text that is missing, empty or not UTF-8, or a line that is no document, is
    said and left out, and its place goes into `skipped`.
    """
    for place, read in _places_of(arguments):
        try:
            document = read()
        except DataError as error:
            message = str(error)
            say(escape(f"skipped {message if place in message else f'{place}: {message}'}"))
            skipped.append(place)
        else:
            yield document


def _places_of(arguments: Iterable[str]) -> Iterator[tuple[str, Callable[[], Streamed]]]:
    """Where there is a document, and what reads it, or raises DataError."""
    for argument in arguments:
        if argument == "-":
            yield "standard input", _standard_input
        for file in _stored(argument):
            if file.suffix.lower() != ".jsonl":
                yield os.path.normpath(file), partial(_file, file)
                continue
            with file.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        place = f"{os.path.normpath(file)}, line {number}"
                        yield place, partial(_entry, place, line)


def _standard_input() -> Streamed:
    name = "standard input"
    text = _decoded(typer.get_binary_stream("stdin").read(), name)
    _digest(name, text)
    return text, None, {"source": name}, 0


def _file(file: Path) -> Streamed:
    name = os.path.normpath(file)
    _digest(name, file)
    return file, name, {"source": name}, file.stat().st_size


def _entry(place: str, line: bytes) -> Streamed:
    """A line of a JSONL file. Raises DataError with its place."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is no JSON ({error}). Mend it, and run the command again.") from error
    if not isinstance(row, dict):
        raise DataError(f'{place} is no object. Give {{"text": "...", "id": "..."}} on each line.')
    text = row.pop("text", None)
    if not isinstance(text, str):
        raise DataError(f'{place} has no text. Give {{"text": "...", "id": "..."}} on each line.')
    name = row.pop("id", None)
    if isinstance(name, bool) or not isinstance(name, str | int | None) or (isinstance(name, str) and not name.strip()):
        raise DataError(f"{place} has the id {name!r}. Give a text, or leave it out.")
    try:
        json_of(row if name is None else {"id": name} | row)
    except UsageError as error:
        raise DataError(f"{place}: {error}") from error
    _digest(place, text)
    return text, None if name is None else str(name), row, len(line)


def _stored(argument: str) -> list[Path]:
    if argument == "-":
        return []
    path = Path(argument)
    if path.is_dir():
        return _files_in(path, (*_ENDINGS, ".jsonl"))
    if not path.is_file():
        raise UsageError(f"There is no file or folder '{argument}'. Check the path; - is standard input.")
    return [path]


def _sources(argument: str) -> list[tuple[str, str | Path]]:
    if argument == "-":
        name = "standard input"
        return [(name, _decoded(typer.get_binary_stream("stdin").read(), name))]
    path = Path(argument)
    if os.path.isdir(argument):
        return [(str(file), file) for file in _files_in(path)]
    if os.path.isfile(argument):
        return [(argument, path)]
    if os.path.exists(argument):  # a pipe gives its text once, and it is gone through twice
        return [(argument, _decoded(path.read_bytes(), argument))]
    if argument.strip() and not any(character.isspace() for character in argument):
        raise UsageError(
            f"There is no file or folder '{argument}'. Check the path; a text of one word can come from standard input "
            "(-)."
        )
    if _LIKE_A_PATH.fullmatch(argument):
        raise UsageError(
            f"There is no file or folder '{argument}'. Check the path; a text that looks like one can come from "
            "standard input (-)."
        )
    words = argument.split()
    name = f"'{' '.join(words[:6])}{' …' if len(words) > 6 else ''}'"
    say(f"{name} is no path, so it is taken as a text")
    return [(name, argument)]


def _files_in(folder: Path, endings: tuple[str, ...] = _ENDINGS) -> list[Path]:
    hidden = (p for p in folder.rglob("*") if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    files = sorted(p for p in hidden if p.suffix.lower() in endings and p.is_file())
    if not files:
        raise DataError(f"The folder {folder} has no {' or '.join(endings)} file. Name the files themselves.")
    return files


def _decoded(content: bytes, name: str) -> str:
    """The text of these bytes as it would be read from a file, line ends included."""
    try:
        return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig").read()
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text ({error.reason}). Convert it to UTF-8.") from error


def _digest(name: str, source: str | Path) -> str:
    digest, pieces = digest_and_pieces(source)
    try:
        for _ in pieces:
            pass
    except DataError as error:
        message = str(error)
        raise DataError(message if name in message else f"{name}: {message}") from error
    return digest()
