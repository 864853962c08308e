"""What a base model is, in a few numbers: saved beside everything that was made for it, compared when it is loaded.

Knows nothing about what was made for the base.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

# The fields of a config that decide what the weights mean and that every release of transformers names alike.
_CONFIG_FIELDS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)
_TENSORS, _VALUES = 16, 64
_SMALLEST = 2.0**-14  # below it fp16 has fewer digits than bf16


@dataclass(frozen=True)
class BaseFingerprint:
    """Identifies a base model whatever precision it is loaded in.

    `config`: hash over the architecture's sizes; `parameters`: their number; `weights`: hash over a fixed sample of the
    weights, rounded to bfloat16, or None where they cannot be read (a quantised or empty base); `kept`: the same over
    what quantisation leaves as it is (input embeddings, norms and biases), so that a quantised base can be told from
    another one, and known as the same in full precision.
    """

    config: str
    parameters: int
    weights: str | None
    kept: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The values as plain data."""
        return asdict(self)

    def differences(self, other: "BaseFingerprint") -> list[str]:
        """What differs from `other`, in words; empty when both name the same base."""
        found = []
        if self.config != other.config:
            found.append(f"architecture or sizes (config hash {self.config} against {other.config})")
        if self.weights is None or other.weights is None:  # a quantised base counts its parameters differently
            if self.kept is not None and other.kept is not None and self.kept != other.kept:
                found.append(f"embeddings, norms or biases (sample hash {self.kept} against {other.kept})")
            return found
        if self.parameters != other.parameters:
            found.append(f"number of parameters ({self.parameters:,} against {other.parameters:,})")
        elif self.weights != other.weights:
            found.append(f"the weights themselves (sample hash {self.weights} against {other.weights})")
        return found

    def __str__(self) -> str:
        return f"{self.config}-{self.parameters}-{self.weights or self.kept or 'unread'}"


def fingerprint(model: nn.Module) -> BaseFingerprint:
    """The fingerprint of a base model, taken before any adapter is injected into it."""
    parameters = sorted(model.named_parameters(), key=lambda item: item[0])
    config = getattr(model, "config", None)
    quantised = getattr(config, "quantization_config", None) is not None
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    values = {name: getattr(config, name, None) for name in _CONFIG_FIELDS}
    return BaseFingerprint(
        config=_hash(json.dumps(values, sort_keys=True, default=str).encode()),
        parameters=sum(p.numel() for _, p in parameters),
        weights=None if quantised else _hash_of_sample([p for _, p in parameters]),
        kept=_hash_of_sample(_left_as_they_are(model, parameters)),
    )


def _left_as_they_are(model: Any, parameters: list[tuple[str, nn.Parameter]]) -> list[nn.Parameter]:
    """The input embeddings, norms and biases; nothing where the embeddings are quantised too."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(embedding, "weight", None)
    if type(weight) is not nn.Parameter:
        return []
    return [weight, *(p for _, p in parameters if p.ndim == 1 and type(p) is nn.Parameter)]


def _hash_of_sample(parameters: list[nn.Parameter]) -> str | None:
    if not parameters or any(p.is_meta or not p.is_floating_point() for p in parameters):
        return None
    digest = hashlib.sha256()
    for i in _spread(len(parameters), _TENSORS):
        flat = parameters[i].detach().reshape(-1)
        index = torch.tensor(_spread(flat.numel(), _VALUES), device=flat.device)
        sample = flat.index_select(0, index).to("cpu", torch.float32).bfloat16()
        sample[sample.abs() < _SMALLEST] = 0.0
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _spread(length: int, most: int) -> list[int]:
    """At most `most` indices into `length` items, evenly spread, both ends included."""
    if length <= most:
        return list(range(length))
    return [i * (length - 1) // (most - 1) for i in range(most)]


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
