"""The blocks of a causal language model, their feed-forward layers, and the sizes of linear layers. Knows nothing about
what is done with them.

A feed-forward stands in a block and sees every token by itself, so nothing on the way to it takes a mask, positions or
a cache. Its linear layers lead from the hidden size to an inner one and back.
"""

import inspect
import re
from collections.abc import Iterator
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .decoder import decoder_of
from .errors import UnsupportedModelError

_OF_OTHER_TOKENS = re.compile(r"mask|position|past|cache")  # arguments of what mixes tokens
# Parts of a block that are neither feed-forward nor mixer, by the names they go by in transformers.
BESIDE = re.compile(r"router|norm|laurel|per_layer|adapter|hyper_connection")


def feed_forward_layers(model: Any) -> list[str]:
    """Names of the linear layers of all feed-forwards in the model's blocks. Where a block has none, since its mixture
    of experts keeps them in one tensor, that of the whole mixture.

    Raises UnsupportedModelError where there is neither.
    """
    decoder = decoder_of(model) if isinstance(model, PreTrainedModel) else None
    names = {module: name for name, module in model.named_modules()}
    found: list[nn.Module] = []
    for block in blocks_of(model if decoder is None else decoder):
        parts = list(_parts(block))
        found += _pairs([part for part in parts if linear_sizes(part)]) or [part for part in parts if is_mixture(part)]
    if not found:
        others = sorted({name.rsplit(".", 1)[-1] for module, name in names.items() if linear_sizes(module)})
        raise UnsupportedModelError(
            f"{type(model).__name__} has no feed-forward. Name other layers in target_modules; its linear layers are "
            f"called {', '.join(others)}."
        )
    return [names[module] for module in dict.fromkeys(found)]


def is_mixture(module: nn.Module) -> bool:
    """Whether it is a mixture of experts, from router to weighted sum, by the name of the class of the experts."""
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    return any("Experts" in type(child).__name__ for child in module.children())


def hidden_size_of(model: Any) -> int | None:
    """The size of what passes from block to block, if the model's config says it."""
    config = getattr(model, "config", None)
    config = config.get_text_config(decoder=True) if isinstance(config, PretrainedConfig) else config
    return getattr(config, "hidden_size", None)


def linear_sizes(layer: nn.Module) -> tuple[int, int] | None:
    """Input and output size of a linear layer, or of one that PEFT has wrapped; None for any other module."""
    if isinstance(layer, BaseTunerLayer):
        layer = layer.get_base_layer()
    if isinstance(layer, Conv1D):
        return cast(int, layer.nx), cast(int, layer.nf)
    sizes = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return cast(tuple[int, int], sizes) if all(isinstance(size, int) for size in sizes) else None


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """What the outermost lists of modules hold, but for the towers of other modalities."""
    if isinstance(module, nn.ModuleList):
        yield from (block for block in module if not type(block).__name__.endswith("Attention"))
    elif not isinstance(module, PreTrainedModel) or "text" in module.input_modalities:
        for child in module.children():
            yield from blocks_of(child)


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """Everything in a block that sees every token by itself."""
    for name, child in module.named_children():
        if not BESIDE.search(name) and not mixes_tokens(child):
            yield child
            if linear_sizes(child) is None and not isinstance(child, BaseTunerLayer):
                yield from _parts(child)


def mixes_tokens(module: nn.Module) -> bool:
    """Whether it sees other tokens than the one it works on, by its class's name or its arguments."""
    kind = type(module).__name__
    if kind.endswith("DecoderLayer"):
        return False  # a block in a block
    arguments = inspect.signature(module.forward).parameters
    return kind.endswith("Attention") or any(_OF_OTHER_TOKENS.search(name) for name in arguments)


def _pairs(layers: list[nn.Module]) -> list[nn.Module]:
    """The layers that lead to an inner size, once or twice in one (gate and value), and those that lead back."""
    sizes = [cast(tuple[int, int], linear_sizes(layer)) for layer in layers]
    back = {
        (inner, outer) for inner, outer in sizes for n in (inner, 2 * inner) if inner != outer and (outer, n) in sizes
    }
    there = {(outer, n) for inner, outer in back for n in (inner, 2 * inner)}
    return [layer for layer, size in zip(layers, sizes, strict=True) if size in there | back]
