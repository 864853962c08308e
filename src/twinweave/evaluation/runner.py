"""Scoring a model on tasks. Knows nothing about training, methods or reports."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from twinweave.cmt import MemoryModel
from twinweave.data.collator import IGNORED_LABEL
from twinweave.data.encode import check_tokenizer, encode_example, encode_prompt, join_completion, text_ids
from twinweave.data.templates import Example
from twinweave.errors import DataError, UsageError
from twinweave.evaluation.contexts import Contexts, answering, can_read, read_all
from twinweave.evaluation.generate import generate_texts
from twinweave.evaluation.likelihood import LabelledRow, Tokens, log_likelihoods
from twinweave.evaluation.metrics import score_texts
from twinweave.evaluation.rows import read_choices, read_examples, read_pairs, read_texts
from twinweave.evaluation.tasks import Task

SHOWN_EXAMPLES = 20


@dataclass
class TaskScore:
    """How a model did on one task.

    Attributes:
        task: what was scored.
        metrics: metric name -> score (fractions, or nats per token).
        count: rows scored.
        cut_rows: rows that lost the start of their prompt to fit the window.
        examples: the first 20 rows at most, as {"prompt", "prediction", "references"}; none for losses.
        per_example: the primary metric of each row, where it has one.
    """

    task: Task
    metrics: dict[str, float]
    count: int
    cut_rows: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)
    per_example: list[float] = field(default_factory=list)

    @property
    def score(self) -> float:
        """The primary metric's value."""
        return self.metrics[self.task.metric]


@dataclass(frozen=True)
class _Run:
    """What every kind of task needs besides its rows."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    task: Task
    window: int
    batch_size: int
    progress: bool

    def log_likelihoods(
        self, rows: Sequence[LabelledRow], *, with_prompt: bool, contexts: Contexts | None = None
    ) -> list[torch.Tensor]:
        return log_likelihoods(
            self.model,
            rows,
            int(self.tokenizer.pad_token_id),
            batch_size=self.batch_size,
            with_prompt=with_prompt,
            progress=self.progress,
            description=self.task.name,
            contexts=contexts,
        )


def evaluate_task(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    batch_size: int = 16,
    progress: bool = True,
) -> TaskScore:
    """Score a causal language model of transformers, adapted or not, on one task; its training flags are restored.

    A GenerativeAdapter or MemoryModel reads each context of a task that has them, and answers from it; for any other
    model the context stands in front of the prompt.

    Raises:
        DataError: the task's rows cannot be read or do not fit the window.
        UsageError: the task has no data, or its answers are longer than the window.
        UnsupportedModelError: the tokenizer cannot end or pad a text.
    """
    check_tokenizer(tokenizer)
    run = _Run(model, tokenizer, task, task_window(model, task), batch_size, progress)
    score_kind = {
        "generation": _generation,
        "multiple_choice": _multiple_choice,
        "minimal_pairs": _minimal_pairs,
        "text_loss": _text_loss,
        "completion_loss": _completion_loss,
    }[task.kind]
    with _evaluating(model):
        return score_kind(run)


def evaluate_tasks(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    *,
    batch_size: int = 16,
    progress: bool = True,
    read: Sequence[str] = (),
) -> dict[str, TaskScore]:
    """Score a model on several tasks; task name -> score. See `evaluate_task`.

    `read`: texts that a model which reads has read when it is asked what has no context of its own.

    Raises:
        UsageError: two tasks have the same name (and what `evaluate_task` raises).
    """
    names = [task.name for task in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"Two tasks are called '{twice[0]}'. Give one of them another `name`.")
    with _evaluating(model):
        state = read_all(model, read) if read and can_read(model) else None
    scores = {}
    for task in tasks:
        with nullcontext() if state is None or task.context is not None else answering(model, state):
            scores[task.name] = evaluate_task(model, tokenizer, task, batch_size=batch_size, progress=progress)
    return scores


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module's own flag is as before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def task_window(model: Any, task: Task) -> int:
    """The tokens that a row of the task may have: the task's window, or the model's own if it is smaller."""
    own = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(model, MemoryModel):
        own = model.window
    return min(task.max_length, own) if isinstance(own, int) and own > 0 else task.max_length


def _generation(run: _Run) -> TaskScore:
    task, room = run.task, run.window - run.task.max_new_tokens
    if room < 2:
        raise UsageError(
            f"Task '{task.name}' asks for {task.max_new_tokens} new tokens in a window of {run.window}, which leaves "
            "no room for the prompt. Lower max_new_tokens."
        )
    examples, contexts = _examples_of(run)
    encoded = [
        encode_prompt(_prompt_of(example), run.tokenizer, max_length=room, where=example.where) for example in examples
    ]
    predictions = generate_texts(
        run.model,
        run.tokenizer,
        [ids for ids, _ in encoded],
        max_new_tokens=task.max_new_tokens,
        stop=task.stop,
        batch_size=run.batch_size,
        progress=run.progress,
        description=task.name,
        contexts=contexts,
    )
    references = [example.references for example in examples]
    scores = {name: score_texts(name, predictions, references) for name in task.metrics}
    shown = zip(examples[:SHOWN_EXAMPLES], predictions, strict=False)
    return TaskScore(
        task=task,
        metrics={name: score for name, (score, _) in scores.items()},
        count=len(examples),
        cut_rows=sum(cut for _, cut in encoded),
        examples=[_shown(_prompt_text(example), prediction, example.references) for example, prediction in shown],
        per_example=scores[task.metric][1],
    )


def _multiple_choice(run: _Run) -> TaskScore:
    """The choice with the highest mean log-likelihood per token, so that length does not decide."""
    rows = read_choices(run.task)
    labelled: list[LabelledRow] = []
    cut_rows = 0
    for row in rows:
        choices = [text_ids(run.tokenizer, join_completion(row.prompt, choice)) for choice in row.choices]
        if not all(choices):
            raise DataError(f"{row.where}: the tokenizer knows no part of one of the choices {row.choices}.")
        room = run.window - max(len(choice) for choice in choices)
        prompt, cut = encode_prompt(row.prompt, run.tokenizer, max_length=room, where=row.where)
        cut_rows += cut
        labelled += [([*prompt, *choice], [IGNORED_LABEL] * len(prompt) + choice) for choice in choices]
    means = iter([scores.mean().item() for scores in run.log_likelihoods(labelled, with_prompt=True)])
    per_row = [[next(means) for _ in row.choices] for row in rows]
    chosen = [max(range(len(scores)), key=scores.__getitem__) for scores in per_row]
    right = [float(guess == row.answer) for guess, row in zip(chosen, rows, strict=True)]
    examples = [
        _shown(row.prompt, row.choices[guess], (row.choices[row.answer],))
        for row, guess in zip(rows[:SHOWN_EXAMPLES], chosen, strict=False)
    ]
    return TaskScore(run.task, {"accuracy": sum(right) / len(right)}, len(rows), cut_rows, examples, right)


def _minimal_pairs(run: _Run) -> TaskScore:
    """Right where the whole good text is more likely than the whole bad one."""
    pairs = read_pairs(run.task)
    labelled = [_whole_row(run, text, pair.where) for pair in pairs for text in (pair.good, pair.bad)]
    totals = [scores.double().sum().item() for scores in run.log_likelihoods(labelled, with_prompt=False)]
    # Two texts with the same tokens are never told apart, whatever rounding says.
    right = [
        float(totals[index] > totals[index + 1] and labelled[index] != labelled[index + 1])
        for index in range(0, len(totals), 2)
    ]
    examples = [
        _shown("", pair.good if hit else pair.bad, (pair.good,))
        for pair, hit in zip(pairs[:SHOWN_EXAMPLES], right, strict=False)
    ]
    return TaskScore(run.task, {"accuracy": sum(right) / len(right)}, len(pairs), 0, examples, right)


def _text_loss(run: _Run) -> TaskScore:
    """Total nats by total predicted tokens; a text that is too long is read in windows that share one token."""
    texts = read_texts(run.task)
    windows = [window for _, text in texts for window in _windows(_with_context(run, text), run.window)]
    if not windows:
        raise DataError(f"Task '{run.task.name}': no text has a token that could be predicted.")
    return TaskScore(run.task, {"loss": _mean_loss(run.log_likelihoods(windows, with_prompt=False))}, len(texts))


def _completion_loss(run: _Run) -> TaskScore:
    """Total nats by total tokens of the completions and their end of text."""
    examples, contexts = _examples_of(run)
    encoded = [encode_example(example, run.tokenizer, max_length=run.window) for example in examples]
    rows = [(row.input_ids, row.labels) for row in encoded]
    scores = run.log_likelihoods(rows, with_prompt=True, contexts=contexts)
    return TaskScore(run.task, {"loss": _mean_loss(scores)}, len(encoded), sum(row.cut for row in encoded))


def _examples_of(run: _Run) -> tuple[list[Example], Contexts | None]:
    """The task's examples, and what they are answered from where the model reads that by itself."""
    examples = read_examples(run.task)
    if run.task.context is not None and can_read(run.model):
        return examples, Contexts(run.model, [example.documents for example in examples])
    return [example.with_documents_in_prompt() for example in examples], None


