"""Caches of a model's own kind, as RWKV, xLSTM, XLNet and Reformer have them instead of a transformers Cache.

Knows nothing about memories. Such a cache has room for one memory and cannot be told apart or copied by rule: a woven
run takes none and gives none, and `generate` has to run the whole rows at every step.
"""

import inspect
import logging
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.utils import ModelOutput

from ..errors import UsageError
from .adapters import dropout_off

logger = logging.getLogger(__name__)


@torch.no_grad()
def keeps_own_cache(decoder: nn.Module) -> bool:
    """Whether the decoder gives back a cache of its own kind; found out by running it on one token."""
    known = inspect.signature(decoder.forward).parameters
    if not any(name in known for name in ALL_CACHE_NAMES if name != "past_key_values"):
        return False
    token = torch.ones(1, 1, dtype=torch.long, device=next(decoder.parameters()).device)
    try:
        with dropout_off(decoder):
            output = decoder.forward(input_ids=token, use_cache=True)
    except Exception as error:  # whatever a model wants that we did not foresee
        logger.info("%s cannot be run on one token: %s", type(decoder).__name__, error)
        return False
    return any(_is_own(getattr(output, name, None)) for name in ALL_CACHE_NAMES)


def refuse_own_cache(decoder: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raise UsageError if a cache of the decoder's own kind is among the arguments of a run."""
    for name in ALL_CACHE_NAMES:
        if _is_own(kwargs.get(name)):
            raise UsageError(
                f"{type(decoder).__name__} keeps what it has read in a {type(kwargs[name]).__name__} ({name}) with "
                "room for one memory only. Leave it out and pass whole rows, or go on with use_memory('original') or "
                "use_memory('enhanced')."
            )


def without_own_cache(output: Any) -> Any:
    """The decoder's output without a cache of its own kind, in which the two runs of a woven one have met."""
    if not isinstance(output, ModelOutput) or not any(_is_own(output.get(name)) for name in ALL_CACHE_NAMES):
        return output
    return type(output)(**{k: v for k, v in output.items() if k not in ALL_CACHE_NAMES or not _is_own(v)})


def _is_own(cache: Any) -> bool:
    return cache is not None and not isinstance(cache, Cache)
