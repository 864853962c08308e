"""The sizes of what SLIM puts its experts beside. Knows nothing about what is done with them."""

from torch import nn

from ..blocks import is_mixture, linear_sizes
from ..errors import UnsupportedModelError


def sizes_of(layer: nn.Module, hidden_size: int | None = None) -> tuple[int, int]:
    """C_in and C_out of a linear layer, or of a mixture of experts in a model of this `hidden_size`; or of one that
    PEFT has wrapped already. Raises UnsupportedModelError."""
    if (sizes := linear_sizes(layer)) is not None:
        return sizes
    if hidden_size is not None and is_mixture(layer):
        return hidden_size, hidden_size
    raise UnsupportedModelError(
        f"SLIM puts experts beside linear layers and mixtures of experts, and {type(layer).__name__} is neither. Leave "
        "it out of target_modules."
    )
