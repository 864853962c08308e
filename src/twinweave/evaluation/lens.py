"""The lens: what a model writes for real prompts, and how much of each token came from the original memory.

Knows nothing about how it is shown.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from ..data import encode_prompt
from ..imsm import IMSMModel
from ..slim import SlimModel
from ..slim.router import watch_identity
from .generate import greedy_settings, no_own_settings
from .rows import read_examples
from .runner import task_window
from .tasks import Task

_MOST_TOKENS = 48
_UNFINISHED = "\ufffd"  # what decoders put where the bytes of a character are not all there


def has_lens(model: Any) -> bool:
    """Whether the model decides token by token between two memories: IMSM, and SLIM."""
    return isinstance(model, IMSMModel) or isinstance(getattr(model, "base_model", None), SlimModel)


def read_lens(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], prompts: int
) -> list[dict[str, Any]]:
    """About `prompts` prompts, spread over the tasks that have any, each with the greedy answer token by token.

    An entry: task, prompt, reference, and tokens: {"text", "original_share"}, the share of the original memory at the
    position that wrote the token (see `original_shares`).
    """
    usable = [task for task in tasks if task.kind in ("generation", "completion_loss")]
    entries = []
    for i in range(prompts if usable else 0):
        task = usable[i % len(usable)]
        entry = _read_one(model, tokenizer, task, row=i // len(usable))
        if entry is not None:
            entries.append(entry)
    return entries


def _read_one(model: PeftModel, tokenizer: PreTrainedTokenizerBase, task: Task, row: int) -> dict[str, Any] | None:
    examples = [e.with_documents_in_prompt() for e in read_examples(task.model_copy(update={"limit": row + 1}))]
    if len(examples) <= row:
        return None
    example = examples[row]
    prompt = list(example.messages[:-1]) if example.messages else example.prompt
    new_tokens = min(task.max_new_tokens, _MOST_TOKENS)
    room = task_window(model, task) - new_tokens
    if room < 2:
        return None
    prompt_ids, _ = encode_prompt(prompt, tokenizer, max_length=room, where=example.where)
    ids, shares = original_shares(model, tokenizer, prompt_ids, max_new_tokens=new_tokens)
    texts = token_texts(tokenizer, ids)
    return {
        "task": task.name,
        "prompt": prompt if isinstance(prompt, str) else str(prompt[-1]["content"]),
        "reference": example.references[0] if example.references else "",
        "tokens": [{"text": text, "original_share": share} for text, share in zip(texts, shares, strict=True)],
    }


@torch.inference_mode()
def original_shares(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], max_new_tokens: int
) -> tuple[list[int], list[float]]:
    """The greedy answer's token ids, and for each the share of the original memory where it was written: of IMSM the
    gate's mean over channels, of SLIM the share of its identity experts, over all routers."""
    device = next(model.parameters()).device
    prompt = torch.tensor([prompt_ids], device=device)
    settings = greedy_settings(model, tokenizer, max_new_tokens)
    with no_own_settings(model):
        whole = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    written = slice(len(prompt_ids) - 1, whole.shape[1] - 1)
    if isinstance(model, IMSMModel):
        query = torch.zeros_like(whole)
        query[:, : len(prompt_ids)] = 1
        shares = model(input_ids=whole, query_mask=query, output_gate=True).gate[0, written].mean(-1)  # of [1, T, d]
    else:
        with watch_identity(model) as seen:
            model(input_ids=whole)
        # a router within one expert of a base that is a mixture itself does not see every token
        shares = torch.stack([share for share in seen if len(share) == whole.shape[1]]).mean(0)[written]
    return whole[0, len(prompt_ids) :].tolist(), [round(share, 4) for share in shares.tolist()]


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Each token's own piece of the decoded text, spaces included; special tokens by their name.

    Where one character is spread over several tokens, the last of them gets it.
    """
    texts: list[str] = []
    before = ""
    for end in range(1, len(ids) + 1):
        now = str(tokenizer.decode(ids[:end]))
        if end < len(ids):
            now = now.rstrip(_UNFINISHED)
        if not now.startswith(before):  # the tokenizer writes the same tokens differently before this one
            texts.append(str(tokenizer.decode(ids[end - 1 : end])))
            before = str(tokenizer.decode(ids[:end]))
            continue
        texts.append(now[len(before) :])
        before = now
    return texts
