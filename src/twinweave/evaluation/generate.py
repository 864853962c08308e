"""Greedy answers to many prompts: batched, cached, sorted by length. Knows nothing about tasks or metrics."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from twinweave.data.collator import attention_mask_of, pad_rows
from twinweave.evaluation.contexts import Contexts
from twinweave.evaluation.likelihood import Tokens, batches_by_length


class _StopTexts(StoppingCriteria):
    """Ends a row once one of the texts is in its answer; the prompt is not looked at."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], prompt_length: int) -> None:
        self.tokenizer, self.stop, self.prompt_length = tokenizer, stop, prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :], skip_special_tokens=True)
        ended = [any(stop in text for stop in self.stop) for text in texts]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)


def generate_texts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tokens],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_size: int = 16,
    progress: bool = False,
    description: str = "Generating",
    contexts: Contexts | None = None,
) -> list[str]:
    """The model's greedy answer to each prompt, cut before the first of the `stop` texts, without outer white space.

    Args:
        model: any causal language model of transformers, adapted or not; should be in evaluation mode.
        tokenizer: must have a padding token.
        prompts: token ids.
        max_new_tokens: the longest answer in tokens.
        stop: texts that end an answer.
        batch_size: prompts per pass.
        progress: show a bar called `description`.
        description: see `progress`.
        contexts: what the prompts are answered from, for a model that reads.
    """
    device = next(model.parameters()).device
    settings = greedy_settings(model, tokenizer, max_new_tokens)
    answers = [""] * len(prompts)
    lengths = [len(prompt) for prompt in prompts]
    for batch in batches_by_length(lengths, batch_size, description, progress, contexts):
        ids = [prompts[index] for index in batch]
        input_ids = pad_rows(ids, settings.pad_token_id, side="left").to(device)
        length = input_ids.shape[1]
        criteria = [_StopTexts(tokenizer, stop, length)] if stop else []
        with nullcontext() if contexts is None else contexts.adapted(batch), no_own_settings(model):
            output = model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask_of(ids, side="left").to(device),
                generation_config=settings,
                stopping_criteria=StoppingCriteriaList(criteria),
            )
        texts = tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
        for index, text in zip(batch, texts, strict=True):
            answers[index] = _cut(text, stop).strip()
    return answers


def greedy_settings(model: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    """Greedy and cached, ending at any of the model's and the tokenizer's ends of text."""
    # Chat models name several ends of text in their own settings, and those count.
    own_ends = model.generation_config.eos_token_id
    ends = own_ends if isinstance(own_ends, list) else [own_ends]
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted({end for end in (*ends, tokenizer.eos_token_id) if end is not None}),
    )


@contextmanager
def no_own_settings(model: torch.nn.Module) -> Iterator[None]:
    """Hide what the model's file says about sampling, beams and penalties; `generate` would mix it into ours."""
    holders: list[Any] = [module for module in model.modules() if "generation_config" in vars(module)]
    kept = [module.generation_config for module in holders]
    try:
        for module in holders:
            module.generation_config = GenerationConfig()
        yield
    finally:
        for module, own in zip(holders, kept, strict=True):
            module.generation_config = own


def _cut(text: str, stop: Sequence[str]) -> str:
    return text[: min((text.index(mark) for mark in stop if mark in text), default=len(text))]
