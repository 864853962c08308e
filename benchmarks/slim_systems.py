"""SLIM, LoRA with as many parameters and SLIM written literally, on the very same base weights, ready to be measured.

Knows nothing about time. The weights are random, and so is the text; what SLIM does depends on both, so it is brought
into the state of one in training: B is not zero, the clusters have seen text, and the routers have a preference.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import peft
import torch
from torch import Tensor, nn

from twinweave.slim import SlimConfig, get_slim_model
from twinweave.slim.router import Router

from .literal_slim import literal_copy
from .shapes import build_base, sharing_weights

LAYERS = ["gate_proj", "up_proj", "down_proj"]
_WARM_UP = 8  # batches that the clusters have seen


@dataclass
class SlimSystems:
    """The base alone, LoRA, SLIM, and SLIM written literally, which shares SLIM's weights."""

    base: Any  # PreTrainedModel
    lora: Any  # peft.PeftModel
    slim: Any  # peft.PeftModel
    literal: Any  # PreTrainedModel

    def model(self, system: str) -> Any:
        """What answers as `system`."""
        return {"base": self.base, "lora": self.lora, "slim": self.slim, "slim_literal": self.literal}[system]


@lru_cache(maxsize=1)
def build_slim(shape: str, device: str, dtype: str, seed: int, yielding: float = 0.0) -> SlimSystems:
    """The systems of one shape; the last ones built are kept.

    `yielding`: γ. With 0 distances are computed all the same, but send no token away from the LoRA experts.
    """
    base = build_base(shape, device, dtype, seed)
    config = SlimConfig()
    rank = config.num_experts * config.r
    lora_config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=LAYERS, task_type="CAUSAL_LM")
    lora: Any = peft.get_peft_model(sharing_weights(base), lora_config)
    slim = get_slim_model(sharing_weights(base), config)
    literal = literal_copy(slim, sharing_weights(base))
    torch.manual_seed(seed)
    for model in (lora, slim):
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "slim_B" in name:
                nn.init.normal_(parameter, std=0.02)
    _settle(slim, base.config.vocab_size)
    for router in routers(slim):
        router.strength = yielding
    return SlimSystems(base, lora, slim, literal)


def routers(model: Any) -> list[Router]:
    """All routers of a model."""
    return [module for module in model.modules() if isinstance(module, Router)]


@torch.no_grad()
def _settle(slim: Any, vocabulary: int) -> None:
    """Let the routers' logits spread by one, which is what training makes of them, and the clusters see text."""

    def spread(router: Router, given: tuple[Tensor, ...]) -> None:
        router.weight.div_((given[0].float() @ router.weight.float().T).std())

    batches = torch.randint(3, vocabulary, (_WARM_UP, 4, 64))
    hooks = [router.register_forward_pre_hook(spread) for router in routers(slim)]
    slim.eval()(input_ids=batches[0].to(slim.device), use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    slim.train()
    for batch in batches:
        slim(input_ids=batch.to(slim.device), use_cache=False, logits_to_keep=1)
    slim.eval()


@dataclass
class Routed:
    """What routers did with all tokens of all layers that went through them, as shares between 0 and 1."""

    to_identity: float  # mean weight of the identity experts
    only_identity: float  # of the tokens: those whose experts are all identities
    skipped: float  # of the routers' calls: those in which all tokens are such


@contextmanager
def routed(model: Any) -> Iterator[list[Tensor]]:
    """Gathers the LoRA experts' weight of each token, one [N] for each call of a router: `summary` takes them."""
    found: list[Tensor] = []
    hooks = [
        router.register_forward_hook(lambda module, given, shares: found.append(shares.detach().sum(-1)))
        for router in routers(model)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def summary(found: list[Tensor]) -> Routed:
    """What was gathered in `routed`."""
    weights = torch.cat(found)
    skipped = torch.stack([(calls == 0).all() for calls in found])
    return Routed(*(part.float().mean().item() for part in (1 - weights, weights == 0, skipped)))
