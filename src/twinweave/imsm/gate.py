"""The low-rank gate that fuses two memories, channel by channel.

Knows nothing about tokens, queries or caches: whoever calls it says what the query projection of each position is.

Equations (IMSM, section 3.2), for one position with the query memories q, q' and the last hidden states h, h':

    u = [q; h; h'; q']            4d
    g = σ((u W_A) W_B)            d      W_A: 4d × r, W_B: r × d, no biases
    z = g ∘ h + (1 − g) ∘ h'      d

u is never built: u W_A is the sum of four d × r products, and the query's two are made once per query.
"""

import math

import torch
from torch import Tensor, nn

from .config import IMSMConfig

# The constant logits of fusions that are not learned: half of each memory; none of the original one, to the last bit,
# and yet finite, so that a retention of +inf still selects it.
_WITHOUT_PARAMETERS = {"average": 0.0, "enhanced": -1e4}


class MemoryGate(nn.Module):
    """The gate's parameters and arithmetic, in fp32 whatever the model's precision is.

    `w_a` is [4·d, r] (`[2·d, r]` for fusion="gate") in the paper's block order q, h, h', q'; `w_b` is [r, d].
    `w_b` starts at zero, so that training starts from equal shares of both memories.
    """

    def __init__(self, hidden_size: int, config: IMSMConfig) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.fusion = config.fusion
        self.dropout = nn.Dropout(config.gate_dropout)
        if self.fusion not in _WITHOUT_PARAMETERS:
            blocks = 4 if self.fusion == "query_gate" else 2
            self.w_a = nn.Parameter(torch.empty(blocks * hidden_size, config.gate_rank, dtype=torch.float32))
            self.w_b = nn.Parameter(torch.zeros(config.gate_rank, hidden_size, dtype=torch.float32))
            nn.init.kaiming_uniform_(self.w_a.T, a=math.sqrt(5))  # the initialisation of nn.Linear

    @property
    def reads_query(self) -> bool:
        """Whether `forward` needs query projections."""
        return self.fusion == "query_gate"

    def project_query(self, original: Tensor, enhanced: Tensor) -> Tensor:
        """Each position's share of the query blocks, h W_q + h' W_q': [B, T, d] twice -> [B, T, r] in fp32.

        The projection is linear, so the mean of these over the query equals the projection of the query memories.
        """
        d = self.hidden_size
        with torch.autocast(original.device.type, enabled=False):
            h, h_tuned = _precise(original), _precise(enhanced)
            w_a = self.w_a.to(h.dtype)
            return h @ w_a[:d] + h_tuned @ w_a[3 * d :]

    def forward(
        self,
        original: Tensor,
        enhanced: Tensor,
        query: Tensor | None,
        retention: float = 0.0,
        strangeness: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Fuse the memories: the fused state z [B, T, d] in the input's dtype, and the gate g [B, T, d] in fp32.

        `original`, `enhanced`: [B, T, d]. `query`: [B, T, r], the mean of `project_query` over each position's query;
        None where `reads_query` is false. `retention` is added to the logits. g is the share of the original memory;
        `strangeness` ([B, T, 1], from 0 to 1; see guard.py) says how much of the rest becomes the original's too.
        """
        with torch.autocast(original.device.type, enabled=False):
            h, h_tuned = _precise(original), _precise(enhanced)
            gate = torch.sigmoid(self._logits(h, h_tuned, query) + retention)
            if strangeness is not None:
                gate = torch.lerp(gate, gate.new_ones(()), strangeness)  # exact at both ends
            # lerp is exact at both ends and wherever the two memories are equal, so that a zero delta, or an infinite
            # retention, gives one memory back bit for bit.
            return torch.lerp(h_tuned, h, gate).to(enhanced.dtype), gate

    def _logits(self, h: Tensor, h_tuned: Tensor, query: Tensor | None) -> Tensor:
        if self.fusion in _WITHOUT_PARAMETERS:
            return torch.full_like(h, _WITHOUT_PARAMETERS[self.fusion])
        d = self.hidden_size
        w_a, w_b = self.w_a.to(h.dtype), self.w_b.to(h.dtype)
        start = d if self.reads_query else 0
        low_rank = h @ w_a[start : start + d] + h_tuned @ w_a[start + d : start + 2 * d]
        if query is not None:
            low_rank = low_rank + query
        return self.dropout(self.dropout(low_rank) @ w_b)


def _precise(states: Tensor) -> Tensor:
    """`states` in fp32; those of a model in fp64 stay as they are, since the ends would no longer be exact."""
    return states if states.dtype == torch.float64 else states.float()
