"""What a method is: how a base becomes a model to train, and how a trained one is dialled.

Knows nothing about which methods there are, data, training loops or scores.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from ..cmt import CMTConfig, MemoryModel
from ..genadapter import GenerativeAdapter, GenerativeAdapterConfig
from ..imsm import IMSMConfig
from ..rehearsal import MakeTerm, Materials


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter that is trained already, to go on from."""

    path: str
    train: bool
    """Whether it learns more, or is left as it is."""


@dataclass(frozen=True)
class SavedGenerator:
    """A generator of adapters that is trained already, to go on from; `path` is its folder or hub name."""

    path: str


@dataclass(frozen=True)
class SavedMemory:
    """A memory model that is trained already, to go on from; `path` is its folder or hub name."""

    path: str


Adapter = PeftConfig | SavedAdapter
Model = PeftModel | GenerativeAdapter | MemoryModel


@dataclass(frozen=True)
class Settings:
    """What a recipe says about the methods, beside the adapter."""

    imsm: IMSMConfig = field(default_factory=IMSMConfig)
    slim: Mapping[str, Any] = field(default_factory=dict)
    """The settings of SLIM that differ from its own defaults."""
    generator: GenerativeAdapterConfig | SavedGenerator = field(default_factory=GenerativeAdapterConfig)
    memory: CMTConfig | SavedMemory = field(default_factory=CMTConfig)


class Build(Protocol):
    """A base, the recipe's adapter and settings, and what else there is to use -> the model to train."""

    def __call__(
        self,
        base: PreTrainedModel,
        adapter: Adapter,
        settings: Settings,
        materials: Materials | None = None,
        /,
    ) -> Model:
        """Without `materials` the model has its size, and maybe not the start of its training."""


Load = Callable[[str, PreTrainedModel], Model]
ReadingSize = Callable[[Settings, int], int]
"""The settings and the base's window -> how many tokens of a context are read at once."""


@dataclass(frozen=True)
class Knob:
    """A setting that a method is swept over."""

    name: str
    """What recipes (in `sweeps`) and results call it."""
    values: tuple[float, ...]
    """The small sweep of a recipe that does not say another."""
    multiplies: Literal["learning_rate", "gate_learning_rate", "steps", "term"] = "term"
    """Where a model is trained at each value: what of the recipe the value is a multiple of."""


@dataclass(frozen=True)
class Dial:
    """What a knob turns where nothing is trained again: the same weights are scored at several settings."""

    of: str
    """The method whose trained weights are dialled."""
    apply: Callable[[Any, float], AbstractContextManager[Any]]
    """Sets the knob of a model for the length of a block."""


@dataclass(frozen=True)
class Method:
    """One way to teach a base something new."""

    name: str
    label: str
    description: str
    build: Build | None = None
    load: Load | None = None
    dial: Dial | None = None
    knob: Knob | None = None
    term: MakeTerm | None = None
    """What is added to the task's loss."""
    rehearses: Literal["never", "if on", "always"] = "never"
    """Whether training uses the recipe's rehearsal: where it is on, or not without it."""
    guarded: bool = False
    """Whether a trained model gets the recipe's domain guard; a dial: whether it turns one."""
    reads: ReadingSize | None = None
    """Where it reads the context of a row apart from its question; for others that goes in front of the prompt."""
