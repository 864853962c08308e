"""How likely a model finds given tokens: batched forward passes over right-padded rows.

Knows nothing about tasks, texts or metrics.
"""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from twinweave.cmt import MemoryModel
from twinweave.data.collator import IGNORED_LABEL, attention_mask_of, pad_rows
from twinweave.errors import TrainingError
from twinweave.evaluation.contexts import Contexts
from twinweave.imsm import IMSMModel
from twinweave.progress import track

Tokens = list[int]
LabelledRow = tuple[Tokens, Tokens]  # input ids and labels, equally long; -100 is not scored


def forward_logits(model: Any, input_ids: Tensor, attention_mask: Tensor, prompt_mask: Tensor | None = None) -> Tensor:
    """The model's logits [B, T, vocabulary] of a batch [B, T], without a cache.

    A model that looks at the question (IMSM's gate, CMT's search) is told which tokens are the prompt (`prompt_mask`,
    bool [B, T]), so that it never sees the continuation that is being judged.
    """
    told = prompt_mask is not None and isinstance(model, IMSMModel | MemoryModel)
    extra = {"query_mask": prompt_mask} if told else {}
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **extra).logits
    # Prompt-tuned models answer for their virtual tokens too, which stand before ours.
    return logits[:, -input_ids.shape[1] :]


def batches_by_length(
    lengths: Sequence[int], batch_size: int, description: str, progress: bool, contexts: Contexts | None = None
) -> Iterable[list[int]]:
    """The indexes of rows in batches of similar length, longest first, so that a lack of memory shows at once; with
    `contexts` in batches of neighbours that share theirs."""
    places = [0] * len(lengths) if contexts is None else contexts.places
    order = sorted(range(len(lengths)), key=lambda index: (places[index], -lengths[index]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return track(batches, description) if progress else batches


def log_likelihoods(
    model: Any,
    rows: Sequence[LabelledRow],
    pad_id: int,
    *,
    batch_size: int,
    with_prompt: bool,
    progress: bool = False,
    description: str = "Scoring",
    contexts: Contexts | None = None,
) -> list[Tensor]:
    """For each row the log-probabilities (nats, fp32, on the CPU) of its labelled tokens, in order.

    A token is predicted from the tokens before it, so a row's first token is never scored.

    Args:
        model: any causal language model of transformers, adapted or not; should be in evaluation mode.
        rows: input ids with labels.
        pad_id: what rows are filled up with.
        batch_size: rows per forward pass.
        with_prompt: the tokens before the first label are a prompt (see `forward_logits`).
        progress: show a bar called `description`.
        description: see `progress`.
        contexts: what the rows are answered from, for a model that reads.

    Raises:
        TrainingError: a log-probability is not a number.
    """
    device = next(model.parameters()).device
    results: list[Tensor] = [torch.empty(0)] * len(rows)
    for batch in batches_by_length([len(ids) for ids, _ in rows], batch_size, description, progress, contexts):
        ids = [rows[index][0] for index in batch]
        labels = pad_rows([rows[index][1] for index in batch], IGNORED_LABEL).to(device)
        mask = attention_mask_of(ids).to(device)
        # a memory model would take all of a text without a prompt for the question, and it says what is judged
        asks = with_prompt or isinstance(model, MemoryModel)
        prompt_mask = (labels != IGNORED_LABEL).cumsum(dim=1).eq(0) & mask.bool() if asks else None
        with nullcontext() if contexts is None else contexts.adapted(batch):
            logits = forward_logits(model, pad_rows(ids, pad_id).to(device), mask, prompt_mask)
        for row, index in enumerate(batch):
            scored = (labels[row, 1:] != IGNORED_LABEL).nonzero()[:, 0]  # positions whose next token is scored
            targets = labels[row, scored + 1]
            results[index] = -cross_entropy(logits[row, scored].float(), targets, reduction="none").cpu()
            if results[index].isnan().any():
                raise TrainingError(f"{description}: the model's output is not a number; its training has diverged.")
    return results
