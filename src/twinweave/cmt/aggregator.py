"""The aggregator: what the selected memories say to a question. Knows nothing about documents, banks or the base."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .config import CMTConfig

FIRST_SCALE = 50.0


class CrossAttentionBlock(nn.Module):
    """A pre-norm block: the question's vectors look into the memories, then a feed-forward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, memories: Tensor, bias: Tensor | None) -> Tensor:
        """x [B, k, W]; memories [B or 1, N, W], normalised; bias [B, 1, 1, N] of the logits, where there is one."""
        query = self.query(self.norm(x))
        if len(memories) < len(x):  # all rows see the same: one long row, instead of a copy of the memories for each
            query = query.view(1, -1, query.shape[-1])
            bias = None if bias is None else bias.expand(-1, -1, x.shape[1], -1).reshape(1, 1, query.shape[1], -1)
        key, value = self.key_value(memories).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query = query.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, k, W / H]
        found = scaled_dot_product_attention(query, key, value, attn_mask=bias)
        x = x + self.output(found.transpose(1, 2).flatten(2).view(x.shape))
        return x + self.feed_forward(x)


class Aggregator(nn.Module):
    """psi: M* from the question's vectors and the selected memories, by cross-attention.

    No position says which memory comes first, so their order cannot matter.
    """

    def __init__(self, hidden_size: int, settings: CMTConfig) -> None:
        super().__init__()
        width = settings.aggregator_heads * settings.aggregator_head_size
        self.question_in = nn.Linear(hidden_size, width, bias=False)
        self.memory_in = nn.Sequential(nn.Linear(hidden_size, width, bias=False), nn.LayerNorm(width))
        self.blocks = nn.ModuleList(
            CrossAttentionBlock(width, settings.aggregator_heads) for _ in range(settings.aggregator_layers)
        )
        # large, since cosines of texts of one kind lie close together
        self.similarity = nn.Parameter(torch.tensor(FIRST_SCALE).log()) if settings.similarity_bias else None
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden_size, bias=False))

    def forward(self, question: Tensor, memories: Tensor, seen_by: Tensor | None = None) -> Tensor:
        """M* [B, k, D] of questions [B, k, D] and memories [B, N, k, D], or [1, N, k, D] where all see the same.

        seen_by: bool [B, N], the memories that a question sees, at least one; None: all.
        """
        dtype = self.question_in.weight.dtype
        x, seen = self.question_in(question.to(dtype)), self.memory_in(memories.flatten(1, 2).to(dtype))
        bias = self._bias(question, memories)
        if seen_by is not None:
            bias = torch.zeros(seen_by.shape, device=x.device) if bias is None else bias
            bias = bias.masked_fill(~seen_by, float("-inf"))
        if bias is not None:
            # attention does not change by it, and half precision has finer steps around zero
            bias = bias - bias.amax(-1, keepdim=True)
            bias = bias.repeat_interleave(memories.shape[2], dim=1)[:, None, None].to(x.dtype)  # [B, 1, 1, N k]
        for block in self.blocks:
            x = block(x, seen, bias)
        return self.out(x)

    def _bias(self, question: Tensor, memories: Tensor) -> Tensor | None:
        """What is added to the attention's logits for each memory, [B, N]."""
        if self.similarity is None:
            return None
        cosines = (pooled(question).unsqueeze(1) * pooled(memories)).sum(-1)
        return cosines * self.similarity.exp()


def pooled(memories: Tensor) -> Tensor:
    """What memories are compared by: the mean of the k vectors [..., k, D], L2-normalised, [..., D]."""
    return torch.nn.functional.normalize(memories.float().mean(-2), dim=-1)
