"""The settings of the weave. Knows nothing about the adapter, the base model or training."""

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from ..errors import UsageError, unknown_name

Fusion = Literal["query_gate", "gate", "average", "enhanced"]


@dataclass
class IMSMConfig:
    """How the original and the enhanced memory are fused (IMSM, arXiv 2412.17383, section 3)."""

    gate_rank: int = 8
    """Rank r of the gate; the paper's best of 4, 8 and 16. The full gate has 5·d·r parameters."""

    fusion: Fusion = "query_gate"
    """`query_gate`: the paper's gate. `gate`: without the query memories. `average`: half of each, no parameters.
    `enhanced`: the enhanced memory alone, which only a domain guard makes way for: routing without a gate."""

    gate_dropout: float = 0.0
    """Dropout behind each of the two gate factors while training. The paper states none; its code used 0.1."""

    retention: float = 0.0
    """Added to the gate's logits: 0 as trained, larger keeps more of the original memory, ±inf selects one memory."""

    def __post_init__(self) -> None:
        if self.fusion not in get_args(Fusion):
            raise UsageError(unknown_name("fusion", str(self.fusion), get_args(Fusion)))
        if not isinstance(self.gate_rank, int) or self.gate_rank < 1:
            raise UsageError(f"gate_rank is {self.gate_rank!r}; it must be a whole number of at least 1.")
        if not 0.0 <= self.gate_dropout < 1.0:
            raise UsageError(f"gate_dropout is {self.gate_dropout}; it must lie in [0, 1).")
        if math.isnan(self.retention):
            raise UsageError("retention is not a number; 0 is as trained, inf and -inf select one memory.")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values; an infinite retention becomes text, "inf" or "-inf" (JSON has no infinity)."""
        values = asdict(self)
        if math.isinf(values["retention"]):
            values["retention"] = str(values["retention"])
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "IMSMConfig":
        """The inverse of `to_dict`. Raises UsageError for a key that is not a setting."""
        known = {field.name for field in fields(cls)}
        for key in values:
            if key not in known:
                raise UsageError(unknown_name("IMSM setting", key, known))
        values = dict(values)
        values["retention"] = float(values.get("retention", 0.0))
        return cls(**values)

    def __str__(self) -> str:
        return json.dumps(self.to_dict())
