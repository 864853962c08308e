"""Which layers of a model are its feed-forward layers. Knows nothing about what is done with them."""

import re
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedModelError

# Parts of a block that are no feed-forward, by the names they and their classes go by in transformers.
_OTHER_PARTS = re.compile(
    r"attn|attention|mixer|mamba|ssm|conv|lstm|recurrent|rglru|delta|linear_core|router|gate$|laurel|per_layer|altup|"
    r"indexer|adapter|lora|norm$",
    re.IGNORECASE,
)


def feed_forward_layers(model: Any) -> list[str]:
    """Names of the linear layers of all feed-forwards in the model's blocks.

    Raises UnsupportedModelError where there are none, as in a mixture of experts that keeps them in one tensor.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    inside = set(decoder.modules()) if decoder is not None else set(model.modules())
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, Conv1D) or hasattr(module, "out_features")) and module in inside and module is not head
    }
    found = [name for name, module in linear.items() if _is_feed_forward(model, name, module)]
    if not found:
        others = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise UnsupportedModelError(
            f"{type(model).__name__} has no feed-forward made of linear layers (a mixture of experts keeps them in one "
            f"tensor). Name other layers in target_modules; its linear layers are called {', '.join(others)}."
        )
    return found


def _is_feed_forward(model: nn.Module, name: str, module: nn.Module) -> bool:
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return False  # outside the blocks
    if getattr(module, "out_features", 2) < 2:
        return False  # the switch of a shared expert
    for end in range(numbers[0] + 2, len(parts) + 1):
        within = model.get_submodule(".".join(parts[:end]))
        if _OTHER_PARTS.search(parts[end - 1]) or _OTHER_PARTS.search(type(within).__name__):
            return False
    return True
