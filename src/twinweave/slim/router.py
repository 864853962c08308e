"""Which experts a token goes to, and how much of each: [N, C] tokens -> [N, E] shares of the LoRA experts.

Knows nothing about what the experts do. SLIM (arXiv 2410.07739), with logits R(x) = x Wᵀ, LoRA experts first:

    w_i = R(x)_i for LoRA experts, R(x)_i + γ·d for identity experts        (d: how far x is from the training data)
    ŵ = softmax(w) over the K largest, 0 elsewhere; the shares are ŵ_i / Σ ŵ over all kept experts, identities included

The identities' share is what is missing to one: it is never given to the LoRA experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .clustering import SlidingClusters
from .config import SlimConfig


class Router(nn.Module):
    """A linear layer without bias, `weight` [E + identities, C], and the choice of the top K."""

    def __init__(self, channels: int, config: SlimConfig) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.strength = config.num_experts, config.top_k, config.yielding_strength
        self.weight = nn.Parameter(torch.empty(config.experts, channels))
        nn.init.normal_(self.weight, std=config.router_init_std)

    def forward(self, x: Tensor, distance: Tensor | None = None) -> Tensor:
        """Shares [N, E] of the LoRA experts for tokens [N, C], in fp32; `distance` [N] weakens them, None not."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            logits = x @ self.weight.to(x.dtype).T
            if distance is not None:
                lora, identity = logits.split((self.num_experts, logits.shape[1] - self.num_experts), -1)
                logits = torch.cat((lora, identity + self.strength * distance[:, None].to(x.dtype)), -1)
            kept, chosen = logits.topk(self.top_k, dim=-1)
            shares = torch.zeros_like(logits).scatter(-1, chosen, kept.softmax(-1))
            return shares[:, : self.num_experts]


class Passing:
    """What the layers of one model know of the pass that is running: whether one is, and which tokens are real; and the
    clusters that take tokens in meanwhile, in an order that is the same in every process."""

    def __init__(self) -> None:
        self.entered: list[nn.Module] = []
        """The model and its decoder while they run: none between passes, or where a backward pass repeats parts."""
        self.settled = False
        """Whether the clusters have taken in what earlier passes gathered."""
        self.attention_mask: Tensor | None = None
        self.clusters: list[SlidingClusters] = []
        self.routings: list[Routing] = []

    def settle(self) -> None:
        """Let the clusters take in what earlier passes gathered, once in a pass.

        Only a pass that goes through them asks for it: others may come before the last step's backward pass.
        """
        if not self.settled:
            for clusters in self.clusters:
                clusters.update()
        self.settled = True

    def attended(self, x: Tensor) -> Tensor | None:
        """Which of the tokens [N, C] are real, bool [N]; None where all are, or where nothing says."""
        mask = self.attention_mask
        return mask.reshape(-1).to(x.device).bool() if mask is not None and mask.numel() == len(x) else None


@dataclass
class Answer:
    """The shares of an input, as long as other layers may ask for them."""

    x: Tensor
    version: int | None
    """How often x had been changed in place; None where torch does not count it."""
    shares: Tensor
    waiting: int
    with_graph: bool

    def fits(self, x: Tensor) -> bool:
        """Whether it is the answer for x: while the input is held, its place in memory is not another's."""
        alike = self.version == _version(x) and self.with_graph == torch.is_grad_enabled()
        return alike and self.x.data_ptr() == x.data_ptr() and self.x.shape == x.shape


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


class Routing:
    """One router and its clusters, for all layers of a module that read the same input.

    The shares of an input are kept until as many layers as there are have asked for them.
    """

    def __init__(self, router: Router, clusters: SlidingClusters | None, passing: Passing) -> None:
        self.router, self.clusters, self.passing = router, clusters, passing
        self.members = 1
        self._kept: Answer | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Shares [N, E] of the LoRA experts for tokens [N, C]."""
        kept = self._kept
        if kept is not None and kept.fits(x):
            kept.waiting -= 1
            self._kept = kept if kept.waiting else None
            return kept.shares
        distance = None
        if self.clusters is not None:
            running = bool(self.passing.entered)
            if running and self.clusters.track_running_stats:
                self.passing.settle()
            learns = self.router.weight.requires_grad  # or the adapter is there to be used
            distance = self.clusters(x, self.passing.attended(x), gather=running and learns)
        shares = self.router(x, distance)
        waiting = self.members - 1
        self._kept = Answer(x, _version(x), shares, waiting, torch.is_grad_enabled()) if waiting else None
        return shares

    def release(self) -> None:
        """Keep no answer, and with it no input and no graph."""
        self._kept = None


@contextmanager
def watch_identity(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within the block, the list gets from each router that runs the share of identity experts for its tokens, [N]."""
    seen: list[Tensor] = []
    routers = [module for module in model.modules() if isinstance(module, Router)]
    hooks = [r.register_forward_hook(lambda module, x, shares: seen.append(1 - shares.sum(-1))) for r in routers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
