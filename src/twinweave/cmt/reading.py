"""Texts on their way to the compressor: documents in parts, questions in batches. Knows nothing about banks."""

import os
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import DataError, UnsupportedModelError, UsageError
from ..text import chunks_of, digest_and_pieces
from .compressor import Compressor
from .config import CMTConfig, chunk_size_of

Text = str | os.PathLike[str]


class Reader:
    """Compresses texts with one compressor, outside of training."""

    def __init__(self, compressor: Compressor, settings: CMTConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._compressor, self._settings, self._tokenizer = compressor, settings, tokenizer

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of texts. Raises UnsupportedModelError where the base has none."""
        if self._tokenizer is None:
            base = self._compressor.base
            name = base.config._name_or_path
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(name)
            except (OSError, ValueError) as error:
                raise UnsupportedModelError(
                    f"The base {name or type(base).__name__} comes without a tokenizer. Pass tokenizer=..."
                ) from error
        return self._tokenizer

    @property
    def document_tokens(self) -> int:
        """The most tokens of a document that are compressed at once: those of the settings, or what the base's window
        has room for beside the memory tokens."""
        window = getattr(self._compressor.base.config.get_text_config(), "max_position_embeddings", None)
        return chunk_size_of(self._settings, window)

    @property
    def pad_id(self) -> int:
        """What rows are filled up with, where nothing looks."""
        ends = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, self.tokenizer.bos_token_id, 0)
        return int(next(end for end in ends if end is not None))

    def parts_of(self, text: Text) -> tuple[str, list[list[int]]]:
        """SHA-256 of a document, and the token ids of its parts. Raises DataError for one that cannot be read."""
        if not isinstance(text, str | os.PathLike):
            raise DataError(f"A document cannot be a {type(text).__name__}. Give a str or a path.")
        digest, pieces = digest_and_pieces(text)
        parts = [ids for ids, _ in chunks_of(pieces, self.tokenizer, self.document_tokens)]
        return digest(), parts

    def questions(self, texts: str | Sequence[str]) -> tuple[Tensor, Tensor]:
        """Questions as the base is asked them, token ids and mask [B, T], padded in front. Raises UsageError."""
        listed = [texts] if isinstance(texts, str) else list(texts)
        for text in listed:
            if not isinstance(text, str) or not text.strip():
                raise UsageError(f"{text!r} is no question. Ask with a text of at least a word.")
        start = [] if self.tokenizer.bos_token_id is None else [int(self.tokenizer.bos_token_id)]
        return self.padded([start + self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in listed])

    def padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Rows of token ids as ids and mask [B, T], padded in front."""
        width, device = max(len(row) for row in rows), self._compressor.base.device
        ids = torch.tensor([[self.pad_id] * (width - len(row)) + list(row) for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        return ids, mask

    @torch.no_grad()
    def compressed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The memories [B, k, D] of texts, as they are kept, whether the model is being trained or not."""
        training = self._compressor.training
        self._compressor.train(False)
        try:
            made: Tensor = self._compressor(ids, mask)
            return made
        finally:
            self._compressor.train(training)

    def compress(self, documents: Text | Iterable[Text], batch_size: int) -> Tensor:
        """The memories [n, k, D] of all parts of documents, in their order."""
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}; it must be a whole number of at least 1.")
        texts = [documents] if isinstance(documents, str | os.PathLike) else list(documents)
        parts = [ids for text in texts for ids in self.parts_of(text)[1]]
        starts = range(0, len(parts), batch_size)
        made = [self.compressed(*self.padded(parts[start : start + batch_size])) for start in starts]
        k, width = self._settings.memory_tokens, self._compressor.width
        return torch.cat(made) if made else torch.empty(0, k, width, device=self._compressor.base.device)
