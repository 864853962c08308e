"""What a task is, and the table of the tasks that have a name. Knows nothing about models or how they are run."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from twinweave.errors import UsageError, unknown_name
from twinweave.evaluation.metrics import METRICS, OVER_ALL, PER_EXAMPLE

Kind = Literal["generation", "multiple_choice", "minimal_pairs", "text_loss", "completion_loss"]

# The first is the default where a task names none.
KIND_METRICS: dict[str, list[str]] = {
    "generation": [*PER_EXAMPLE, *OVER_ALL],
    "multiple_choice": ["accuracy"],
    "minimal_pairs": ["accuracy"],
    "text_loss": ["loss"],
    "completion_loss": ["loss"],
}


class Task(BaseModel):
    """Rows and how a model is scored on them; a user's own task is these fields in a few lines of YAML."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1)
    kind: Kind
    data: str | list[str] | None = None
    """What `load_rows` reads, or several; `*` in a path stands for several files."""
    split: str | None = None
    limit: int | None = Field(default=None, ge=1)
    """The first rows only; of several sources an equal share of each."""
    prompt: str | None = None
    """Format string over the columns; without it the prompt, input or question column."""
    completion: str | None = None
    """Format string over the columns; without it the completion, output or answer column."""
    context: str | None = None
    """What is read before the question: a column (a text, or a list of several), or a format string over the columns.
    A model that does not read gets it in front of the prompt. For generation and completion_loss."""
    text: str | None = None
    """text_loss only: format string over the columns, "{text}" by default."""
    choices: str | list[str] | None = None
    """A column that holds a list of texts, or the list itself."""
    answer: str | None = None
    """The column with the right answer: a choice's text, its index, or its letter."""
    metrics: list[str] = []
    """The first is the primary one."""
    max_new_tokens: int = Field(default=64, ge=1)
    stop: list[str] = []
    """Generated text is cut before the first of these."""
    max_length: int = Field(default=1024, ge=8)
    """The window in tokens; the model's own window counts too if it is smaller."""
    family: Literal["near", "far"] | None = None
    """How close a retained task is to the target."""
    description: str = ""

    @model_validator(mode="after")
    def _check(self) -> "Task":
        fitting = KIND_METRICS[self.kind]
        self.metrics = self.metrics or fitting[:1]
        for metric in self.metrics:
            if metric not in METRICS:
                raise ValueError(unknown_name("metric", metric, METRICS))
            if metric not in fitting:
                raise ValueError(f"metric '{metric}' does not fit a {self.kind} task; use {', '.join(fitting)}")
        if self.kind == "multiple_choice" and (self.choices is None or self.answer is None):
            raise ValueError("a multiple_choice task needs both `choices` and `answer`")
        if self.kind != "multiple_choice" and isinstance(self.choices, list) and self.answer is None:
            raise ValueError("`choices` needs `answer`, the column that says which choice is right")
        if self.context is not None and self.kind not in ("generation", "completion_loss"):
            raise ValueError(f"`context` is for generation and completion_loss tasks, not for {self.kind}")
        if any(not stop for stop in self.stop):
            raise ValueError("`stop` holds an empty text, which would cut everything")
        return self

    @property
    def metric(self) -> str:
        """The primary metric's name."""
        return self.metrics[0]

    @property
    def higher_is_better(self) -> bool:
        """The primary metric's direction."""
        return METRICS[self.metric].higher_is_better

    @property
    def unit(self) -> str:
        """The primary metric's unit: "fraction" or "nats"."""
        return METRICS[self.metric].unit


