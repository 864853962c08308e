"""Reading a task's rows as what its kind needs: examples, choices, pairs or texts.

Knows nothing about tokens or models.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from typing import Any

from twinweave.data.formats import POCKET_PREFIX, load_rows
from twinweave.data.templates import PROMPT_COLUMNS, Example, fill_template, template_columns, to_example
from twinweave.errors import DataError, UsageError
from twinweave.evaluation.tasks import KNOWN_TASKS, Task

_KNOWN_PROMPTS = {task.prompt for task in KNOWN_TASKS.values()} - {None}
_PAIR_COLUMNS = (("good", "bad"), ("sentence_good", "sentence_bad"))
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Choices:
    """A prompt, the texts that could follow it, and the index of the right one."""

    where: str
    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Pair:
    """Two texts of which the first should be the more likely one."""

    where: str
    good: str
    bad: str


def task_rows(task: Task) -> Iterator[tuple[str, Row]]:
    """Each row of the task's data with its place ("file.jsonl row 17").

    Raises:
        UsageError: the task has no data.
        DataError: the data cannot be read.
    """
    if task.data is None:
        raise UsageError(f"Task '{task.name}' has no data of its own. Add `data: FILE` (or a hub name) to it.")
    sources = [source for entry in _as_list(task.data) for source in _expand(entry)]
    for index, source in enumerate(sources):
        limit = None
        if task.limit is not None:
            limit = task.limit // len(sources) + (index < task.limit % len(sources))
            if limit == 0:
                continue
        for number, row in enumerate(load_rows(source, split=task.split, limit=limit), start=1):
            yield f"{source} row {number}", row


def read_examples(task: Task) -> list[Example]:
    """Prompts with their references, for generation and completion_loss tasks."""
    return [_to_example(task, row, where) for where, row in task_rows(task)]


def read_choices(task: Task) -> list[Choices]:
    """Prompts with their choices, for multiple_choice tasks."""
    return [_to_choices(task, row, where) for where, row in task_rows(task)]


def read_pairs(task: Task) -> list[Pair]:
    """Pairs of texts, for minimal_pairs tasks: columns good/bad or sentence_good/sentence_bad."""
    pairs = []
    for where, row in task_rows(task):
        found = [names for names in _PAIR_COLUMNS if all(row.get(name) for name in names)]
        if not found:
            raise DataError(
                f"{where} has the columns {', '.join(row)}, but a minimal pair needs two filled ones: good and bad."
            )
        good, bad = (str(row[name]) for name in found[0])
        pairs.append(Pair(where, good, bad))
    return pairs


def read_texts(task: Task) -> list[tuple[str, str]]:
    """(place, text) for text_loss tasks; blank texts are left out.

    Raises:
        DataError: every text is blank, or a row lacks the column.
    """
    template = task.text or "{text}"
    texts = [(where, str(fill_template(template, row, where=where))) for where, row in task_rows(task)]
    filled = [(where, text) for where, text in texts if text.strip()]
    if not filled:
        raise DataError(f"Task '{task.name}': every text of {task.data} is blank.")
    return filled


def read_documents(source: str, limit: int | None = None) -> list[str]:
    """The `text` column of the first rows of a source, blank ones left out. Raises DataError."""
    rows = enumerate(load_rows(source, limit=limit), start=1)
    texts = [str(fill_template("{text}", row, where=f"{source} row {number}")) for number, row in rows]
    return [text for text in texts if text.strip()]


def choice_index(value: Any, choices: Sequence[str], where: str) -> int:
    """Which choice a label means: a choice's text, else its index (from 0), else its letter (from A).

    Raises:
        DataError: it means none of them.
    """
    if isinstance(value, str) and value in choices:
        return choices.index(value)
    text = str(value).strip()
    index = int(text) if text.isdecimal() else ord(text.upper()) - ord("A") if len(text) == 1 else -1
    if not 0 <= index < len(choices):
        raise DataError(f"{where} has the answer {value!r:.60}, which is none of its {len(choices)} choices.")
    return index


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _expand(source: str) -> list[str]:
    if "*" not in source or source.startswith(POCKET_PREFIX):
        return [source]
    found = sorted(glob(source, recursive=True))
    if not found:
        raise DataError(f"No file matches '{source}'. Check the path.")
    return found


def _to_example(task: Task, row: Row, where: str) -> Example:
    prompt, completion = task.prompt, task.completion
    label = task.answer
    named = {column for part in (prompt, completion) if part for column in template_columns(part)} | (
        {label} if label else set()
    )
    # The table's own templates are for the data as published. Rows that hold whole prompts already are used as they
    # are; a template that a user wrote must fit.
    if prompt in _KNOWN_PROMPTS and any(row.get(column) is None for column in named):
        return to_example(row, where=where, context=task.context)
    if label is not None:
        if row.get(label) is None:
            raise DataError(f"{where} has no column '{label}', which the task '{task.name}' names as its answer.")
        value = row[label]
        if task.choices is not None:
            choices = _choices_of(task, row, where)
            value = choices[choice_index(value, choices, where)]
        row, completion = {**row, "completion": value}, "{completion}"
    return to_example(row, where=where, prompt_template=prompt, completion_template=completion, context=task.context)


def _to_choices(task: Task, row: Row, where: str) -> Choices:
    prompt = next((row[name] for name in PROMPT_COLUMNS if row.get(name) is not None), None)
    if task.prompt is not None:
        prompt = fill_template(task.prompt, row, where=where)
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f"{where} has no prompt. Fill a column named {', '.join(PROMPT_COLUMNS)}, or give a template.")
    choices = _choices_of(task, row, where)
    return Choices(where, prompt, tuple(choices), choice_index(row.get(task.answer or ""), choices, where))


def _choices_of(task: Task, row: Row, where: str) -> list[str]:
    choices = row.get(task.choices) if isinstance(task.choices, str) else task.choices
    if not isinstance(choices, list) or len(choices) < 2 or not all(str(choice).strip() for choice in choices):
        raise DataError(f"{where} has the choices {choices!r:.80}; it needs a list of at least two texts.")
    return [str(choice) for choice in choices]
