"""SLIM written as its equations are read, for comparison: a Python loop over experts, each with its masked product.

Everything that is learned, drawn or gathered is that of the SlimLayer it is made from; only how it is computed differs.
Tests prove the two equal. Knows nothing about what is measured.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from twinweave.slim.clustering import SlidingClusters
from twinweave.slim.layer import SlimLayer
from twinweave.slim.router import Routing

ADAPTER = "default"


class LiteralRouting:
    """Shares of all experts, once for each input that several layers read."""

    def __init__(self, routing: Routing) -> None:
        self.routing = routing
        self._kept: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        """Shares [N, E + identities] that sum to one, for x [..., C]."""
        if self._kept is not None and self._kept[0] is x:
            shares, self._kept = self._kept[1], None
            return shares
        tokens, router, clusters = x.flatten(0, -2), self.routing.router, self.routing.clusters
        logits = tokens @ router.weight.T
        if clusters is not None:
            further = torch.zeros_like(logits)
            further[:, router.num_experts :] = router.strength * distance(tokens.detach(), clusters, training)[:, None]
            logits = logits + further
        kept, chosen = logits.topk(router.top_k, dim=-1)
        shares = torch.zeros_like(logits).scatter(-1, chosen, kept.softmax(-1))
        self._kept = (x, shares) if self.routing.members > 1 else None
        return shares


@torch.no_grad()
def distance(x: Tensor, clusters: SlidingClusters, training: bool) -> Tensor:
    """How far tokens [N, C] are from the nearest clusters, [N]; in training the clusters then slide towards them."""
    centres, variances = clusters.centres, clusters.variances
    nearest = torch.cdist(x, centres).argmin(-1)
    apart = (x - centres[nearest]).abs() / variances[nearest].sqrt()
    found = apart.amax(-1) - 1 if clusters.distance == "max" else apart.square().mean(-1).sqrt() - 1
    if training:
        for index in nearest.unique():
            tokens, old = x[nearest == index], centres[index].clone()
            centres[index] = (1 - clusters.rate) * old + clusters.rate * tokens.mean(0)
            spread = (tokens - old).square().mean(0)
            variances[index] = (1 - clusters.rate) * variances[index] + clusters.rate * spread
    return found


class LiteralLayer(nn.Module):
    """y = W x + b + Σ_i ŵ_i B'_i A'_i x, with every B'_i A'_i of the size of W, for the tokens that chose it."""

    def __init__(self, slim: SlimLayer, routing: LiteralRouting) -> None:
        super().__init__()
        self.slim = slim
        self.routing = routing

    def forward(self, x: Tensor) -> Tensor:
        """[..., C_in] -> [..., C_out]."""
        output = self.slim.base_layer(x)
        tokens, shares = x.flatten(0, -2), self.routing(x, self.training)
        a, b = self.slim.slim_A[ADAPTER], self.slim.slim_B[ADAPTER]
        masks = self.slim._masks(ADAPTER, a)
        added = torch.zeros_like(output.flatten(0, -2))
        for expert in range(len(a)):
            chosen = shares[:, expert].nonzero()[:, 0]
            if len(chosen) == 0:
                continue
            masked_a = a[expert] if masks is None else a[expert] * masks[0][expert]
            masked_b = b[expert] if masks is None else b[expert] * masks[1][expert]
            product = masked_b.T @ masked_a  # [C_out, C_in]
            added = added.index_add(0, chosen, shares[chosen, expert, None] * (tokens[chosen] @ product.T))
        return cast(Tensor, output + added.view_as(output))


def literal_copy(slim: Any, base: Any) -> Any:
    """`base`, the model that `slim` (a PeftModel) was made of, with a LiteralLayer in the place of every SlimLayer.

    The two have their weights and their clusters in common; `base` is changed in place.
    """
    routings: dict[Routing, LiteralRouting] = {}
    for name, layer in slim.get_base_model().named_modules():
        if isinstance(layer, SlimLayer):
            routing = layer.routings[ADAPTER]
            base.set_submodule(name, LiteralLayer(layer, routings.setdefault(routing, LiteralRouting(routing))))
    return base


def literal_l1(model: nn.Module) -> Tensor:
    """μ Σ over layers and experts of ‖B‖₁ / (r·C_out) + ‖A‖₁ / (r·C_in)."""
    total = torch.zeros((), device=next(model.parameters()).device)
    for layer in model.modules():
        if isinstance(layer, LiteralLayer):
            for a, b in zip(layer.slim.slim_A[ADAPTER], layer.slim.slim_B[ADAPTER], strict=True):
                norms = b.abs().sum() / b.numel() + a.abs().sum() / a.numel()
                total = total + layer.slim.configs[ADAPTER].l1_weight * norms
    return total
