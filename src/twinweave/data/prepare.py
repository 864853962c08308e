"""From a data source to encoded training and validation sets, with a report on what was found on the way.

Rows with a context are held out by context, so that no text is read in both sets.

Knows nothing about models, trainers or metrics.
"""

import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import datasets
import numpy
from transformers import PreTrainedTokenizerBase

from twinweave.data.collator import IGNORED_LABEL
from twinweave.data.encode import Encoded, check_tokenizer, encode_example
from twinweave.data.formats import load_rows
from twinweave.data.templates import Example, to_example
from twinweave.errors import DataError
from twinweave.progress import track

LARGEST_SPLIT = 500
Source = str | os.PathLike[str]
Row = TypeVar("Row")


@dataclass
class DataReport:
    """What was found in the data.

    Attributes:
        rows: rows of the training source.
        train_rows, validation_rows: rows of each set.
        cut_rows: rows of either set that lost the start of their prompt.
        trained_tokens: tokens of the training set with a loss, in one epoch.
        common_with_test: rows of the training source that are in the test source too.
        warnings: whole sentences for the user.
    """

    rows: int
    train_rows: int
    validation_rows: int
    cut_rows: int
    trained_tokens: int
    common_with_test: int = 0
    warnings: list[str] = field(default_factory=list)


@dataclass
class TrainingData:
    """Encoded sets with the columns `input_ids` and `labels`, and the report about them."""

    train: datasets.Dataset
    validation: datasets.Dataset
    report: DataReport


def prepare_training_data(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    prompt_template: str | None = None,
    completion_template: str | None = None,
    validation: Source | None = None,
    validation_fraction: float = 0.05,
    test: Source | Sequence[Example] | None = None,
    limit: int | None = None,
    seed: int = 0,
    split: str | None = None,
    context: str | None = None,
    make_rows: Callable[[Sequence[Example], Sequence[Encoded]], datasets.Dataset] | None = None,
) -> TrainingData:
    """Load, check and encode the rows to train on.

    Args:
        source: see `load_rows`; `split` and `limit` apply to it.
        tokenizer: must have an end-of-text and a padding token.
        max_length: the window in tokens; longer rows lose the start of their prompt.
        prompt_template, completion_template: see `to_example`; they apply to every source given here.
        validation: rows to validate on (of a name with splits: its "validation" split). Without it a random part
            of `source` is held out.
        validation_fraction: how much is held out: at least 1 row and at most 500, whole contexts where they fit.
        test: the rows that the result will be judged on, as a source (of a name with splits: its "test" split) or as
            examples; they are only compared.
        limit: use the first rows only.
        seed: of the held-out part.
        split: the split of `source`, "train" by default.
        context: see `to_example`. Without `make_rows` the documents are put in front of the prompt.
        make_rows: examples and their encoding -> a data set, in place of one row for each example.

    Raises:
        DataError: a row or a source cannot be used; the message names it.
        UnsupportedModelError: the tokenizer cannot end or pad a text.
    """
    check_tokenizer(tokenizer)
    templates = (prompt_template, completion_template, context)
    examples = _read_examples(source, templates, split=split, limit=limit)
    train, held_out = examples, []
    if validation is not None:
        held_out = _read_examples(validation, templates, split="validation")
    else:
        train, held_out = hold_out(examples, validation_fraction, seed, [example.documents for example in examples])
    parts = [part if make_rows is not None else _in_prompt(part) for part in (train, held_out)]
    encoded = [_encode_all(part, tokenizer, max_length) for part in parts]
    report = DataReport(
        rows=len(examples),
        train_rows=len(train),
        validation_rows=len(held_out),
        cut_rows=sum(row.cut for part in encoded for row in part),
        trained_tokens=sum(label != IGNORED_LABEL for row in encoded[0] for label in row.labels),
    )
    if report.cut_rows:
        report.warnings.append(
            f"{report.cut_rows} of {len(train) + len(held_out)} rows are longer than {max_length} tokens and lost the "
            "start of their prompt."
        )
    if validation is not None:
        _count_common(examples, held_out, "validation", report)
    if test is not None:
        report.common_with_test = _count_common(examples, _test_examples(test, templates, report), "test", report)
    rows = [make_rows(*pair) if make_rows else _to_dataset(pair[1]) for pair in zip(parts, encoded, strict=True)]
    return TrainingData(rows[0], rows[1], report)


