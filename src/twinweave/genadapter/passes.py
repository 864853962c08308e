"""What is done to a base while it runs: listening to what its blocks are given, adding to what its linear layers put
out, and running blocks again in the backward pass.

Nothing of the base is changed, and nothing stays behind. Knows nothing about states, texts or training.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import UnsupportedModelError, UsageError
from .targets import Source, Target, in_rows

Listener = Callable[[nn.Module, Tensor], None]
Change = Callable[[Tensor], Tensor]


@contextmanager
def listening(targets: Sequence[Target], shape: torch.Size, listener: Listener) -> Iterator[None]:
    """Call `listener(block, states)` with the states [*shape, d] of each target's block, at every call of it."""

    def hook_of(source: Source) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = source.states(args, kwargs)
            if states.shape[:2] != shape:
                raise UnsupportedModelError(
                    f"A {type(block).__name__} is given {list(states.shape)} where states of {list(shape)} tokens were "
                    "expected, so what it reads cannot be told apart by token. This model cannot carry a generated "
                    "adapter."
                )
            listener(block, states)

        return hook

    handles = [
        block.register_forward_pre_hook(hook_of(source), with_kwargs=True) for block, source in _sources(targets)
    ]
    try:
        yield
    finally:
        remove(handles)


def attach(targets: Sequence[Target], changes: Sequence[Change], states: int) -> list[RemovableHandle]:
    """Add `change(x)` to the output of each target until the handles are removed. It is computed in float32.

    `change` maps inputs [states, N, in] to [states, N, out]. The rows of a batch belong to the states in turn, equally
    many neighbours to each, as beams and samples of a row are neighbours in `generate`.
    """
    shapes: dict[nn.Module, tuple[int, int]] = {}  # rows and tokens that a block is working on

    def enter_of(source: Source) -> Callable[..., None]:
        def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rows, tokens = source.states(args, kwargs).shape[:2]
            if rows % states:
                raise UsageError(
                    f"A batch of {rows} rows cannot be shared out among {states} adapters. Give as many rows as "
                    "states, or a multiple."
                )
            shapes[block] = rows, tokens

        return enter

    def hook_of(target: Target, change: Change) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            x = args[0]
            if states > 1 and not (target.by_row and in_rows(x.shape, *shapes[target.block])):
                raise UnsupportedModelError(
                    f"{target.name} is given {list(x.shape)}, which does not say the row of each token, so {states} "
                    "states cannot be answered from in one batch. Answer from one at a time."
                )
            with torch.autocast(x.device.type, enabled=False):
                added = change(x.reshape(states, -1, x.shape[-1]))
            return output + added.view(output.shape).to(output.dtype)

        return hook

    handles = [
        target.module.register_forward_hook(hook_of(target, change))
        for target, change in zip(targets, changes, strict=True)
    ]
    if states > 1:
        handles += [
            block.register_forward_pre_hook(enter_of(source), with_kwargs=True) for block, source in _sources(targets)
        ]
    return handles


def _sources(targets: Sequence[Target]) -> list[tuple[nn.Module, Source]]:
    """Each block once, and where it is given its states."""
    return list({target.block: target.source for target in targets}.items())


def checkpointing(base: nn.Module) -> list[RemovableHandle]:
    """Let the blocks of a base in evaluation mode run again in the backward pass, until the handles are removed.

    transformers asks for training mode before it does so, and with that mode comes dropout. Here a block is in training
    mode when it is called, and in evaluation mode while it runs.
    """
    blocks = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    handles = []
    for block in blocks:
        block.training = True
        handles.append(block.register_forward_pre_hook(_in_evaluation))
        handles.append(block.register_forward_hook(_in_training, always_call=True))
    return handles


def _in_evaluation(block: nn.Module, args: tuple[Any, ...]) -> None:
    block.training = False


def _in_training(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    block.training = True


def remove(handles: list[RemovableHandle]) -> None:
    """Remove hooks; the list is empty afterwards."""
    while handles:
        handles.pop().remove()