KNOWN_TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="gsm8k",
            kind="generation",
            data="openai/gsm8k:main",
            split="test",
            prompt="Solve this problem step by step.\nQuestion: {question}\nAnswer:",
            completion="{answer}",
            metrics=["number_match"],
            max_new_tokens=400,
            description="grade-school maths in words; the final number counts",
        ),
        Task(
            name="cola",
            kind="generation",
            data="nyu-mll/glue:cola",
            split="validation",
            prompt="Is this an acceptable English sentence? Say yes or no.\nSentence: {sentence}\nAnswer:",
            choices=["no", "yes"],
            answer="label",
            metrics=["matthews_correlation", "accuracy"],
            max_new_tokens=8,
            description="is a sentence grammatical, yes or no",
        ),
        Task(
            name="mrpc",
            kind="generation",
            data="nyu-mll/glue:mrpc",
            split="test",
            prompt=(
                "Do these sentences mean the same? Say yes or no.\nFirst: {sentence1}\nSecond: {sentence2}\nAnswer:"
            ),
            choices=["no", "yes"],
            answer="label",
            metrics=["accuracy", "f1_binary"],
            max_new_tokens=8,
            description="do two sentences mean the same, yes or no",
        ),
        Task(
            name="ropes",
            kind="generation",
            data="allenai/ropes",
            split="validation",
            prompt="Read and answer.\n{background}\n{situation}\nQuestion: {question}\nAnswer:",
            completion="{answers[text]}",
            metrics=["exact_match", "token_f1"],
            max_new_tokens=32,
            stop=["\n"],
            description="questions about cause and effect in a passage",
        ),
        Task(
            name="webq",
            kind="generation",
            data="stanfordnlp/web_questions",
            split="test",
            prompt="Answer with a name or a few words.\nQuestion: {question}\nAnswer:",
            completion="{answers}",
            metrics=["contains_alias"],
            max_new_tokens=32,
            stop=["\n"],
            description="short questions about people, places and things (WebQuestions)",
        ),
        Task(
            name="freebaseqa",
            kind="generation",
            prompt="Answer this quiz question with a name or a few words.\nQuestion: {question}\nAnswer:",
            completion="{answers}",
            metrics=["contains_alias"],
            max_new_tokens=32,
            stop=["\n"],
            description="trivia questions (FreebaseQA)",
        ),
        Task(
            name="multirc",
            kind="generation",
            prompt=(
                "Read the text and say whether the answer is right, yes or no.\n{paragraph}\n"
                "Question: {question}\nProposed: {answer}\nRight:"
            ),
            choices=["no", "yes"],
            answer="label",
            metrics=["accuracy"],
            max_new_tokens=8,
            description="is a proposed answer about a text right, yes or no",
        ),
        Task(
            name="wikitext",
            kind="text_loss",
            data="Salesforce/wikitext:wikitext-2-raw-v1",
            split="test",
            description="loss on encyclopedia text",
        ),
        Task(
            name="minimal_pairs",
            kind="minimal_pairs",
            description="is the grammatical one of two sentences more likely (columns good and bad, as in BLiMP)",
        ),
        Task(name="completion_loss", kind="completion_loss", description="loss on the answers of any data"),
    )
}


def resolve_task(spec: str | Mapping[str, Any] | Task) -> Task:
    """A task from its name, from a YAML file, or from its fields.

    Args:
        spec: a name of `KNOWN_TASKS`; the path of a YAML file with a task's fields; the fields themselves; or
            `{"task": NAME_OR_FILE, ...}` with fields that replace those of that task.

    Raises:
        UsageError: an unknown name or key (the nearest is suggested), a missing file, or a bad value.
    """
    if isinstance(spec, Task):
        return spec
    if isinstance(spec, str | os.PathLike):
        return _task_by_name(os.fspath(spec))
    if not isinstance(spec, Mapping):
        raise UsageError(f"A task is a name or a set of fields, not {spec!r:.60}.")
    fields = dict(spec)
    if "task" not in fields:
        return _make_task(fields)
    known = resolve_task(fields.pop("task"))
    inherited = known.model_dump(exclude_unset=True)
    if fields.get("kind", known.kind) != known.kind:
        inherited.pop("metrics", None)  # those of another kind cannot fit
    return _make_task({**inherited, **fields})


def _task_by_name(name: str) -> Task:
    if name in KNOWN_TASKS:
        return KNOWN_TASKS[name].model_copy(deep=True)
    if not name.endswith((".yaml", ".yml")):
        raise UsageError(f"{unknown_name('task', name, KNOWN_TASKS)} A file of your own must end in .yaml.")
    path = Path(name).expanduser()
    if not path.is_file():
        raise UsageError(f"Task file '{name}' does not exist: looked for {path.absolute()}.")
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"Task file '{name}' is not readable YAML: {error}") from error
    if not isinstance(fields, dict):
        raise UsageError(f"Task file '{name}' does not hold a task's fields (`name: ...`, `kind: ...`, ...).")
    return resolve_task(fields)


def _make_task(fields: dict[str, Any]) -> Task:
    for key in fields:
        if key not in Task.model_fields:
            raise UsageError(unknown_name(f"key of task {fields.get('name', '')}:".replace(" :", ":"), key, _KEYS))
    try:
        return Task(**fields)
    except ValidationError as error:
        found = error.errors()[0]
        place = ".".join(str(part) for part in found["loc"])
        reason = found["msg"].removeprefix("Value error, ")
        given = "" if isinstance(found["input"], dict) else f" (given: {found['input']!r:.60})"
        raise UsageError(f"Task '{fields.get('name', '?')}': {place or 'fields'}: {reason}{given}.") from error


_KEYS = [*Task.model_fields, "task"]
