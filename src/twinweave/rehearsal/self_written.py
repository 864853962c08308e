"""What a base writes by itself: sequences sampled from its own distribution, or whole conversations for a chat model.

Knows nothing about what they are used for.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data.collator import attention_mask_of, pad_rows
from ..data.encode import text_ids
from ..errors import DataError, UnsupportedModelError
from ..evaluation.generate import greedy_settings, no_own_settings
from ..progress import track
from .rows import Written
from .settings import RehearsalSettings

_BATCH = 64
_MARK = "∎"


def is_chat(tokenizer: PreTrainedTokenizerBase, settings: RehearsalSettings) -> bool:
    """Whether the base writes conversations. Raises UnsupportedModelError if it should and has no chat template."""
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if settings.chat == "on" and not has_template:
        raise UnsupportedModelError(
            "rehearsal.chat is 'on', but the tokenizer has no chat template. Set it to 'auto' or 'off'."
        )
    return settings.chat != "off" and has_template


def write_sequences(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: RehearsalSettings
) -> list[Written]:
    """`settings.sequences` texts of at most `settings.length` tokens, sampled at `settings.temperature`.

    Plain text starts from the start-of-text token (or, for tokenizers without one, from the end of the text before). In
    a conversation the base writes the user's question, then its own answer. torch's global random state is left alone.
    """
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        sizes = [min(_BATCH, settings.sequences - start) for start in range(0, settings.sequences, _BATCH)]
        write = _conversations if is_chat(tokenizer, settings) else _texts
        return [text for size in track(sizes, "The base writes") for text in write(base, tokenizer, settings, size)]


def _texts(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: RehearsalSettings, count: int
) -> Iterator[Written]:
    start = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    for ids in _sample(base, tokenizer, settings, [start] * count):
        yield Written(ids)


def _conversations(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: RehearsalSettings, count: int
) -> Iterator[Written]:
    before, after = _around_question(tokenizer)
    room = settings.length - len(after)
    if room <= len(before) + 1:
        raise DataError(f"rehearsal.length is {settings.length}, too short for the chat template alone. Raise it.")
    questions = _sample(base, tokenizer, settings, [before] * count, length=(room + len(before)) // 2, ends=after[:1])
    prompts = [[*_without_end(ids, tokenizer, after[:1]), *after] for ids in questions]
    for prompt, ids in zip(prompts, _sample(base, tokenizer, settings, prompts), strict=True):
        yield Written(ids, answer=len(prompt) if len(ids) > len(prompt) else None)


def _around_question(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The chat template's tokens before a user's first message, and those between it and the answer."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
    )
    before, mark, after = str(text).partition(_MARK)
    if not mark:
        raise UnsupportedModelError("The chat template leaves out the user's message. Set rehearsal.chat to 'off'.")
    return text_ids(tokenizer, before), text_ids(tokenizer, after)


def _sample(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: RehearsalSettings,
    prompts: Sequence[list[int]],
    length: int | None = None,
    ends: Sequence[int] = (),
) -> list[list[int]]:
    """Each prompt with what the base writes behind it, up to and with the end of text."""
    longest = max(len(prompt) for prompt in prompts)
    room = (length or settings.length) - longest
    if room < 1:
        return [list(prompt) for prompt in prompts]
    generation = _sampling(base, tokenizer, settings, room, ends)
    device = next(base.parameters()).device
    writer: Any = base
    with no_own_settings(base), torch.no_grad():
        output = writer.generate(
            input_ids=pad_rows(prompts, generation.pad_token_id, side="left").to(device),
            attention_mask=attention_mask_of(prompts, side="left").to(device),
            generation_config=generation,
        )
    stops = set(generation.eos_token_id)
    written = [_up_to_end(row, stops) for row in output[:, longest:].tolist()]
    return [[*prompt, *text] for prompt, text in zip(prompts, written, strict=True)]


def _sampling(
    base: Any, tokenizer: Any, settings: RehearsalSettings, room: int, ends: Sequence[int]
) -> GenerationConfig:
    config = greedy_settings(base, tokenizer, room)
    config.update(do_sample=True, temperature=settings.temperature, top_k=0, top_p=1.0)
    config.eos_token_id = sorted({*config.eos_token_id, *ends})
    return config


def _up_to_end(ids: list[int], stops: set[int]) -> list[int]:
    end = next((place for place, token in enumerate(ids) if token in stops), len(ids) - 1)
    return ids[: end + 1]


def _without_end(ids: list[int], tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> list[int]:
    return ids[:-1] if ids[-1] in {*ends, tokenizer.eos_token_id} else ids
