"""What a model of two memories returns beside what its base returns.

Knows nothing about where the values come from. They are fields, not only entries: whoever takes an output apart and
puts it together again (DDP does, to hook into its tensors) calls the class with every entry by name.
"""

import functools
from dataclasses import field, make_dataclass
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput


def with_entries(output: Any, **entries: Tensor) -> Any:
    """`output` with more entries, `gate` or `divergences`; its class stays what isinstance asks for."""
    if not hasattr(type(output), "divergences"):
        output = _extended(type(output))(**output)  # type: ignore[arg-type]
    for name, value in entries.items():
        output[name] = value
    return output


@functools.cache
def _extended(kind: type[ModelOutput]) -> type[ModelOutput]:
    more: list[Any] = [(name, Tensor | None, field(default=None)) for name in ("gate", "divergences")]
    return make_dataclass(kind.__name__, more, bases=(kind,))
