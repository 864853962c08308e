"""The trained part: for one linear layer, what turns hidden states into a matrix, and the matrix into a weight change.

Knows nothing about models, chunks or files.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import GenerativeAdapterConfig
from .normalization import frobenius, leading_directions, newton_schulz, orthogonal_factors

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
        self.key = nn.Parameter(_kaiming(size, hidden_size))
        self.topic = nn.Parameter(_kaiming(size, hidden_size)) if config.topic_key else None
        self.gate = nn.Parameter(torch.zeros(hidden_size + 1)) if config.token_gate else None
        self.value = nn.Parameter(_kaiming(size, hidden_size))
        self.query = nn.Parameter(_kaiming(size, in_features))
        self.output = nn.Parameter(torch.zeros(out_features, size))

    def sums(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """S of each chunk, [C, d_r, d_r], from the block's inputs `hidden` [C, M, d] and `mask` [C, M] (0: padding)."""
        # what a base makes of padding may not even be a number; a zero stays zero through the norm
        hidden = hidden.float().masked_fill(mask[..., None] == 0, 0.0)
        with _full_precision(hidden):
            states = F.rms_norm(hidden, self.norm.shape, self.norm, _EPS)
            keys, values = states @ self.key.T, states @ self.value.T
            if self.topic is not None:
                topics = states.sum(1, keepdim=True) / mask.sum(1)[:, None, None].clamp_min(1)
                keys = keys + topics @ self.topic.T
            if self.gate is not None:
                values = values * (states @ self.gate[:-1, None] + self.gate[-1]).sigmoid()
            return keys.mT @ values

    def normalized(self, sums: Tensor) -> Tensor:
        """norm(S), shape of `sums` [..., d_r, d_r], by an iteration with a gradient; `lora` has the exact one.

        The loss of a validation is computed by it as that of training is: one objective for both, and no
        decomposition for every state.
        """
        with _full_precision(sums):
            if self.config.normalization == "frobenius":
                return frobenius(sums)
            if self.config.rank == self.config.state_size:
                return newton_schulz(sums, self.config.newton_schulz_steps)
            q = leading_directions(sums, self.config.rank)  # what reading will keep
            return q @ newton_schulz(q.mT @ sums, self.config.newton_schulz_steps)

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Generator":
        """Moves with the base, but keeps its precision: what was read is compared to the last bit."""

        def moved(tensor: Tensor) -> Tensor:
            made = fn(tensor)
            return made if made.dtype == tensor.dtype else tensor.to(made.device)

        super()._apply(moved, recurse)
        return self


def gathered(reads: Tensor, sums: Tensor) -> Tensor:
    """The sums of each state, [Q, n, n], from `reads` [Q, C] and those of each chunk, [C, n, n]."""
    with _full_precision(sums):
        return torch.einsum("qc,cij->qij", reads, sums)


def _full_precision(tensor: Tensor) -> torch.autocast:
    """Where autocast does nothing: a sum over a long text in bfloat16 would stop growing."""
    return torch.autocast(tensor.device.type, enabled=False)


def _kaiming(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns) * math.sqrt(2 / columns)
