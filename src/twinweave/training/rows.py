"""What a training reads: the task's rows, and general text to rehearse. Knows nothing about models that are trained."""

import math
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..data import CompletionCollator, ContextRows, TrainingData, prepare_segments, prepare_training_data
from ..data.contexts import QUESTIONS_PER_CONTEXT
from ..data.segments import SEGMENT_CHUNKS
from ..errors import DataError, RecipeError
from ..evaluation import read_examples
from ..fingerprint import fingerprint
from ..methods import Method
from ..rehearsal import RehearsalRows, Written, load_sequences, make_rows, read_sequences, write_sequences
from .base import free_memory, load_base, load_window
from .frozen_store import tokenizer_digest
from .recipe import Recipe


def load_training_data(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, seed: int, *, reads: int | None = None
) -> TrainingData:
    """The recipe's rows as token ids; the seed decides which are held out for validation.

    `reads`: for a method that reads contexts apart from their questions, how many tokens at once (see `reading_size`).
    Raises DataError, and RecipeError for text alone where nothing reads.
    """
    section, target = recipe.train, recipe.target
    if section.text is not None:
        if reads is None:
            raise RecipeError("train.text is for generative_adapter; other methods learn from prompts.")
        return _load_segments(recipe, tokenizer, seed, reads)
    has_examples = target.kind in ("generation", "completion_loss")
    per_context = section.questions_per_context or QUESTIONS_PER_CONTEXT
    data = prepare_training_data(
        section.data,
        tokenizer,
        max_length=min(section.max_length, load_window(recipe.base)),
        prompt_template=section.prompt,
        completion_template=section.completion,
        validation=section.validation,
        validation_fraction=section.validation_fraction,
        test=read_examples(target) if has_examples else None,
        limit=section.limit,
        seed=seed,
        split=section.split,
        context=section.context,
        make_rows=None if reads is None else ContextRows(tokenizer, reads, per_context),
    )
    if not len(data.train):
        raise DataError(f"{section.data} leaves no rows to train on. Give more rows, or a validation file.")
    return data


def _load_segments(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, seed: int, chunk_size: int) -> TrainingData:
    section = recipe.train
    assert section.text is not None
    return prepare_segments(
        section.data,
        tokenizer,
        section.text,
        chunk_size=chunk_size,
        segment_chunks=section.segment_chunks or SEGMENT_CHUNKS,
        validation=section.validation,
        validation_fraction=section.validation_fraction,
        limit=section.limit,
        seed=seed,
        split=section.split,
    )


def reading_size(recipe: Recipe, method: Method) -> int | None:
    """How many tokens of a context the method reads at once; None where it stands in the prompt."""
    return None if method.reads is None else method.reads(recipe.settings(), load_window(recipe.base))


def load_rehearsal(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, folder: Path) -> RehearsalRows:
    """The general text that the recipe asks for: written by the base, once, into `folder`, or the user's own."""
    assert recipe.rehearsal is not None
    length = min(recipe.rehearsal.length, load_window(recipe.base))
    settings = recipe.rehearsal.model_copy(update={"length": length})
    written: list[Written] = []
    if settings.sequences:
        base = load_base(recipe.base)
        identity = {
            "base": str(fingerprint(base)),
            "tokenizer": tokenizer_digest(tokenizer),
            **settings.model_dump(include={"sequences", "length", "temperature", "chat", "seed"}),
        }
        written += load_sequences(folder, identity, partial(write_sequences, base, tokenizer, settings))
        free_memory()
    if settings.text is not None:
        written += read_sequences(tokenizer, settings)
    rows = make_rows(written, settings)
    if not len(rows):
        raise DataError("rehearsal leaves nothing to rehearse: give sequences, or text, or set rehearsal=off.")
    size = settings.batch_size or math.ceil(recipe.training.batch_size / 4)
    return RehearsalRows(rows, CompletionCollator(tokenizer), settings, size)
