"""Which linear layers of a base are adapted, and in which block each stands. Knows nothing about what is done to them.

What a model calls, and in which order, only a pass shows: one over two tokens is run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..blocks import BESIDE, blocks_of, feed_forward_layers, linear_sizes
from ..decoder import decoder_of
from ..errors import UnsupportedModelError


@dataclass(frozen=True)
class Target:
    """A linear layer, by its name within the base, in a block whose input has size `hidden_size`."""

    name: str
    module: nn.Module
    block: nn.Module
    hidden_size: int
    in_features: int
    out_features: int


def find_targets(base: PreTrainedModel, target_modules: list[str] | str | None) -> list[Target]:
    """The layers to adapt, in the order in which the base calls them; None: the last of each block's token mixer.

    Raises UnsupportedModelError where there is none, or the base cannot be run on two tokens.
    """
    blocks = list(dict.fromkeys(blocks_of(decoder_of(base) or base)))
    calls = _calls(base, blocks)
    if target_modules is None:
        chosen = _last_of_mixers(base, calls)
    else:
        wanted = LoraConfig(target_modules=target_modules)
        chosen = [call for call in calls if check_target_module_exists(wanted, call.name)]
    if not chosen:
        kinds = sorted({call.name.rsplit(".", 1)[-1] for call in calls})
        asked = "has no output projection of an attention" if target_modules is None else f"has no {target_modules}"
        raise UnsupportedModelError(
            f"{type(base).__name__} {asked} in its blocks. Name others in target_modules; called are "
            f"{', '.join(kinds) or 'none'}."
        )
    return chosen


def first_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """What a block is given to work on: the first of its inputs that is a tensor of states [B, T, d]."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point():
            return value
    return None


def _calls(base: PreTrainedModel, blocks: list[nn.Module]) -> list[Target]:
    """Every linear layer within a block, in the order of the first calls."""
    names = {module: name for name, module in base.named_modules()}
    widths: dict[nn.Module, int] = {}
    called: dict[nn.Module, Target] = {}

    def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (states := first_states(args, kwargs)) is not None:
            widths[block] = states.shape[-1]

    def leave(block: nn.Module, sizes: tuple[int, int]) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if block in widths and layer not in called and isinstance(output, Tensor):
                called[layer] = Target(names[layer], layer, block, widths[block], *sizes)

        return hook

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    for block in blocks:
        for layer in block.modules():
            if (sizes := linear_sizes(layer)) is not None:
                handles.append(layer.register_forward_hook(leave(block, sizes)))
    training = [module for module in base.modules() if module.training]
    try:
        with torch.no_grad():
            base.eval()
            ids = torch.full((1, 2), min(5, base.config.get_text_config().vocab_size - 1), device=base.device)
            base(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        for module in training:
            module.training = True
        for handle in handles:
            handle.remove()
    return list(called.values())


def _last_of_mixers(base: PreTrainedModel, calls: list[Target]) -> list[Target]:
    """Of each block, what is called last of the layers that lead to the block's width and are no feed-forward's."""
    try:
        feed_forward = [name + "." for name in feed_forward_layers(base)]
    except UnsupportedModelError:  # state-space models have mixers alone
        feed_forward = []
    last: dict[nn.Module, Target] = {}
    for call in calls:
        inside = any(f"{call.name}.".startswith(name) for name in feed_forward)
        if call.out_features == call.hidden_size and not inside and not BESIDE.search(call.name):
            last[call.block] = call
    return list(last.values())
