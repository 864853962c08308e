"""Turning an example into token ids and labels, and a prompt into the ids that generation starts from.

Prompt and completion are tokenised apart, so that training sees exactly the prompt that generation will see.
Knows nothing about files, batches or models.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from twinweave.data.collator import IGNORED_LABEL
from twinweave.data.templates import Example, Message
from twinweave.errors import DataError, UnsupportedModelError

Tokens = list[int]
Segment = tuple[Tokens, bool]  # token ids, and whether they are trained


@dataclass(frozen=True)
class Encoded:
    """One example as token ids.

    Attributes:
        input_ids: the tokens, [T].
        labels: the same where the token is trained, -100 elsewhere, [T].
        cut: the start of the prompt was dropped to fit the window.
    """

    input_ids: Tokens
    labels: Tokens
    cut: bool


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, pad_token: str | None = None) -> None:
    """Make sure that the tokenizer can end and pad a text; `pad_token`, when given, becomes its padding token.

    Raises:
        UnsupportedModelError: there is no end-of-text token, no padding token, or `pad_token` is not in the
            vocabulary.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if tokenizer.eos_token_id is None:
        raise UnsupportedModelError(
            f"The tokenizer '{name}' has no end-of-text token, so an answer could never end. "
            "Set one before training: tokenizer.eos_token = '<a token of its vocabulary>'."
        )
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise UnsupportedModelError(
                f"The padding token '{pad_token}' is not in the vocabulary of the tokenizer '{name}'. "
                f"Give one that is, for example its end-of-text token '{tokenizer.eos_token}'."
            )
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token_id is None:
        raise UnsupportedModelError(
            f"The tokenizer '{name}' has no padding token. Set one with tokenizer.pad_token = tokenizer.eos_token, "
            f'or in a recipe with the key base.pad_token: "{tokenizer.eos_token}".'
        )


def join_completion(prompt: str, completion: str) -> str:
    """The completion as it follows the prompt.

    One space is put at the start of the completion if the prompt ends without white space and the completion starts
    without it; otherwise nothing separates the two. The space belongs to the completion because most tokenizers
    write a word's leading space into the word's own token.
    """
    if prompt and not prompt[-1].isspace() and not completion[:1].isspace():
        return f" {completion}"
    return completion


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """The start-of-text token as a list if the tokenizer has one and puts it before a text by itself, else []."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Tokens:
    """The tokens of a text alone, without start or end of text."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def encode_example(example: Example, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> Encoded:
    """Token ids and labels of one example, at most `max_length` tokens.

    Prompt and completion: start of text (if the tokenizer adds it), prompt, completion (see `join_completion`), end
    of text; the completion and the end of text are trained. A chat: rendered with the tokenizer's chat template;
    every assistant turn is trained with its end-of-turn marker, nothing else is.

    What does not fit loses the start of its prompt, so that the end of the question and the whole answer stay.

    Raises:
        DataError: the answer does not fit with at least one token of its prompt, or has no tokens.
        UnsupportedModelError: a chat template is missing or does not render a turn the same way each time.
    """
    make_segments = _chat_tokens if example.messages else _answer_tokens
    leading, segments = make_segments(example, tokenizer)
    segments, cut = _cut_first_segment(segments, len(leading), max_length, example.where)
    input_ids, labels = list(leading), [IGNORED_LABEL] * len(leading)
    for ids, trained in segments:
        input_ids += ids
        labels += ids if trained else [IGNORED_LABEL] * len(ids)
    return Encoded(input_ids, labels, cut)


def encode_prompt(
    prompt: str | Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    where: str = "The prompt",
) -> tuple[Tokens, bool]:
    """The ids that generation starts from, exactly as training saw them, and whether their start was dropped to fit.

    A list of messages is rendered with the chat template up to where the assistant's answer begins.

    Raises:
        DataError: the prompt has no tokens.
        UnsupportedModelError: a chat template is missing or does not render a turn the same way each time.
    """
    if isinstance(prompt, str):
        leading, ids = bos_ids(tokenizer), text_ids(tokenizer, prompt)
    else:
        pieces = chat_segments(prompt, tokenizer, where=where, answer_next=True)
        leading, ids = _split_bos([token for text, _ in pieces for token in text_ids(tokenizer, text)], tokenizer)
    [(ids, _)], cut = _cut_first_segment([(ids, False)], len(leading), max_length, where)
    return [*leading, *ids], cut


