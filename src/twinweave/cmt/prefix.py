"""The alignment: M* as keys and values that every layer of the base finds in its cache.

Knows nothing about how M* comes about.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from ..errors import UnsupportedModelError, UsageError

KeyValue = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LayerShape:
    """Keys [B, heads, T, key_size] and values [B, heads, T, value_size] of a layer's cache, and their deviations."""

    heads: int
    key_size: int
    value_size: int
    key_scale: float
    value_scale: float


@torch.no_grad()
def shapes_of(base: PreTrainedModel) -> list[LayerShape]:
    """What each layer keeps in its cache, found by running the base on a few tokens.

    Raises UnsupportedModelError for a base without keys and values in every layer.
    """
    table: Any = base.get_input_embeddings()
    ids = torch.arange(16, device=base.device).clamp(max=len(table.weight) - 1)[None]
    cache = DynamicCache(config=base.config)
    base(input_ids=ids, past_key_values=cache, use_cache=True)
    shapes = []
    for index, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.ndim != 4 or keys.shape[2] < 1:
            raise UnsupportedModelError(
                f"Layer {index} of {type(base).__name__} keeps no keys and values, so no memory can be put in front of "
                "what it reads. Use a base with attention in every layer."
            )
        scales = (keys.float().std().item(), values.float().std().item())
        shapes.append(LayerShape(keys.shape[1], keys.shape[3], values.shape[3], *scales))
    return shapes


class Prefix(nn.Module):
    """pi: a map to `rank` numbers that all layers share, then one of each layer to its keys and values."""

    def __init__(self, hidden_size: int, rank: int, shapes: list[LayerShape]) -> None:
        super().__init__()
        self.shapes = shapes
        self.shared = nn.Linear(hidden_size, rank)
        self.layers = nn.ModuleList(_layer_map(rank, shape) for shape in shapes)

    def forward(self, memory: Tensor) -> list[KeyValue]:
        """memory [B, k, D] -> for each layer keys and values [B, heads, k, size]."""
        shared = torch.tanh(self.shared(memory))
        result = []
        for shape, layer in zip(self.shapes, self.layers, strict=True):
            key, value = layer(shared).split((shape.heads * shape.key_size, shape.heads * shape.value_size), dim=-1)
            parts = (part.unflatten(-1, (shape.heads, -1)).transpose(1, 2) for part in (key, value))
            result.append((next(parts), next(parts)))
        return result


def _layer_map(rank: int, shape: LayerShape) -> nn.Linear:
    """Starts with keys and values as large as the base's own, or the first steps only teach the prefix its size."""
    keys = shape.heads * shape.key_size
    made = nn.Linear(rank, keys + shape.heads * shape.value_size)
    with torch.no_grad():
        nn.init.normal_(made.weight, std=rank**-0.5)
        nn.init.zeros_(made.bias)
        made.weight[:keys] *= shape.key_scale
        made.weight[keys:] *= shape.value_scale
    return made


def fill(cache: Cache, prefix: list[KeyValue], dtype: torch.dtype, copies: int = 1) -> None:
    """Put a prefix into an empty cache, of whatever kind it is; each row `copies` times, neighbours in the batch."""
    for index, pair in enumerate(prefix):
        key, value = (part.to(dtype).repeat_interleave(copies, dim=0) for part in pair)
        cache.update(key, value, index)


def setting(base: PreTrainedModel, options: dict[str, Any], name: str) -> Any:
    """What `generate` goes by: its argument, or else what the caller's generation config says, or else the base's."""
    configs = (options.get("generation_config"), base.generation_config)
    values = (options.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in values if value is not None), None)


def take_cache(base: PreTrainedModel, options: dict[str, Any], length: int) -> Cache:
    """The empty cache that the options of `generate` ask for, which are taken out of them; a dynamic one by default.

    `length`: of prefix and prompt. Raises UsageError for one that is not empty, or of a kind that cannot be made.
    """
    kind, given = setting(base, options, "cache_implementation"), options.pop("past_key_values", None)
    if kind is not None:
        options["cache_implementation"] = None  # goes before that of a config; transformers refuses it beside a cache
    if setting(base, options, "use_cache") is False:
        raise UsageError("use_cache=False leaves no place for the memories, which are keys and values. Leave it out.")
    if given is not None:
        if given.get_seq_length():
            raise UsageError("past_key_values has tokens in it already. Pass an empty cache, or none.")
        return given
    config = base.config.get_text_config(decoder=True)
    if kind in (None, "dynamic", "dynamic_full", "offloaded", "hybrid"):  # "hybrid": of old configs, as transformers
        return DynamicCache(config=config, offloading=kind == "offloaded")
    if kind in ("static", "offloaded_static"):
        new = setting(base, options, "max_new_tokens") or setting(base, options, "max_length") or 20
        return StaticCache(config=config, max_cache_len=length + new, offloading=kind == "offloaded_static")
    raise UsageError(
        f"cache_implementation is {kind!r}. Use dynamic, static, offloaded or offloaded_static, or pass an empty cache "
        "of any kind as past_key_values."
    )
