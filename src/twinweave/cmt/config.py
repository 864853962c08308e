"""The settings of a memory model. Knows nothing about the base model, banks or training."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import UsageError, unknown_name


@dataclass
class CMTConfig:
    """How documents are compressed and used (CMT, arXiv 2412.07393); the defaults are its settings where they are known
    and those of MAC (arXiv 2403.04317), which it is built on, where they are not."""

    memory_tokens: int = 24
    """k: vectors that a document is compressed into."""

    document_tokens: int = 512
    """The most tokens that are compressed at once; a longer document becomes several memories."""

    aggregator_layers: int = 4
    """Cross-attention blocks of the aggregator."""

    aggregator_heads: int = 8
    """Heads of each block."""

    aggregator_head_size: int = 96
    """Width of a head; the blocks are heads x head size wide."""

    prefix_rank: int = 256
    """The size of the map that all layers of the prefix share."""

    top_k: int = 8
    """K: memories that a question is answered from, unless the call says another number."""

    min_similarity: float | None = None
    """Memories with a smaller cosine to the question are left out, and a question without any is answered by the base
    as it is. None: the nearest are always used, as in the paper."""

    similarity_bias: bool = False
    """Whether the aggregator's attention leans to memories that resemble the question, by the cosine that they are
    found by times a learned scale; not in the paper. It spares a small base from learning a second time which memory
    is meant."""

    init_text: str | None = None
    """A text whose tokens the memory tokens start from, repeated as often as it takes, such as questions of the kind
    that will be asked; None: random vectors like the base's embeddings."""

    memory_aware_weight: float = 0.5
    """alpha of the memory-aware objective: the loss is that of (1 + alpha) x the logits with memory - alpha x those
    without. 0: plain cross-entropy."""

    self_matching_weight: float = 0.1
    """beta: the weight of the self-matching loss beside the answers' loss."""

    separation_weight: float = 0.1
    """lambda: within the self-matching loss, the weight of keeping different documents' memories apart."""

    distractor_warmup: float = 0.0
    """The share of training in which a question sees no documents of its batch but its own; over as much again the
    others come in. It helps small bases to begin. 0: all from the start, as in the paper."""

    gradient_share: float = 1.0
    """The share of a training batch's documents that carry a gradient, drawn anew in every batch; less takes less
    memory. 1: all."""

    def __post_init__(self) -> None:
        sizes = ("memory_tokens", "document_tokens", "aggregator_layers", "aggregator_heads", "aggregator_head_size")
        for name in (*sizes, "prefix_rank", "top_k"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{name} is {value!r}; it must be a whole number of at least 1.")
        least = self.min_similarity
        if least is not None and (
            isinstance(least, bool) or not isinstance(least, int | float) or not -1 <= least <= 1
        ):
            raise UsageError(f"min_similarity is {least!r}; it must lie between -1 and 1, or be left out.")
        if not isinstance(self.similarity_bias, bool):
            raise UsageError(f"similarity_bias is {self.similarity_bias!r}; it must be true or false, without quotes.")
        if self.init_text is not None and not (isinstance(self.init_text, str) and self.init_text.strip()):
            raise UsageError(f"init_text is {self.init_text!r}; it must be a text of at least a word.")
        for name in ("memory_aware_weight", "self_matching_weight", "separation_weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise UsageError(f"{name} is {value!r}; it must be a number of at least 0.")

        if not (isinstance(self.distractor_warmup, int | float) and 0 <= self.distractor_warmup <= 0.5):
            raise UsageError(f"distractor_warmup is {self.distractor_warmup!r}; it must lie between 0 and 0.5.")
        if not (isinstance(self.gradient_share, int | float) and 0 < self.gradient_share <= 1):
            raise UsageError(f"gradient_share is {self.gradient_share!r}; it must lie above 0 and be at most 1.")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CMTConfig":
        """The inverse of `to_dict`. Raises UsageError for a key that is not a setting."""
        known = {field.name for field in fields(cls)}
        for key in values:
            if key not in known:
                raise UsageError(unknown_name("setting of CMT", key, known))
        return cls(**values)


def chunk_size_of(settings: CMTConfig, window: object) -> int:
    """Tokens that are compressed at once: those of the settings, or what a base's window has room for (None: any)."""
    if not isinstance(window, int) or window < settings.memory_tokens + 2:
        return settings.document_tokens
    return min(settings.document_tokens, window - settings.memory_tokens - 1)  # the start of text takes one
