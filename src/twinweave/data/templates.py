"""Turning a row with named columns into one example: a prompt with its completion, or a chat.

Knows nothing about tokens, files or models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from string import Formatter
from typing import Any

from twinweave.errors import DataError

PROMPT_COLUMNS = ("prompt", "input", "question")
COMPLETION_COLUMNS = ("completion", "output", "answer")
ACCEPTED_COLUMNS = "prompt/completion, input/output, question/answer, or messages"
Message = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One row as text: either `prompt` and `completion`, or `messages`.

    Attributes:
        where: the row's place ("file.jsonl row 17"), for error messages.
        prompt: what the model is given; empty for a chat.
        completion: what it is trained to answer; empty for a chat.
        references: every answer that counts as right; the completion is the first. For a chat: the last
            assistant turn.
        messages: the turns of a chat, or empty.
        documents: the texts of the row's context, to be read before the question.
    """

    where: str
    prompt: str = ""
    completion: str = ""
    references: tuple[str, ...] = ()
    messages: tuple[Message, ...] = ()
    documents: tuple[str, ...] = ()

    def with_documents_in_prompt(self) -> "Example":
        """The same for a model that reads nothing apart: the documents in front of the prompt, a line each."""
        if not self.documents:
            return self
        if not self.messages:
            return replace(self, prompt="\n".join([*self.documents, self.prompt]), documents=())
        first, *others = self.messages
        content = "\n".join([*self.documents, str(first.get("content") or "")])
        return replace(self, messages=({**first, "content": content}, *others), documents=())


def to_example(
    row: Mapping[str, Any],
    *,
    where: str,
    prompt_template: str | None = None,
    completion_template: str | None = None,
    context: str | None = None,
) -> Example:
    """Read a row whose columns are prompt/completion, input/output, question/answer, or messages.

    A completion may be a list of aliases: the first is trained, all are references in evaluation.

    Args:
        row: column name -> value.
        where: the row's place, put into every error.
        prompt_template: a Python format string over the columns, for example "{question}\\nAnswer:".
        completion_template: the same for the completion. A template that is one column and nothing else, such as
            "{answers}" or "{answers[text]}", keeps a list of aliases.
        context: what is read before the question: the name of a column, or a format string over the columns. A list
            of texts in that column is as many documents.

    Raises:
        DataError: no prompt or completion, an empty one, an unknown column in a template, or malformed messages.
    """
    if context is not None:
        example = to_example(row, where=where, prompt_template=prompt_template, completion_template=completion_template)
        return replace(example, documents=_documents(context, row, where))
    if prompt_template is None and completion_template is None and row.get("messages") is not None:
        return _chat_example(row["messages"], where)
    prompt_value, completion_value = _pick_columns(row, prompt_template is None, completion_template is None)
    if prompt_template is not None:
        prompt_value = fill_template(prompt_template, row, where=where)
    if completion_template is not None:
        completion_value = fill_template(completion_template, row, where=where, keep_list=True)
    missing = [kind for kind, value in (("prompt", prompt_value), ("completion", completion_value)) if value is None]
    if missing:
        raise DataError(
            f"{where} has no {' and no '.join(missing)}. Its columns are: {_filled_columns(row)}. "
            f"Accepted are {ACCEPTED_COLUMNS}; or give a template over your columns."
        )
    prompt = _as_text(prompt_value, "prompt", where)
    if not prompt.strip():
        raise DataError(f"{where} has an empty prompt. Give the model something to answer.")
    references = as_references(completion_value, where)
    return Example(where=where, prompt=prompt, completion=references[0], references=references)


def fill_template(template: str, row: Mapping[str, Any], *, where: str, keep_list: bool = False) -> Any:
    """The template with the row's columns filled in, as text.

    With `keep_list`, a template that is one field and nothing else gives that field's own value, so that a list
    stays a list.

    Raises:
        DataError: the template names a column that the row does not have, or is malformed.
    """
    try:
        missing = [name for name in template_columns(template) if row.get(name) is None]
        if missing:
            raise KeyError(*missing)
        fields = list(Formatter().parse(template))
        if keep_list and len(fields) == 1 and fields[0][0] == "" and fields[0][1]:
            return Formatter().get_field(fields[0][1], (), row)[0]
        return Formatter().vformat(template, (), row)
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise DataError(
            f"The template {template!r} does not fit {where}: {type(error).__name__}: {error}. "
            f"The row's columns are: {_filled_columns(row)}."
        ) from error


def _documents(context: str, row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    template = context if template_columns(context) else f"{{{context}}}"
    value = fill_template(template, row, where=where, keep_list=True)
    documents = tuple(value) if isinstance(value, list | tuple) else (value,)
    for document in documents:
        if not isinstance(document, str) or not document.strip():
            raise DataError(f"{where} has a context with {document!r:.60} in it; give texts with at least a word.")
    return documents


def template_columns(template: str) -> set[str]:
    """The columns that a template names: "{answers[text]}" names `answers`."""
    fields = (field for _, field, _, _ in Formatter().parse(template) if field)
    return {field.partition("[")[0].partition(".")[0] for field in fields}


def as_references(value: Any, where: str) -> tuple[str, ...]:
    """The accepted answers in a column: one text or number, or a list of them.

    Raises:
        DataError: there is none, or one is empty.
    """
    values = value if isinstance(value, list | tuple) else [value]
    references = tuple(_as_text(item, "completion", where) for item in values)
    if not references or not all(reference.strip() for reference in references):
        raise DataError(f"{where} has an empty completion. Fill it in or remove the row.")
    return references


def _pick_columns(row: Mapping[str, Any], need_prompt: bool, need_completion: bool) -> tuple[Any, Any]:
    """The values of the first pair of columns that the row fills, as far as no template replaces them."""
    pairs = list(zip(PROMPT_COLUMNS, COMPLETION_COLUMNS, strict=True))
    for prompt_name, completion_name in pairs:
        prompt, completion = row.get(prompt_name), row.get(completion_name)
        if (prompt is not None or not need_prompt) and (completion is not None or not need_completion):
            return prompt, completion
    for prompt_name, completion_name in pairs:
        if row.get(prompt_name) is not None or row.get(completion_name) is not None:
            return row.get(prompt_name), row.get(completion_name)
    return None, None


def _chat_example(messages: Any, where: str) -> Example:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(f"{where} has messages that are not a list of turns, but {messages!r:.80}.")
    turns = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"{where} turn {number} is not an object with a role, but {message!r:.80}.")
        content = message.get("content")
        if message["role"] == "assistant" and (not isinstance(content, str) or not content.strip()):
            raise DataError(f"{where} turn {number} (assistant) is empty. Give it content or remove the row.")
        # A table has the union of all rows' keys, so keys that a turn never had arrive as None.
        turns.append({key: value for key, value in message.items() if value is not None})
    roles = [turn["role"] for turn in turns]
    if "assistant" not in roles:
        raise DataError(f"{where} has no assistant turn (roles: {', '.join(roles)}); nothing could be trained.")
    if roles[0] == "assistant":
        raise DataError(f"{where} starts with an assistant turn. Put the user's turn before it.")
    last = len(roles) - roles[::-1].index("assistant")
    return Example(where=where, messages=tuple(turns[:last]), references=(turns[last - 1]["content"],))


def _as_text(value: Any, kind: str, where: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return str(value)
    raise DataError(f"{where} has a {kind} that is not text but {value!r:.80}.")


def _filled_columns(row: Mapping[str, Any]) -> str:
    return ", ".join(sorted(name for name, value in row.items() if value is not None)) or "none"
