"""Contrastive decoding: what the base says without memories, taken away from what it says with them, token by token."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel

from ..decoder import decoder_of
from .compressor import takes_positions
from .objective import contrasted


class ContrastWithoutMemory(LogitsProcessor):
    """(1 + alpha) l(y | M*, q) - alpha l(y | q), with a second pass of the base over the same tokens and a cache of its
    own. `ids`, `mask`: the prompts [B, T], padded in front, of which `generate` has `copies` each."""

    def __init__(self, base: PreTrainedModel, ids: Tensor, mask: Tensor, alpha: float, copies: int) -> None:
        self.base, self.alpha, self.seen = base, alpha, 0
        self.takes_positions = takes_positions(decoder_of(base) or base)
        self.mask = mask.repeat_interleave(copies, 0)
        self.cache = DynamicCache(config=base.config)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids [B, T] so far, scores [B, V]."""
        new = input_ids[:, self.seen :]
        missing = input_ids.shape[1] - self.mask.shape[1]
        self.mask = torch.cat((self.mask, self.mask.new_ones(len(self.mask), missing)), dim=1)
        given: dict[str, Any] = {"input_ids": new, "attention_mask": self.mask, "past_key_values": self.cache}
        if self.takes_positions:
            given["position_ids"] = (self.mask.long().cumsum(1) - 1).clamp(min=0)[:, self.seen :]
        self.seen = input_ids.shape[1]
        return contrasted(scores, self.base(**given, use_cache=True).logits[:, -1].to(scores.dtype), self.alpha)
