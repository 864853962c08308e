"""Gradient checkpointing of a frozen base that is in evaluation mode and runs with something attached to it.

transformers checkpoints in training mode alone, and with that mode comes dropout. Here a block is in training mode when
it is called, and in evaluation mode while it runs. In the backward pass it runs again with what was attached when it
was called, whatever is attached by then. Knows nothing about what that is.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

Scope = Callable[[], AbstractContextManager[Any]]

# autograd has a thread for each device, and a base on several is one set of modules
_RUNNING = threading.RLock()


@contextmanager
def checkpointing(base: nn.Module, scope_of_now: Callable[[], Scope]) -> Iterator[None]:
    """Within the block, let the blocks of a base in evaluation mode be checkpointed, where they are asked to be.

    `scope_of_now`, called with a block's forward, gives what that block is to run in, then and again.
    """
    blocks: list[Any] = [block for block in base.modules() if isinstance(block, GradientCheckpointingLayer)]
    asked = [
        (block, block._gradient_checkpointing_func, block.training)
        for block in blocks
        if block.gradient_checkpointing and hasattr(block, "_gradient_checkpointing_func")
    ]
    for block, checkpoint, _ in asked:
        block._gradient_checkpointing_func = _checkpoint_of(block, checkpoint, scope_of_now)
        block.training = True
    try:
        yield
    finally:
        for block, checkpoint, training in asked:
            block._gradient_checkpointing_func = checkpoint
            block.training = training


def is_asked_for(base: nn.Module) -> bool:
    """Whether the base's gradient checkpointing has been enabled."""
    # its name from transformers 5.23 on, and before
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    return bool(next((getattr(base, name) for name in names if hasattr(base, name)), False))


def _checkpoint_of(
    block: nn.Module, checkpoint: Callable[..., Any], scope_of_now: Callable[[], Scope]
) -> Callable[..., Any]:
    def checkpointed(function: Callable[..., Any], *args: Any) -> Any:
        scope = scope_of_now()

        def run(*given: Any) -> Any:
            with _RUNNING, scope():
                training, block.training = block.training, False
                try:
                    return function(*given)
                finally:
                    block.training = training

        return checkpoint(run, *args)

    return checkpointed