def chat_segments(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, where: str, answer_next: bool = False
) -> list[tuple[str, bool]]:
    """The rendered chat cut at the borders of the assistant turns: (text, whether an assistant wrote it).

    With `answer_next` the last piece ends where the next assistant turn would begin.

    Raises:
        UnsupportedModelError: there is no chat template, or it changes earlier turns when later ones follow.
        DataError: the template refuses the messages.
    """
    segments, done = [], ""
    for end, is_answer in _borders(messages, answer_next):
        text = _render(messages[:end], tokenizer, where, generation_prompt=not is_answer)
        if not text.startswith(done):
            raise UnsupportedModelError(
                f"{where}: the chat template renders turns differently when later ones follow, so their tokens cannot "
                "be told apart. Give the tokenizer a chat template that renders every turn on its own."
            )
        piece = text[len(done) :]
        if is_answer:
            piece = _without_trailing_space(piece, tokenizer)
        segments.append((piece, is_answer))
        done += piece
    return segments


def _answer_tokens(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[Tokens, list[Segment]]:
    completion = text_ids(tokenizer, join_completion(example.prompt, example.completion))
    if not completion:
        raise DataError(f"{example.where}: the tokenizer knows no part of the answer {example.completion!r:.60}.")
    answer = [*completion, tokenizer.eos_token_id]
    return bos_ids(tokenizer), [(text_ids(tokenizer, example.prompt), False), (answer, True)]


def _chat_tokens(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[Tokens, list[Segment]]:
    pieces = chat_segments(example.messages, tokenizer, where=example.where)
    segments = [(text_ids(tokenizer, text), trained) for text, trained in pieces]
    if not all(ids for ids, trained in segments if trained):
        raise DataError(f"{example.where}: the tokenizer knows no part of an assistant turn.")
    last_turn = segments[-1][0]
    # Without a marker at its end the model would never learn to stop.
    if last_turn[-1] not in tokenizer.added_tokens_decoder:
        last_turn.append(tokenizer.eos_token_id)
    leading, first = _split_bos(segments[0][0], tokenizer)
    return leading, [(first, False), *segments[1:]]


def _split_bos(ids: Tokens, tokenizer: PreTrainedTokenizerBase) -> tuple[Tokens, Tokens]:
    """A chat template writes the start of text itself; it must survive the cut."""
    return (ids[:1], ids[1:]) if ids[:1] == [tokenizer.bos_token_id] else ([], ids)


def _borders(messages: Sequence[Message], answer_next: bool) -> Iterator[tuple[int, bool]]:
    """For each assistant turn, where the text before it ends and where the turn itself ends."""
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            yield index, False
            yield index + 1, True
    if answer_next:
        yield len(messages), False


def _render(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, where: str, *, generation_prompt: bool
) -> str:
    if tokenizer.chat_template is None:
        raise UnsupportedModelError(
            f"{where} is a chat, but the tokenizer '{tokenizer.name_or_path}' has no chat template. "
            "Set tokenizer.chat_template, or give prompt/completion rows."
        )
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation_prompt)
    except Exception as error:  # templates raise what they like, from jinja errors to TypeError
        raise DataError(f"{where}: the chat template refuses these messages: {error}") from error
    return str(text)


def _without_trailing_space(piece: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """White space after the end-of-turn marker is the template's, not the assistant's."""
    stripped = piece.rstrip()
    markers = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    return stripped if any(stripped.endswith(marker) for marker in markers) else piece


def _cut_first_segment(
    segments: list[Segment], leading: int, max_length: int, where: str
) -> tuple[list[Segment], bool]:
    """Drop the start of the first segment (never of an answer) until all fits; one token of it stays."""
    (first, trained), *others = segments
    length = leading + sum(len(ids) for ids, _ in segments)
    if not first:
        raise DataError(f"{where}: the prompt has no tokens that the tokenizer knows.")
    excess = max(0, length - max_length)
    if excess >= len(first):
        raise DataError(
            f"{where} has {length} tokens, and {length - len(first) + 1} of them cannot be dropped (the answer and one "
            f"token before it), but the window is {max_length}. Shorten the row, remove it, or raise max_length."
        )
    return [(first[excess:], trained), *others], excess > 0
