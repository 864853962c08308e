"""The settings of a generator of adapters. Knows nothing about the base model or training."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from ..errors import UsageError, unknown_name

Mode = Literal["parallel", "sequential"]
Normalization = Literal["svd", "frobenius"]


@dataclass
class GenerativeAdapterConfig:
    """How a text becomes an adapter (GenerativeAdapter, arXiv 2411.05877); the defaults are those of its 7B models."""

    target_modules: list[str] | str | None = None
    """Linear layers that are adapted, named as PEFT names them (a list of endings, or a regular expression). None: in
    each block the last linear layer of what mixes the tokens (the attention's output projection)."""

    state_size: int = 1024
    """d_r: a layer remembers what was read in a matrix of d_r x d_r."""

    rank: int = 128
    """r: the most directions of that matrix that the adapter keeps, and the rank of the exported LoRA."""

    scale: float = 1 / 16
    """s: what the weight change is multiplied by. The paper has 1/16 for Mistral-7B and 1/8 for Llama2-7B."""

    chunk_size: int = 1024
    """Tokens that are read at once; chunks do not see each other."""

    mode: Mode = "parallel"
    """`parallel`: the bare base reads every chunk, so that states add up and a text can be taken out again.
    `sequential`: each chunk is read by the base as adapted to the chunks before it."""

    token_gate: bool = False
    """Whether each token's part of the sums is multiplied by a learned share, the sigmoid of a projection of its state;
    not in the paper. It leaves out the tokens that say nothing, whose directions would be raised to full strength."""

    topic_key: bool = False
    """Whether the mean state of its chunk is part of every token's key, with a projection of its own; not in the paper.
    It tells passages apart for a base whose single states do not say what the passage is about."""

    normalization: Normalization = "svd"
    """`svd`: every kept direction counts alike. `frobenius`: the paper's ablation, one number divides the matrix."""

    tolerance: float = 1e-5
    """Directions with a singular value below this share of the largest are left out: they hold rounding, not text."""

    newton_schulz_steps: int = 12
    """Iterations in the place of the decomposition in a loss, where its gradient would not be stable."""

    def __post_init__(self) -> None:
        self._check_types()
        if self.rank > self.state_size:
            raise UsageError(f"rank is {self.rank}, more than state_size={self.state_size} can hold. Lower it.")
        if not 0 < self.scale < float("inf"):
            raise UsageError(f"scale is {self.scale!r}; it must be a positive number.")
        if not 0 <= self.tolerance < 1:
            raise UsageError(f"tolerance is {self.tolerance!r}; it must lie in [0, 1).")
        for name, choices in (("mode", get_args(Mode)), ("normalization", get_args(Normalization))):
            if getattr(self, name) not in choices:
                raise UsageError(unknown_name(name, str(getattr(self, name)), choices))

    def _check_types(self) -> None:
        for name in ("state_size", "rank", "chunk_size", "newton_schulz_steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{name} is {value!r}; it must be a whole number of at least 1.")
        for name in ("scale", "tolerance"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UsageError(
                    f"{name} is {value!r}; it must be a number. Write it as a decimal one without quotes: 1/16 is "
                    "0.0625, and YAML takes 1.0e-5 for a number where 1e-5 is text."
                )
        for name in ("token_gate", "topic_key"):
            if not isinstance(value := getattr(self, name), bool):
                raise UsageError(f"{name} is {value!r}; it must be true or false, without quotes.")
        named = self.target_modules
        listed = isinstance(named, list) and all(isinstance(name, str) for name in named)
        if not (named is None or isinstance(named, str) or listed):
            raise UsageError(f"target_modules is {named!r}; it must be a list of names, or one regular expression.")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GenerativeAdapterConfig":
        """The inverse of `to_dict`. Raises UsageError for a key that is not a setting."""
        known = {field.name for field in fields(cls)}
        for key in values:
            if key not in known:
                raise UsageError(unknown_name("setting of GenerativeAdapter", key, known))
        return cls(**values)


def chunk_size_of(settings: GenerativeAdapterConfig, window: object) -> int:
    """Tokens that are read at once: those of the settings, or what a base's window has room for (None: any number)."""
    if not isinstance(window, int) or window < 2:
        return settings.chunk_size
    return min(settings.chunk_size, window - 1)  # the start of text takes one
