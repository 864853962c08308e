"""The systems side by side in one process, and one decode or prefill of each. Knows nothing about statistics."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from twinweave import GuardSettings, fit_guard
from twinweave.imsm import DomainGuard

from .measure import Pairs
from .published_loop import PublishedIMSM, published_copy
from .shapes import build_base, imsm_model, plain_model, sharing_weights

PLANS = ("stacked", "two_pass", "auto")
SYSTEMS = ("plain", *PLANS)
WITH_GUARD = (*SYSTEMS, "guarded")
PAIRS: Pairs = (
    *((name, "plain") for name in PLANS),
    ("auto", "two_pass"),
    ("published", "auto"),
    ("guarded", "auto"),
)


@dataclass
class Systems:
    """Plain PEFT and IMSM on the very same base tensors; the published loop's second copy has its own.
    `guard` is IMSM's, where it answers as "guarded"."""

    plain: Any  # peft.PeftModel
    imsm: Any  # twinweave.IMSMModel
    published: PublishedIMSM | None = None
    guard: DomainGuard | None = None

    def model(self, system: str) -> Any:
        """What answers as `system`; IMSM runs the plan of that name from now on."""
        if system == "plain":
            return self.plain
        self.imsm.plan = "auto" if system == "guarded" else system
        self.imsm.guard = self.guard if system == "guarded" else None
        return self.imsm


@lru_cache(maxsize=1)
def build(
    shape: str, device: str, dtype: str, seed: int, adapters: str, published: bool = False, guarded: bool = False
) -> Systems:
    """The systems of one shape; the last ones built are kept."""
    base = build_base(shape, device, dtype, seed)
    frozen: PreTrainedModel | None = sharing_weights(base) if published else None
    plain, imsm = plain_model(sharing_weights(base), adapters, seed), imsm_model(base, adapters, seed)
    second = published_copy(frozen, plain, imsm) if frozen is not None else None
    return Systems(plain, imsm, second, random_guard(imsm, seed) if guarded else None)


def random_guard(imsm: Any, seed: int) -> DomainGuard:
    """A guard as recipes have it, fitted on short random rows: longer ones are in its domain, being more average."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = imsm.get_base_model().config.vocab_size

    def batch(rows: int) -> dict[str, Tensor]:
        ids = torch.randint(3, vocabulary, (rows, 9), generator=generator).to(imsm.device)
        return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(9, device=ids.device) < 8, -100)}

    guard = fit_guard(imsm, [batch(128)], [batch(100)], GuardSettings(directions=128, clusters=4))
    imsm.guard = None
    return guard


def build_for(args: argparse.Namespace, adapters: str, published: bool = False, guarded: bool = False) -> Systems:
    """The systems that the flags ask for."""
    return build(args.shape, args.device, args.dtype, args.seed, adapters, published, guarded)


def new_cache(model: Any, length: int, static: bool) -> Any:
    """An empty cache for `length` tokens."""
    config = model.get_base_model().config
    return StaticCache(config=config, max_cache_len=length) if static else DynamicCache(config=config)


@torch.no_grad()
def prefill(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Read `ids` [B, T] into the cache: the next token of each row, [B, 1]."""
    output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.logits[:, -1:].argmax(-1)


@torch.no_grad()
def greedy(step: Callable[..., Any], last: Tensor, cache: Any, new_tokens: int) -> Tensor:
    """A plain greedy loop over `new_tokens` single-token calls: [B, new_tokens]."""
    tokens = []
    for _ in range(new_tokens):
        output = step(input_ids=last, past_key_values=cache, use_cache=True, logits_to_keep=1)
        last = output.logits[:, -1:].argmax(-1)
        tokens.append(last)
    return torch.cat(tokens, dim=1)


def generate(model: Any, ids: Tensor, new_tokens: int, static: bool = False) -> Tensor:
    """`model.generate`, greedy: [B, T + new_tokens]."""
    mask = torch.ones_like(ids)
    more = {"cache_implementation": "static"} if static else {}
    return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, **more)
