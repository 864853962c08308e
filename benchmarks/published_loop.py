"""The decoding loop that the paper's released code is described to run, in our own plain writing.

Two whole copies of the model, one frozen and one tuned; no key-value cache, so that each new token runs both copies on
everything before it; one row at a time, greedy; the gate reads the concatenation [q; h; h'; q']. It exists to be
compared with. Where the description leaves room it takes the cheaper reading: the gate and the head see the last
position only, and no logits are made for the others.
"""

import copy
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import PreTrainedModel

from twinweave import IMSMModel


@dataclass
class PublishedIMSM:
    """Two models with weights of their own, and the gate: w_a [4·d, r], w_b [r, d]."""

    frozen: PreTrainedModel
    tuned: PreTrainedModel
    w_a: Tensor
    w_b: Tensor


def published_copy(frozen: PreTrainedModel, plain: peft.PeftModel, imsm: IMSMModel) -> PublishedIMSM:
    """The same two memories as `imsm`. `frozen` is used as it is; the tuned copy gets weights of its own."""
    tuned: Any = copy.deepcopy(plain).get_base_model()
    return PublishedIMSM(frozen, tuned, imsm.gate.w_a.detach().clone(), imsm.gate.w_b.detach().clone())


@torch.no_grad()
def published_generate(model: PublishedIMSM, prompt: Tensor, new_tokens: int) -> Tensor:
    """Greedy continuation of `prompt` [1, T] by `new_tokens` tokens: [1, T + new_tokens]."""
    ids, query_length = prompt, prompt.shape[1]
    for _ in range(new_tokens):
        h = model.frozen.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state.float()  # [1, t, d]
        h_tuned = model.tuned.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state.float()
        q, q_tuned = h[:, :query_length].mean(1), h_tuned[:, :query_length].mean(1)  # [1, d]
        u = torch.cat((q, h[:, -1], h_tuned[:, -1], q_tuned), dim=-1)  # [1, 4d]
        g = torch.sigmoid(u @ model.w_a @ model.w_b)
        z = g * h[:, -1] + (1 - g) * h_tuned[:, -1]
        logits = model.frozen.get_output_embeddings()(z.to(model.frozen.dtype))
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), dim=1)
    return ids
