"""Trying out, on a few tokens, whether a cheaper way of running both memories gives what two plain passes give.

Knows nothing about what the cheaper way is. What a model does between its layers cannot be read off its modules, and a
wrong answer is the worst that could happen, so it is tried once for each model and adapter.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .adapters import adapters_off, dropout_off
from .cache import cache_name

logger = logging.getLogger(__name__)


@torch.compiler.disable
def same_memories(
    decoder: Any, layers: list[nn.Module], run: Callable[[dict[str, Any]], tuple[Tensor, Tensor] | None]
) -> bool:
    """Whether `run` (the decoder's inputs -> both memories, [B, T, d] each) gives what two plain passes give.

    Tried with a prompt, of which one row is padded, and a token behind it, unless `run` gives None there: it has no
    cache to go on from. The adapter may not have learned anything yet, so every adapted layer's output is doubled for
    the trial: rows that take a wrong turn then show.
    """
    device = next(decoder.parameters()).device
    prompt = torch.tensor([[1, 2, 3], [3, 1, 2]], device=device)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]], device=device)
    marks = [layer.register_forward_hook(_twice_if_on, prepend=True) for layer in layers]
    try:
        with torch.no_grad(), dropout_off(decoder):
            name, caches = cache_name(decoder), [DynamicCache(config=decoder.config) for _ in range(3)]
            for ids, attended in ((prompt, mask[:, :3]), (prompt[:, -1:], mask)):
                inputs = {"input_ids": ids, "attention_mask": attended, "use_cache": True}
                found = run(inputs | {name: caches[2]})
                if found is None:
                    return True
                enhanced = decoder.forward(**inputs, **{name: caches[0]})[0]
                with adapters_off(layers):
                    original = decoder.forward(**inputs, **{name: caches[1]})[0]
                if not _agree(found, (original, enhanced), attended):
                    return False
        return True
    except Exception as error:  # whatever a model does that we did not foresee
        logger.info("%s is run in two plain passes: %s", type(decoder).__name__, error)
        return False
    finally:
        for mark in marks:
            mark.remove()


def _twice_if_on(layer: Any, args: tuple[Any, ...], output: Any) -> Any:
    return output if layer.disable_adapters else output * 2


def _agree(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], attended: Tensor) -> bool:
    """Whether each memory is found much nearer to itself than the two are to each other."""
    kept = attended[:, -found[0].shape[1] :].bool()
    pairs = [(f[kept].float(), e[kept].float()) for f, e in zip(found, expected, strict=True)]
    apart = (pairs[0][1] - pairs[1][1]).norm()
    return all(bool((f - e).norm() <= 0.1 * apart) for f, e in pairs)
