"""Which layers of a model are adapted, and running it without the adapter, dropout or moving statistics.

Knows nothing about memories.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .switches import SwitchableAttention


def adapter_layers(model: nn.Module) -> list[nn.Module]:
    """Every layer of `model` that can be switched off."""
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper, SwitchableAttention)
    return [m for m in model.modules() if isinstance(m, kinds)]


@contextmanager
def adapters_off(layers: list[nn.Module], off: bool = True) -> Iterator[None]:
    """Run the block on the frozen weights, or, with off=False, on the adapted ones.

    Flips the layers' own flag instead of PEFT's enable/disable, which also resets `requires_grad` of every adapter.
    """
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = off  # type: ignore[assignment]
        yield
    finally:
        for layer, was_disabled in zip(layers, before, strict=True):
            layer._disable_adapters = was_disabled


@contextmanager
def dropout_off(module: nn.Module) -> Iterator[None]:
    """Run the block in evaluation mode: the original memory is a constant, also while training."""
    training = [m for m in module.modules() if m.training] if module.training else []
    try:
        for m in training:
            m.training = False
        yield
    finally:
        for m in training:
            m.training = True


@contextmanager
def statistics_off(module: nn.Module) -> Iterator[None]:
    """Run the block without moving what follows the training data (SLIM's clusters, batch norm's statistics): text that
    is rehearsed is not what is learned."""
    tracking: list[Any] = [m for m in module.modules() if getattr(m, "track_running_stats", False)]
    try:
        for m in tracking:
            m.track_running_stats = False
        yield
    finally:
        for m in tracking:
            m.track_running_stats = True
