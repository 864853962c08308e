"""The domain guard: how far a query lies from those of the training data moves the gate to the original memory.

Knows nothing about models, tokens or the gate: it sees features of the frozen branch only. `fitting.py` makes one.

Equations, for the frozen query memory q (the mean of the frozen last hidden states over the query, in d channels):

    x = q M                                   k      M: d × k, fixed; whitens what training queries vary by
    δ = min over the centres c of ‖x − c‖            the Mahalanobis distance to the nearest cluster
    s = 1 − exp(−strength · max(0, (δ − τ) / σ))     strangeness, from 0 to 1
    g ← g + (1 − g) s                                in every channel of the gate g, the original memory's share

τ is the distance that at most a stated share of validation queries exceeds; σ is how far τ lies above their median, so
that one unit beyond the border means "as far as the border is from the middle", in any number of channels. Within the
border s is exactly 0, and the model is bit for bit the one without a guard; far beyond, s is exactly 1, and the model
is the base. The share is moved, not the gate's logits: how large those grow is a matter of the gate's learning rate
(tens, in the pocket world), and a strength in their unit would mean something else for every training.

M = R L: random orthonormal directions R, then the whitening L of the pooled covariance within clusters. Random ones, as
a strange query shows where training queries vary as well as where they hardly do, and principal components keep the
first kind only. x is linear in the frozen states, so that it can be averaged over the query, and cached, as k numbers a
token, just as what the gate reads.
"""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn


class GuardSettings(BaseModel):
    """What the domain guard measures, and how strongly it acts."""

    model_config = ConfigDict(extra="forbid")

    affected: float = Field(0.01, gt=0, lt=1)
    """The share of in-domain queries (or tokens) that the guard may act on, by calibration on validation rows."""
    strength: float = Field(5.0, ge=0, allow_inf_nan=False)
    """How fast the original memory takes over beyond the border; 0 turns the guard off."""
    directions: int = Field(128, ge=1)
    """In how many directions of the hidden states distances are measured: k numbers a token."""
    clusters: int = Field(4, ge=1)
    """How many centres the training queries have; the nearest one counts."""
    per: Literal["query", "token"] = "query"
    """Whose frozen memory is measured: the query's, once for an answer, or that of each token being continued."""


class DomainGuard(nn.Module):
    """Statistics of the training queries, as buffers in fp32. Made by `fit_guard`; nothing in it is trained.

    `map` is M, [d, k]; `centres` [C, k]; `border` [2] holds τ and σ. `strength` is a plain number that can be set.
    """

    map: Tensor
    centres: Tensor
    border: Tensor

    def __init__(self, settings: GuardSettings, map: Tensor, centres: Tensor, border: Tensor) -> None:
        super().__init__()
        self.settings = settings
        self.strength = settings.strength
        for name, tensor in (("map", map), ("centres", centres), ("border", border)):
            self.register_buffer(name, tensor.float().contiguous())

    @property
    def reads_query(self) -> bool:
        """Whether `strangeness` wants the mean of `project` over the query, and not each token's own."""
        return self.settings.per == "query"

    @property
    def width(self) -> int:
        """k, the number of features."""
        return self.map.shape[1]

    def project(self, original: Tensor) -> Tensor:
        """Features of frozen states: [..., d] -> [..., k], in fp32 (fp64 stays)."""
        with torch.autocast(original.device.type, enabled=False):
            h = original if original.dtype == torch.float64 else original.float()
            return h @ self.map.to(h.dtype)

    def distance(self, features: Tensor) -> Tensor:
        """δ, the distance of features [..., k] to the nearest centre: [...]."""
        # not cdist, whose rounding depends on how many rows there are: the same query is to get the same answer
        return (features.unsqueeze(-2) - self.centres.to(features.dtype)).square().sum(-1).amin(-1).sqrt()

    def strangeness(self, features: Tensor) -> Tensor:
        """s, the share of the enhanced memory's part that goes to the original: features [..., k] -> [..., 1]."""
        threshold, spread = self.border.to(features.dtype)
        beyond = (self.distance(features) - threshold) / spread
        return -torch.expm1(-self.strength * beyond.clamp(min=0)).unsqueeze(-1)


def misfit_of_guard(weights: dict[str, Tensor], hidden_size: int) -> str | None:
    """What is wrong with a guard's tensors for a model of that width, or None."""
    shapes = {name: list(tensor.shape) for name, tensor in weights.items()}
    centres = weights.get("centres", torch.empty(0, 0))
    clusters, directions = centres.shape if centres.ndim == 2 else (0, 0)
    expected = {"map": [hidden_size, directions], "centres": [clusters, directions], "border": [2]}
    if shapes != expected or not clusters:
        return f"holds tensors of shapes {shapes}; a guard of this model has {expected}"
    if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
        return "holds numbers that are not finite"
    return None
