"""The trained part: for one linear layer, what turns hidden states into a matrix, and the matrix into a weight change.

Knows nothing about models, chunks or files.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import GenerativeAdapterConfig
from .normalization import frobenius, newton_schulz, orthogonal_factors

_EPS = 1e-6


class Generator(nn.Module):
    """Writes and reads the memory of one linear layer of these sizes, in a block whose input has size `hidden_size`.
    All arithmetic is in float32, whatever the base's dtype.

    With N the block's normalised input, k = key(N), v = value(N):  S = Σ g kᵀ v  over tokens  [d_r, d_r],
    ΔW = s · output · norm(S)ᵀ · query  (arXiv 2411.05877; the paper's A1, A2, A3 and B are query, key, value, output,
    and its share g of a token is 1).
    """

    def __init__(self, hidden_size: int, in_features: int, out_features: int, config: GenerativeAdapterConfig) -> None:
        super().__init__()
        self.config = config
        size = config.state_size
        self.norm = nn.Parameter(torch.ones(hidden_size))
        offsets = len(config.key_offsets)
        self.key = nn.Parameter(_kaiming(offsets * size, hidden_size).view(offsets, size, hidden_size) / offsets**0.5)
        self.topic = nn.Parameter(_kaiming(size, hidden_size)) if config.topic_key else None
        self.gate = nn.Parameter(torch.zeros(hidden_size + 1)) if config.token_gate else None
        self.value = nn.Parameter(_kaiming(size, hidden_size))
        self.query = nn.Parameter(_kaiming(size, in_features))
        self.output = nn.Parameter(torch.zeros(out_features, size))

    def sums(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """S of each chunk, [C, d_r, d_r], from the block's inputs `hidden` [C, M, d] and `mask` [C, M] (0: padding)."""
        states = F.rms_norm(hidden.float(), self.norm.shape, self.norm, _EPS) * mask[..., None]
        keys = sum(_shifted(states, o) @ key.T for o, key in zip(self.config.key_offsets, self.key, strict=True))
        shares = mask[..., None].float()
        if self.topic is not None:
            keys = keys + (states.sum(1, keepdim=True) / shares.sum(1, keepdim=True).clamp_min(1)) @ self.topic.T
        if self.gate is not None:
            shares = shares * (states @ self.gate[:-1, None] + self.gate[-1]).sigmoid()
        return (keys * shares).mT @ (states @ self.value.T)

    def normalized(self, sums: Tensor) -> Tensor:
        """norm(S), shape of `sums` [..., d_r, d_r]: by an iteration with a gradient in training, exactly otherwise."""
        if self.config.normalization == "frobenius":
            return frobenius(sums)
        if self.training:
            return newton_schulz(sums, self.config.newton_schulz_steps)
        u, v = orthogonal_factors(sums, self.config.rank, self.config.tolerance)
        return u @ v.mT

    def lora(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """The weight change of S as a LoRA pair of scaling 1: A [..., r, in], B [..., out, r], for inference."""
        if self.config.normalization == "frobenius":
            u, sigma, vh = torch.linalg.svd(frobenius(sums).double())
            u, v = (u * sigma[..., None, :])[..., : self.config.rank], vh.mT[..., : self.config.rank]
            u, v = u.to(sums.dtype), v.to(sums.dtype)
        else:
            u, v = orthogonal_factors(sums, self.config.rank, self.config.tolerance)
        return u.mT @ self.query, self.config.scale * (self.output @ v)

    def change(self, x: Tensor, normalized: Tensor) -> Tensor:
        """ΔW x for inputs `x` [Q, N, in] of Q states `normalized` [Q, d_r, d_r]; [Q, N, out]."""
        return self.config.scale * ((x.float() @ self.query.T) @ normalized) @ self.output.T


def _shifted(states: Tensor, offset: int) -> Tensor:
    """At each place of [C, M, d] the state `offset` places behind it; 0 where there is none."""
    length = states.shape[1]
    behind, before = min(max(offset, 0), length), min(max(-offset, 0), length)
    return F.pad(states[:, behind : length - before], (0, 0, before, behind))


def _kaiming(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns) * math.sqrt(2 / columns)
