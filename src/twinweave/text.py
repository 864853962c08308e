"""Texts as chunks of token ids, however they arrive. Knows nothing about models.

A text is cut into blocks by a rule that looks at the text alone, and each block is tokenised by itself: a file that is
read piece by piece gives the chunks that the whole text gives.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from .errors import DataError

BLOCK = 1 << 16  # characters
_PIECE = 1 << 20


def digest_and_pieces(text: str | os.PathLike[str] | Iterable[str]) -> tuple[Callable[[], str], Iterator[str]]:
    """The pieces of a text, and what gives the SHA-256 of the whole once they are used up. Raises DataError."""
    digest = hashlib.sha256()

    def pieces() -> Iterator[str]:
        seen = False
        for piece in _pieces(text):
            try:
                digest.update(piece.encode())
            except UnicodeEncodeError as error:
                raise DataError(
                    f"The text to read has half a character ({piece[error.start]!a}), which is what bytes become that "
                    "are not UTF-8. Decode it from its own encoding."
                ) from error
            seen = seen or bool(piece.strip())
            yield piece
        if not seen:
            raise DataError("The text to read is empty. Give one with at least a word.")

    return digest.hexdigest, pieces()


def chunks_of(pieces: Iterable[str], tokenizer: PreTrainedTokenizerBase, size: int) -> Iterator[tuple[list[int], int]]:
    """Token ids of each chunk, the start of text (where the tokenizer has one) in front, and how many are the text's.

    Every chunk has `size` tokens of the text but the last.
    """
    start = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    waiting: list[int] = []
    for block in blocks_of_text(pieces):
        waiting += tokenizer(block, add_special_tokens=False, verbose=False)["input_ids"]
        while len(waiting) > size:
            yield start + waiting[:size], size
            del waiting[:size]
    if waiting:
        yield start + waiting, len(waiting)


def blocks_of_text(pieces: Iterable[str]) -> Iterator[str]:
    """The text in blocks of at most `BLOCK` characters that end at a line's end, or at a space where there is none."""
    buffer = ""
    for piece in pieces:
        buffer += piece
        while len(buffer) > BLOCK:
            head = buffer[:BLOCK]
            end = head.rfind("\n") + 1 or max(head.rfind(" "), 0) or BLOCK
            yield buffer[:end]
            buffer = buffer[end:]
    if buffer:
        yield buffer


def _pieces(text: str | os.PathLike[str] | Iterable[str]) -> Iterator[str]:
    if isinstance(text, str):
        yield from (text[start : start + _PIECE] for start in range(0, len(text), _PIECE))
    elif isinstance(text, os.PathLike):
        path = Path(text)
        try:
            with path.open(encoding="utf-8-sig") as file:
                while piece := file.read(_PIECE):
                    yield piece
        except OSError as error:
            raise DataError(f"The text {path} cannot be read ({error.strerror}). Check the path.") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text ({error.reason}). Save it as UTF-8.") from error
    elif isinstance(text, bytes) or not isinstance(text, Iterable):
        raise DataError(f"A text cannot be a {type(text).__name__}. Give a str, a path, or the pieces of one text.")
    else:
        for piece in text:
            if not isinstance(piece, str):
                raise DataError(f"A piece of the text is a {type(piece).__name__}. Give pieces that are str.")
            yield from _pieces(piece)