Templates = tuple[str | None, str | None, str | None]


def _read_examples(
    source: Source, templates: Templates, *, split: str | None, limit: int | None = None
) -> list[Example]:
    rows = load_rows(source, split=split, limit=limit)
    prompt, completion, context = templates
    return [
        to_example(
            row,
            where=f"{source} row {number}",
            prompt_template=prompt,
            completion_template=completion,
            context=context,
        )
        for number, row in enumerate(rows, start=1)
    ]


def _in_prompt(examples: Sequence[Example]) -> list[Example]:
    return [example.with_documents_in_prompt() for example in examples]


def _test_examples(test: Source | Sequence[Example], templates: Templates, report: DataReport) -> Sequence[Example]:
    if not isinstance(test, str | os.PathLike):
        return test
    try:
        return _read_examples(test, templates, split="test")
    except DataError as error:
        # Comparing is a courtesy: a test set of another form is for its task to read, and no reason to stop here.
        report.warnings.append(f"The training rows were not compared with the test data. {error}")
        return []


def hold_out(
    examples: list[Row], fraction: float, seed: int, contexts: Sequence[Hashable] = ()
) -> tuple[list[Row], list[Row]]:
    """Rows to train on and a seeded share of them to validate on (1 to 500), no context being in both.

    A context is held out where all its rows fit into the share; if none does, the smallest is. Raises DataError.
    """
    if not 0 < fraction < 1:
        raise DataError(f"validation_fraction is {fraction}; it must lie between 0 and 1.")
    if len(examples) < 2:
        raise DataError("One row cannot be split into training and validation. Add rows, or give a validation file.")
    groups: dict[Hashable, list[int]] = {}
    for index, context in enumerate(contexts or range(len(examples))):
        groups.setdefault(context or index, []).append(index)  # rows without a context stand for themselves
    if len(groups) < 2:
        raise DataError("One context cannot be split into training and validation. Give a validation file.")
    count = min(LARGEST_SPLIT, max(1, round(len(examples) * fraction)))
    chosen: set[int] = set()
    together = list(groups.values())
    order = [together[group] for group in numpy.random.default_rng(seed).permutation(len(together))]
    for group in order[:-1]:
        if len(chosen) + len(group) <= count:
            chosen.update(group)
    if not chosen:
        smallest = min(order, key=len)
        chosen.update(smallest)
    kept = [example for index, example in enumerate(examples) if index not in chosen]
    return kept, [examples[index] for index in sorted(chosen)]


def _encode_all(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Encoded]:
    return [encode_example(example, tokenizer, max_length=max_length) for example in track(examples, "Encoding rows")]


def _to_dataset(rows: Sequence[Encoded]) -> datasets.Dataset:
    columns = {
        "input_ids": [numpy.asarray(row.input_ids, dtype=numpy.int32) for row in rows],
        "labels": [numpy.asarray(row.labels, dtype=numpy.int32) for row in rows],
    }
    return datasets.Dataset.from_dict(columns)


def _text_key(example: Example) -> str:
    """The row's text without regard to case and white space."""
    turns = [f"{turn['role']}: {turn.get('content')}" for turn in example.messages]
    text = " ".join([*example.documents, *turns, example.prompt, example.completion])
    return " ".join(text.casefold().split())


def _count_common(train: Sequence[Example], other: Sequence[Example], name: str, report: DataReport) -> int:
    keys = {_text_key(example) for example in other}
    common = sum(_text_key(example) in keys for example in train)
    if common:
        report.warnings.append(
            f"{common} of {len(train)} training rows are in the {name} data too: its score will be too good."
        )
    return common
