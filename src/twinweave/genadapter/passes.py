"""What is done to a base while it runs: listening to what its blocks are given, adding to what its linear layers put
out.

Nothing of the base is changed, and nothing stays behind. Knows nothing about states, texts or training.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import UnsupportedModelError, UsageError
from .targets import Source, Target, in_rows

Listener = Callable[[nn.Module, Tensor], None]
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Hook:
    """What is called at every call of `module`: with its output, or before it with all it is given."""

    module: nn.Module
    function: Callable[..., Any]
    before: bool = False

    def register(self) -> RemovableHandle:
        """Put it on its module, as often as one likes."""
        if self.before:
            return self.module.register_forward_pre_hook(self.function, with_kwargs=True)
        return self.module.register_forward_hook(self.function)


class Attached:
    """The hooks that are on a base now: `hooks`."""

    def __init__(self) -> None:
        self.hooks: Sequence[Hook] = ()
        self._handles: list[RemovableHandle] = []

    @contextmanager
    def only(self, hooks: Sequence[Hook]) -> Iterator[None]:
        """Have these on the base, and none of those that were; within the block."""
        before = self.hooks
        try:
            self._change(hooks)
            yield
        finally:
            self._change(before)

    def _change(self, hooks: Sequence[Hook]) -> None:
        if hooks is self.hooks:
            return
        while self._handles:
            self._handles.pop().remove()
        self.hooks, self._handles = hooks, [hook.register() for hook in hooks]


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

    with Attached().only([Hook(block, hook_of(source), before=True) for block, source in _sources(targets)]):
        yield


def adding(targets: Sequence[Target], changes: Sequence[Change], states: int) -> list[Hook]:
    """The hooks that add `change(x)` to the output of each target. It is computed in float32.

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
            rows = x.reshape(states, -1, x.shape[-1])
            if torch.is_autocast_enabled(x.device.type):  # asked first: while decoding, entering the block costs
                with torch.autocast(x.device.type, enabled=False):
                    added = change(rows)
            else:
                added = change(rows)
            return output + added.view(output.shape).to(output.dtype)

        return hook

    hooks = [Hook(target.module, hook_of(target, change)) for target, change in zip(targets, changes, strict=True)]
    if states > 1:
        hooks += [Hook(block, enter_of(source), before=True) for block, source in _sources(targets)]
    return hooks


def _sources(targets: Sequence[Target]) -> list[tuple[nn.Module, Source]]:
    """Each block once, and where it is given its states."""
    return list({target.block: target.source for target in targets}.items())
