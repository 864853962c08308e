"""The two things that are done to a base while it runs: listening to what its blocks are given, and adding to what its
linear layers put out.

Nothing of the base is changed, and nothing stays behind. Knows nothing about states, texts or training.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import UnsupportedModelError, UsageError
from .targets import Target, first_states

Listener = Callable[[nn.Module, Tensor], None]
Change = Callable[[Tensor], Tensor]


@contextmanager
def listening(blocks: Sequence[nn.Module], rows: int, listener: Listener) -> Iterator[None]:
    """Call `listener(block, states)` with the input [rows, T, d] of each block, at every call of it."""

    def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = first_states(args, kwargs)
        if states is None or states.shape[0] != rows:
            found = None if states is None else list(states.shape)
            raise UnsupportedModelError(
                f"A {type(block).__name__} is given {found} where states of {rows} rows were expected, so what it "
                "reads cannot be told apart by row. This model cannot carry a generated adapter."
            )
        listener(block, states)

    handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        remove(handles)


def attach(targets: Sequence[Target], changes: Sequence[Change], states: int) -> list[RemovableHandle]:
    """Add `change(x)` to the output of each target until the handles are removed.

    `change` maps inputs [states, N, in] to [states, N, out]. The rows of a batch belong to the states in turn, equally
    many neighbours to each, as beams and samples of a row are neighbours in `generate`.
    """

    def hook_of(change: Change) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            x = args[0]
            if states == 1:
                added = change(x.reshape(1, -1, x.shape[-1]))
            elif x.shape[0] % states:
                raise UsageError(
                    f"A batch of {x.shape[0]} rows cannot be shared out among {states} adapters. Give as many rows as "
                    "states, or a multiple."
                )
            else:
                added = change(x.reshape(states, -1, x.shape[-1]))
            return output + added.view(output.shape).to(output.dtype)

        return hook

    return [
        target.module.register_forward_hook(hook_of(change)) for target, change in zip(targets, changes, strict=True)
    ]


def remove(handles: list[RemovableHandle]) -> None:
    """Remove hooks; the list is empty afterwards."""
    while handles:
        handles.pop().remove()
