"""What a generator has read: one matrix per adapted layer. It adds up over texts, and a text can be taken out of it.

Knows nothing about how texts are read. Sums are kept as whole multiples of 2⁻³⁰, so that adding is exact: the order of
texts does not matter, and what is subtracted leaves no trace.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import BaseMismatchError, DamagedFileError, UnsupportedModelError, UsageError
from ..files import atomic_files_into, read_safetensors

if TYPE_CHECKING:
    from .model import GenerativeAdapter

STATE_NAME = "adapter_state.safetensors"
_FORMAT = "twinweave adapter state 1"
# float32 sums have 24 binary digits; with 30 behind the point, entries from 2⁻⁶ up keep all of them, and sums to 2³³
# (a hundred million tokens) fit into 64 bits.
_UNIT = 2.0**-30
_LARGEST = 2.0**62


@dataclass(eq=False)
class AdapterState:
    """The sums of the texts that were read.

    `sums`: name of an adapted layer -> int64 [d_r, d_r], in multiples of 2⁻³⁰, on the CPU. `generator`: the fingerprint
    of the generator that read them. `documents`: SHA-256 of a text -> how often it was read. `tokens`: their tokens.
    """

    sums: dict[str, Tensor]
    generator: str
    documents: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    additive: bool = True
    reader: "GenerativeAdapter | None" = field(default=None, repr=False)
    factors: tuple[Any, list[tuple[Tensor, Tensor]]] | None = field(default=None, repr=False)
    """The LoRA pairs of the layers, once they were needed, and what they were made by; never saved."""

    def __add__(self, other: "AdapterState") -> "AdapterState":
        """The state of having read both. Raises UsageError for states that do not add up."""
        self._check(other, "added")
        return self.replaced(
            {name: tensor + other.sums[name] for name, tensor in self.sums.items()},
            self.documents + other.documents,
            self.tokens + other.tokens,
            other.reader,
        )

    def __sub__(self, other: "AdapterState") -> "AdapterState":
        """The state of never having read what `other` has; exactly, to the last bit.

        Raises UsageError where `other` has read what this state has not.
        """
        self._check(other, "subtracted")
        if missing := other.documents - self.documents:
            raise UsageError(
                f"{missing.total()} of the {other.documents.total()} texts to forget were never read into this state, "
                "at least not word for word. Give the texts as they were read."
            )
        documents = self.documents - other.documents
        sums = {name: tensor - other.sums[name] for name, tensor in self.sums.items()}
        if not documents:  # the rounding of another machine or batch would be all that is left
            sums = {name: torch.zeros_like(tensor) for name, tensor in sums.items()}
        return self.replaced(sums, documents, self.tokens - other.tokens, other.reader)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AdapterState):
            return NotImplemented
        return (
            self.generator == other.generator
            and self.documents == other.documents
            and self.sums.keys() == other.sums.keys()
            and all(torch.equal(tensor, other.sums[name]) for name, tensor in self.sums.items())
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def is_empty(self) -> bool:
        """Whether nothing was read, or everything was taken out again."""
        return not self.documents

    def values(self) -> dict[str, Tensor]:
        """The sums as float32 [d_r, d_r]."""
        return as_float(self.sums)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `adapter_state.safetensors` into the folder `path`; returns the file."""
        about = {
            "format": _FORMAT,
            "generator": self.generator,
            "documents": dict(sorted(self.documents.items())),
            "tokens": self.tokens,
            "additive": self.additive,
        }
        with atomic_files_into(path) as folder:
            # one entry of metadata, since safetensors keeps no order among several
            save_file(self.sums, folder / STATE_NAME, metadata={"state": json.dumps(about, sort_keys=True)})
        return Path(path) / STATE_NAME

    @classmethod
    def load(cls, path: str | os.PathLike[str], reader: "GenerativeAdapter | None" = None) -> "AdapterState":
        """Read what `save` wrote (the folder, or the file in it). With `reader` the state can be answered from.

        Raises DamagedFileError, and BaseMismatchError for a state that another generator has read.
        """
        file = Path(path) / STATE_NAME if Path(path).is_dir() else Path(path)
        sums = read_safetensors(file)
        try:
            with safe_open(str(file), framework="pt") as opened:
                about = json.loads(opened.metadata()["state"])
            if about["format"] != _FORMAT:
                raise ValueError(f"its format is {about['format']!r}")
            state = cls(sums, about["generator"], Counter(about["documents"]), about["tokens"], about["additive"])
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedFileError(f"{file} holds no state of a generated adapter ({error}).") from error
        if reader is not None:
            reader.check_state(state)
            state.reader = reader
        return state

    def to_lora(self, path: str | os.PathLike[str], **options: Any) -> None:
        """Write an ordinary LoRA of PEFT into the folder `path`; see `GenerativeAdapter.export_lora`.

        Raises UsageError for a state that was loaded without its reader.
        """
        if self.reader is None:
            raise UsageError("This state was loaded without its generator. Use AdapterState.load(path, reader).")
        self.reader.export_lora(self, path, **options)

    def replaced(
        self,
        sums: dict[str, Tensor],
        documents: Counter[str],
        tokens: int,
        reader: "GenerativeAdapter | None" = None,
    ) -> "AdapterState":
        """A state of the same generator with other contents; it has this `reader` where this state has none.

        Raises UsageError for sums that have grown too large.
        """
        if any(tensor.numel() and tensor.abs().max() > _LARGEST for tensor in sums.values()):
            raise UsageError("The state has read more than its sums can hold. Begin another one.")
        return AdapterState(sums, self.generator, documents, tokens, self.additive, self.reader or reader)

    def _check(self, other: "AdapterState", what: str) -> None:
        if not isinstance(other, AdapterState):
            raise UsageError(f"A {type(other).__name__} cannot be {what}; read the text first.")
        if self.generator != other.generator:
            raise BaseMismatchError(
                f"The states were read by two generators ({self.generator} and {other.generator}), so they cannot be "
                f"{what}. Read the text again with one of them."
            )
        if not self.additive:
            raise UsageError(
                "What a sequential reader read depends on what it had read before, so its states do not add up. Go on "
                "with read(text, state=...), or use mode='parallel'."
            )


def fixed_point(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """float32 sums as whole multiples of 2⁻³⁰, on the CPU. Raises UnsupportedModelError for what has none."""
    whole = {name: (tensor.detach().cpu().double() / _UNIT).round() for name, tensor in sums.items()}
    for name, tensor in whole.items():
        if not (tensor.abs() <= _LARGEST).all():  # false for NaN too; as an integer it would be one like any other
            raise UnsupportedModelError(
                f"What {name} is given is not a number, or too large for one. Load the base in bfloat16 or float32."
            )
    return {name: tensor.long() for name, tensor in whole.items()}


def as_float(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `fixed_point` made, as float32 again."""
    return {name: (tensor.double() * _UNIT).float() for name, tensor in sums.items()}
