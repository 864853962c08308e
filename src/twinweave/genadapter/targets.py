"""Which linear layers of a base are adapted, in which block each stands, and where a block is given its states. Knows
nothing about what is done to them.

What a model calls, with what and in which order, only a pass shows: one over a few tokens is run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig, LoraModel
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..blocks import BESIDE, blocks_of, feed_forward_layers, hidden_size_of, linear_sizes, mixes_tokens
from ..decoder import decoder_of
from ..errors import UnsupportedModelError

_ROWS, _TOKENS = 5, 7  # of the probe: numbers that no other dimension of a model is likely to have


@dataclass(frozen=True)
class Source:
    """Which argument of a block is the states it works on, and which dimension of theirs (if any) counts streams that
    pass through the model side by side."""

    argument: int | str
    streams: int | None = None

    def states(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The states [B, T, d], of several streams their mean."""
        given: Tensor = args[self.argument] if isinstance(self.argument, int) else kwargs[self.argument]
        return given if self.streams is None else given.mean(self.streams)


@dataclass(frozen=True)
class Target:
    """A linear layer, by its name within the base, in a block that works on states of size `hidden_size`.

    `by_row`: its inputs were seen to be those of whole rows in turn, so that rows can be adapted each by itself.
    """

    name: str
    module: nn.Module
    block: nn.Module
    source: Source
    hidden_size: int
    in_features: int
    out_features: int
    by_row: bool


def find_targets(base: PreTrainedModel, target_modules: list[str] | str | None) -> list[Target]:
    """The layers to adapt, in the order in which the base calls them; None: the last of each block's token mixer.

    Raises UnsupportedModelError where there is none, where PEFT has no LoRA for one, or where the base cannot be run on
    a few tokens.
    """
    blocks = list(dict.fromkeys(b for b in blocks_of(decoder_of(base) or base) if linear_sizes(b) is None))
    calls = _calls(base, blocks)
    if target_modules is None:
        chosen = _last_of_mixers(base, calls)
    else:
        wanted = LoraConfig(target_modules=target_modules)
        chosen = [call for call in calls if check_target_module_exists(wanted, call.name)]
    if not chosen:
        kinds = sorted({call.name.rsplit(".", 1)[-1] for call in calls})
        if not kinds:
            raise UnsupportedModelError(
                f"{type(base).__name__} has no blocks that are given states [rows, tokens, size], so what it reads "
                "cannot be told apart by token. Take another base."
            )
        asked = "has no output projection of an attention" if target_modules is None else f"has no {target_modules}"
        raise UnsupportedModelError(
            f"{type(base).__name__} {asked} in its blocks. Name others in target_modules; called are "
            f"{', '.join(kinds)}."
        )
    for call in chosen:
        if reason := _refused_by_peft(base, call.name):
            raise UnsupportedModelError(f"{call.name} of {type(base).__name__} cannot be adapted: {reason}")
    return chosen


def in_rows(shape: torch.Size, rows: int, tokens: int) -> bool:
    """Whether inputs [..., in] of this shape are those of whole rows in turn: [B, ..., in], or flattened [B·T, in]."""
    return shape[0] == rows if len(shape) > 2 else shape[0] == rows * tokens


def _source(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Source | None:
    """Where a block that is called with the probe's rows and tokens is given its states."""
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for key, value in given:
        if isinstance(value, Tensor) and value.is_floating_point():
            if value.ndim == 3 and value.shape[:2] == (_ROWS, _TOKENS):
                return Source(key)
            if value.ndim == 4 and value.shape[:2] == (_ROWS, _TOKENS):
                return Source(key, streams=2)
            if value.ndim == 4 and value.shape[1:3] == (_ROWS, _TOKENS):
                return Source(key, streams=0)
    return None


def _calls(base: PreTrainedModel, blocks: list[nn.Module]) -> list[Target]:
    """Every linear layer within a block, in the order of the first calls."""
    names = {module: name for name, module in base.named_modules()}
    sources: dict[nn.Module, tuple[Source, int]] = {}
    called: dict[nn.Module, Target] = {}

    def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (source := _source(args, kwargs)) is not None:
            sources[block] = source, source.states(args, kwargs).shape[-1]

    def leave(block: nn.Module, sizes: tuple[int, int]) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if block in sources and layer not in called and isinstance(output, Tensor):
                by_row = in_rows(args[0].shape, _ROWS, _TOKENS)
                called[layer] = Target(names[layer], layer, block, *sources[block], *sizes, by_row)

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
            token = min(5, base.config.get_text_config().vocab_size - 1)
            ids = torch.full((_ROWS, _TOKENS), token, device=base.device)
            base(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except Exception as error:  # whatever a model, its kernels or its device may raise
        raise UnsupportedModelError(
            f"{type(base).__name__} cannot be run on a few tokens ({' '.join(repr(error).split()):.200}), so the "
            "layers that it calls are not known. Load it so that it runs, on the device that it needs."
        ) from error
    finally:
        for module in training:
            module.training = True
        for handle in handles:
            handle.remove()
    return list(called.values())


def _last_of_mixers(base: PreTrainedModel, calls: list[Target]) -> list[Target]:
    """Of each block, what is called last of the layers that lead to the block's or the model's width and are no
    feed-forward's; where PEFT adapts none of these, of those that are given this width."""
    names = {module: name for name, module in base.named_modules()}
    out: dict[nn.Module, Target] = {}
    into: dict[nn.Module, Target] = {}
    for call in _of_mixers(base, calls, names):
        if call.by_row and not _refused_by_peft(base, call.name):
            widths = (call.hidden_size, hidden_size_of(base))
            if call.out_features in widths:
                out[call.block] = call
            if call.in_features in widths:
                into[call.block] = call
    found = into | out
    return [found[block] for block in dict.fromkeys(call.block for call in calls) if block in found]


def _of_mixers(base: PreTrainedModel, calls: list[Target], names: dict[nn.Module, str]) -> list[Target]:
    """The calls without those of feed-forwards and of what stands beside feed-forward and mixer."""
    try:
        layers = feed_forward_layers(base)
    except UnsupportedModelError:  # state-space models have mixers alone
        layers = []
    blocks = {names[call.block] for call in calls}
    # a feed-forward is all of the module its layers stand in, unless that is the block
    apart = {name if (over := name.rpartition(".")[0]) in blocks else over for name in layers}

    def in_mixer(call: Target) -> bool:
        parts = call.name[len(names[call.block]) + 1 :].split(".")
        prefixes = [".".join((names[call.block], *parts[: i + 1])) for i in range(len(parts))]
        if not apart.isdisjoint(prefixes):
            return False
        beside = [prefix for prefix, part in zip(prefixes, parts, strict=True) if BESIDE.search(part)]
        return all(any(mixes_tokens(m) for m in base.get_submodule(prefix).modules()) for prefix in beside)

    return [call for call in calls if in_mixer(call)]


def _refused_by_peft(base: PreTrainedModel, name: str) -> str | None:
    """Why PEFT has no LoRA for this layer, which some kernels read past its call; None if it has."""
    try:
        cast(Any, LoraModel)._check_target_module_compatiblity(None, LoraConfig(), base, name.rsplit(".", 1)[-1])
    except ValueError as error:
        return str(error)
    return None
