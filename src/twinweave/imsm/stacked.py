"""The stacked form of the twin: the rows [frozen; tuned] go through the decoder in one pass.

Knows nothing about the gate, the query or caches, nor about the kinds of adapters: an adapted layer is a module with a
`base_layer`, which runs once on all rows, while the adapter sees the tuned half only. The weights of the base, which
are most of what a decoding step reads from memory, are so read once.

Below the first block that carries an adapter (the shared trunk) both memories are the same: the rows double there.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import UnsupportedModelError
from .adapters import adapters_off

_FEW_ROWS = 4


class RowsMixedError(UnsupportedModelError):
    """A layer did not get its rows as [frozen; tuned]; the model can only be run in two passes."""


class StackedPass:
    """Hooks that turn one run of the decoder into a run of both memories. Idle unless `begin` was called before it.

    `blocks`: the decoder's blocks in the order they run; `trunk`: how many of them carry no adapter from below;
    `layers`: the adapted layers. The decoder's output then has 2·B rows, [frozen; tuned].
    """

    def __init__(self, blocks: nn.ModuleList, trunk: int, layers: list[nn.Module]) -> None:
        self.rows = 0
        self._length = 0
        self._doubled: list[tuple[Tensor, Tensor]] = []
        self._split: dict[nn.Module, _Halves] = {}
        self._adapted_by_base = {base: layer for layer in layers if (base := _base_of(layer)) is not None}
        self._hooks: list[RemovableHandle] = []
        for block in blocks[trunk:]:
            self._hooks.append(block.register_forward_pre_hook(self._double_rows, with_kwargs=True))
        for layer in layers:
            self._hooks.append(layer.register_forward_pre_hook(self._enter_adapted))
            self._hooks.append(layer.register_forward_hook(self._leave_adapted, with_kwargs=True))
        for base in self._adapted_by_base:
            self._hooks.append(base.register_forward_pre_hook(self._enter_base))
            self._hooks.append(base.register_forward_hook(self._leave_base))
        self._linear = [m for block in blocks[trunk:] for m in block.modules() if _gains_from_turning(m)]
        for module in self._linear:
            module.__class__ = _TurnedLinear
            module._stacked = self  # type: ignore[assignment]

    def begin(self, rows: int, length: int) -> None:
        """The next run of the decoder, over `rows` rows of `length` tokens, is stacked. rows=0: it is an ordinary one.

        Said before every run, so that one which an exception ended leaves nothing behind.
        """
        self.rows, self._length = rows, length
        self._doubled.clear()
        self._split.clear()

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        for module in self._linear:
            module.__class__ = nn.Linear
            del module._stacked

    # --- rows -----------------------------------------------------------------------------------------------------

    def _double_rows(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.rows:
            return None
        return self._double(args), self._double(kwargs)

    def _double(self, value: Any) -> Any:
        """`value` with every tensor that has one entry per row doubled; what has 2·B rows already stays."""
        if isinstance(value, Tensor):
            return self._double_tensor(value) if self._is_per_row(value) else value
        if type(value) in (tuple, list):
            return type(value)(self._double(v) for v in value)
        if type(value) is dict:
            return {key: self._double(v) for key, v in value.items()}
        return value

    def _is_per_row(self, tensor: Tensor) -> bool:
        # A float tensor [T, k] (rotary tables) may have as many columns as there are rows
        return tensor.ndim >= (3 if tensor.is_floating_point() else 2) and tensor.shape[0] == self.rows

    def _double_tensor(self, tensor: Tensor) -> Tensor:
        for known, doubled in self._doubled:  # masks and positions come to every block
            if known is tensor:
                return doubled
        doubled = torch.cat((tensor, tensor))
        self._doubled.append((tensor, doubled))
        return doubled

    # --- adapted layers -------------------------------------------------------------------------------------------

    def _enter_adapted(self, layer: nn.Module, args: tuple[Any, ...]) -> Any:
        if not self.rows:
            return None
        x = args[0] if args else None
        if not isinstance(x, Tensor) or x.shape[0] != 2 * self.rows * (self._length if x.ndim == 2 else 1):
            raise RowsMixedError(
                f"An adapted {type(layer).__name__} does not see the rows of both memories one behind the other, which "
                "a stacked pass needs. Set model.plan = 'two_pass'."
            )
        halves = _Halves(x)
        self._split[layer] = halves
        return (halves.tuned, *args[1:])

    def _enter_base(self, base: nn.Module, args: tuple[Any, ...]) -> Any:
        halves = self._waiting(base)
        if halves is None:
            return None
        x = args[0]
        # IA3 and the orthogonal tuners change the input: then only the frozen half is as it came
        both = halves.both if x is halves.tuned else torch.cat((halves.frozen.to(x.dtype), x))
        return (both, *args[1:])

    def _leave_base(self, base: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        halves = self._waiting(base)
        if halves is None:
            return None
        halves.frozen_output, tuned_output = output.chunk(2)
        return tuned_output

    def _leave_adapted(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self.rows:
            return None
        halves = self._split.pop(layer)
        frozen = halves.frozen_output
        if frozen is None:  # this kind of adapter does not call its base layer
            with adapters_off([layer]):
                frozen = layer.forward(halves.frozen, *args[1:], **kwargs)
        return torch.cat((frozen.to(output.dtype), output))

    def _waiting(self, base: nn.Module) -> "_Halves | None":
        """The halves of the adapted layer that is calling `base`, unless it has called it before."""
        if not self.rows:
            return None
        halves = self._split.get(self._adapted_by_base[base])
        return halves if halves is not None and halves.frozen_output is None else None


class _Halves:
    """The input of one adapted layer, and what its base layer made of the frozen half."""

    def __init__(self, both: Tensor) -> None:
        self.both = both
        self.frozen, self.tuned = both.chunk(2)
        self.frozen_output: Tensor | None = None


class _TurnedLinear(nn.Linear):
    """A linear layer that multiplies the few rows of a stacked decoding step from the other side.

    In fp32 on a CPU, MKL takes 1.6 to 3.8 times as long for x W^T as for W x^T where x has two to four rows
    (benchmarks/few_rows.py), and decoding one or two sequences is little else. A class, not a hook: a hook cannot
    replace what is computed.
    """

    _stacked: "StackedPass"

    def forward(self, input: Tensor) -> Tensor:
        if not self._stacked.rows or input.numel() > _FEW_ROWS * self.in_features:
            return super().forward(input)
        output = torch.mm(self.weight, input.reshape(-1, self.in_features).t()).t().contiguous()
        output = output if self.bias is None else output + self.bias
        return output.view(*input.shape[:-1], self.out_features)


def _gains_from_turning(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter:  # torchao: a tensor of its own kind
        return False
    return module.weight.device.type == "cpu" and module.weight.dtype == torch.float32


def _base_of(layer: nn.Module) -> nn.Module | None:
    base = getattr(layer, "base_layer", None)
    return base if isinstance(base, nn.Module) else None


def tuned_half(value: Any, rows: int) -> Any:
    """The enhanced memory's half of everything in `value` that has 2·rows rows; the rest as it is."""
    if isinstance(value, Tensor):
        return value[rows:] if value.ndim >= 2 and value.shape[0] == 2 * rows else value
    if isinstance(value, (tuple, list)):
        return type(value)(tuned_half(v, rows) for v in value)
    return value
