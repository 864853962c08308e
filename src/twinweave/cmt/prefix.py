"""The alignment: M* as keys and values that every layer of the base finds in its cache.

Knows nothing about how M* comes about. To the base the prefix is k tokens in front of the row: it leaves a sliding
window as they do, and padding between prefix and row takes up places in a window, as it does between tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..errors import UnsupportedModelError, UsageError

KeyValue = tuple[Tensor, Tensor]
_TOKENS = 16


@dataclass(frozen=True)
class LayerShape:
    """Keys [B, heads, T, key_size] and values [B, heads, T, value_size] in layer `index` of the cache, and their
    deviations."""

    index: int
    heads: int
    key_size: int
    value_size: int
    key_scale: float
    value_scale: float


@torch.no_grad()
def shapes_of(base: PreTrainedModel) -> list[LayerShape]:
    """What each layer with attention keeps in its cache, found by running the base on a few tokens. Layers with a state
    in the place of keys and values read the rows alone.

    Raises UnsupportedModelError for a base without keys and values, with more than one of each for a token, or one that
    cannot go on from them.
    """
    shapes = []
    for index, layer in enumerate(_filled(base).layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or not keys.numel():
            continue
        # others select or compress what they keep, by what is no key and no value
        known = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) or hasattr(layer, "conv_states")
        if not known or keys.ndim != 4 or keys.shape[2] > _TOKENS:
            raise UnsupportedModelError(
                f"Layer {index} of {type(base).__name__} keeps more than a key and a value for each token "
                f"({type(layer).__name__}), so no memory can be put in front of what it reads. Use a base with "
                "ordinary attention."
            )
        scales = (keys.float().std().item(), values.float().std().item())
        shapes.append(LayerShape(index, keys.shape[1], keys.shape[3], values.shape[3], *scales))
    if not shapes:
        raise UnsupportedModelError(
            f"{type(base).__name__} keeps no keys and values, so no memory can be put in front of what it reads. Use a "
            "base with attention."
        )
    return shapes


def _filled(base: PreTrainedModel) -> Cache:
    """The base's cache of a few tokens."""
    table: Any = base.get_input_embeddings()
    ids = torch.arange(_TOKENS, device=base.device).clamp(max=len(table.weight) - 1)[None]
    cache, other = (DynamicCache(config=base.config) for _ in range(2))
    try:
        base(input_ids=ids, past_key_values=cache, use_cache=True)
        for part in ids.split(_TOKENS // 2, dim=1):
            base(input_ids=part, past_key_values=other, use_cache=True)
    except Exception as error:  # whatever a base's own code says
        raise UnsupportedModelError(
            f"{type(base).__name__} does not go on from keys and values in a cache ({error!r}), so no memory can be "
            "put in front of what it reads."
        ) from error
    return cache


class Prefix(nn.Module):
    """pi: a map to `rank` numbers that all layers share, then one of each layer to its keys and values."""

    def __init__(self, hidden_size: int, rank: int, shapes: list[LayerShape]) -> None:
        super().__init__()
        self.shapes = shapes
        self.shared = nn.Linear(hidden_size, rank)
        self.layers = nn.ModuleList(_layer_map(rank, shape) for shape in shapes)

    def forward(self, memory: Tensor) -> dict[int, KeyValue]:
        """memory [B, k, D] -> for each layer with attention keys and values [B, heads, k, size]."""
        shared = torch.tanh(self.shared(memory))
        result = {}
        for shape, layer in zip(self.shapes, self.layers, strict=True):
            key, value = layer(shared).split((shape.heads * shape.key_size, shape.heads * shape.value_size), dim=-1)
            parts = (part.unflatten(-1, (shape.heads, -1)).transpose(1, 2) for part in (key, value))
            result[shape.index] = (next(parts), next(parts))
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


def fill(cache: Cache, prefix: dict[int, KeyValue], dtype: torch.dtype, copies: int = 1) -> None:
    """Put a prefix into an empty cache, of whatever kind it is; each row `copies` times, neighbours in the batch."""
    for index, pair in prefix.items():
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
    if False in (options.get("use_cache"), getattr(options.get("generation_config"), "use_cache", None)):
        raise UsageError("use_cache=False leaves no place for the memories, which are keys and values. Leave it out.")
    if setting(base, options, "use_cache") is False:  # there are bases that do without unless they are told
        options["use_cache"] = True
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