def _with_context(run: _Run, text: str) -> Tokens:
    """The text's tokens behind the start of text, where there is one, so that the first is predicted too."""
    bos = run.tokenizer.bos_token_id
    return [*([] if bos is None else [bos]), *text_ids(run.tokenizer, text)]


def _whole_row(run: _Run, text: str, where: str) -> LabelledRow:
    ids = _with_context(run, text)
    if len(ids) > run.window:
        raise DataError(f"{where} has {len(ids)} tokens and does not fit the window of {run.window}. Remove the pair.")
    return ids, [IGNORED_LABEL, *ids[1:]]


def _windows(ids: Tokens, size: int) -> list[LabelledRow]:
    """Each token but the first is a label exactly once; a window starts with the last token of the one before."""
    starts = range(0, len(ids) - 1, size - 1)
    pieces = [ids[start : start + size] for start in starts]
    return [(piece, [IGNORED_LABEL, *piece[1:]]) for piece in pieces]


def _mean_loss(scores: Sequence[torch.Tensor]) -> float:
    total = sum(row.double().sum().item() for row in scores)
    return -total / sum(len(row) for row in scores)


def _prompt_of(example: Example) -> Any:
    return list(example.messages[:-1]) if example.messages else example.prompt


def _prompt_text(example: Example) -> str:
    turns = [f"{turn['role']}: {turn.get('content')}" for turn in example.messages[:-1]]
    return "\n".join(turns) if turns else example.prompt


def _shown(prompt: str, prediction: str, references: Sequence[str]) -> dict[str, Any]:
    return {"prompt": prompt, "prediction": prediction, "references": list(references)}
