"""A frozen linear layer with LoRA experts and identity experts beside it.

Knows nothing about the model around it. SLIM (arXiv 2410.07739), section 3:

    y = W x + b + Σ_i ŵ_i B'_i A'_i x        ŵ: the router's shares; identity experts add nothing
    B'_i A'_i: B_i A_i with a random set of B's rows and A's columns set to zero (dynamic merging)

All experts of a layer are one pair of products, with the shares between them: hidden = (x Aᵀ) ∘ ŵ, y += hidden B. Rows
and columns are masked in A and B themselves, so nothing of the size of W is ever built.
"""

import zlib
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import UnsupportedModelError
from .clustering import SlidingClusters
from .config import SlimConfig
from .router import Passing, Router, Routing
from .targets import sizes_of


class SlimLayer(nn.Module, BaseTunerLayer):
    """Wraps `base_layer`: anything from [..., C_in] to [..., C_out] that says its sizes; or a mixture of experts, from
    vectors of the model's `hidden_size` to such vectors or a tuple of which they are the first.

    Per adapter: `slim_A` [E, r, C_in], `slim_B` [E, r, C_out]; and, in the first layer of those that share a router,
    `slim_router` and `slim_clusters`. `name`, the layer's place in the model, makes its masks its own.
    """

    adapter_layer_names = ("slim_A", "slim_B", "slim_router")
    other_param_names = ("slim_clusters", "configs", "routings", "_drawn")

    def __init__(self, base_layer: nn.Module, name: str, adapter_name: str, hidden_size: int | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self._active_adapter = adapter_name
        self.in_features, self.out_features = sizes_of(base_layer, hidden_size)
        self.slim_A = nn.ParameterDict()
        self.slim_B = nn.ParameterDict()
        self.slim_router = nn.ModuleDict()
        self.slim_clusters = nn.ModuleDict()
        self.configs: dict[str, SlimConfig] = {}
        self.routings: dict[str, Routing] = {}
        self._drawn: dict[str, tuple[Tensor, Tensor]] = {}

    def update_layer(
        self, adapter_name: str, config: SlimConfig, passing: Passing, routing: Routing | None = None
    ) -> Routing:
        """Add an adapter, which goes along with the routing of another layer or gets (and returns) one of its own."""
        experts, r = config.num_experts, config.r
        bound = self.in_features**-0.5  # Kaiming-uniform, as in a linear layer
        self.slim_A[adapter_name] = nn.Parameter(torch.empty(experts, r, self.in_features).uniform_(-bound, bound))
        self.slim_B[adapter_name] = nn.Parameter(torch.zeros(experts, r, self.out_features))
        self.configs[adapter_name] = config
        if routing is None:
            router = Router(self.in_features, config)
            clusters = SlidingClusters(self.in_features, config) if config.yields else None
            self.slim_router[adapter_name] = router
            if clusters is not None:
                self.slim_clusters[adapter_name] = clusters
                passing.clusters.append(clusters)
            routing = Routing(router, clusters, passing)
            passing.routings.append(routing)
        else:
            routing.members += 1
        self.routings[adapter_name] = routing
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        return routing

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base layer's output, with what the active adapters add: [..., C_in] -> [..., C_out]."""
        whole = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return whole
        output = cast(Tensor, whole[0] if isinstance(whole, tuple) else whole)
        for name in self.active_adapters:
            if name in self.configs and (added := self._added(x, name)) is not None:
                output = output + added.view_as(output).to(output.dtype)
        return (output, *whole[1:]) if isinstance(whole, tuple) else output

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> Any:
        found = super()._get_base_layer_device_and_dtype(base_layer)
        if found[0] is None:  # a mixture of experts has no weight of its own
            weight = next(base_layer.parameters())
            found = weight.device, weight.dtype
        return found

    def _added(self, x: Tensor, name: str) -> Tensor | None:
        """What the LoRA experts add, [..., C_out]; None where every token went to identity experts."""
        shares = self.routings[name](x.reshape(-1, self.in_features))
        a, b = self.slim_A[name], self.slim_B[name]
        masks = self._masks(name, a)
        # In training all are computed all the same: every process has to come by every parameter.
        if not self.training:
            used = shares.any(0).nonzero()[:, 0]
            if not len(used):
                return None
            if len(used) < len(a):  # a few tokens, as in generation, need not read the experts that none of them chose
                a, b, shares = a.index_select(0, used), b.index_select(0, used), shares[:, used]
                masks = None if masks is None else (masks[0][used], masks[1][used])
        if masks is not None:
            a, b = a * masks[0][:, None], b * masks[1][:, None]
        hidden = x.reshape(-1, self.in_features).to(a.dtype) @ a.flatten(0, 1).T  # [N, E·r]
        hidden = (hidden.view(-1, *a.shape[:2]) * shares.to(hidden.dtype)[..., None]).flatten(1)
        return (hidden @ b.flatten(0, 1).to(hidden.dtype)).view(*x.shape[:-1], self.out_features)

    def _masks(self, name: str, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Which of A's columns and B's rows are kept, [E, C_in] and [E, C_out]: new ones at every training step, or
        those drawn from the seed. None: all of them."""
        config = self.configs[name]
        if not config.masking_ratio or not (self.training or config.merging_at_inference):
            return None
        if self.training:
            return self._draw(config, like)
        drawn = self._drawn.get(name)
        if drawn is None or (drawn[0].device, drawn[0].dtype) != (like.device, like.dtype):
            seed = zlib.crc32(f"{config.mask_seed}/{self.name}".encode())
            with torch.inference_mode(False):  # they will be needed where gradients are, too
                columns, rows = self._draw(config, torch.empty(0), torch.Generator().manual_seed(seed))
                self._drawn[name] = columns.to(like), rows.to(like)
        return self._drawn[name]

    def _draw(
        self, config: SlimConfig, like: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """A product of two masks that each keep √(1 - p) keeps 1 - p."""
        kept = (1 - config.masking_ratio) ** 0.5
        shape = (config.num_experts, self.in_features + self.out_features)
        mask = (torch.rand(shape, generator=generator, device=like.device) < kept).to(like.dtype)
        if config.rescale_merging:
            mask /= kept
        return mask[:, : self.in_features], mask[:, self.in_features :]

    def l1_norm(self, name: str) -> Tensor:
        """Σ over experts of ‖B‖₁ / (r·C_out) + ‖A‖₁ / (r·C_in)."""
        return torch.stack([_whole(w.abs().sum()) / w[0].numel() for w in (self.slim_A[name], self.slim_B[name])]).sum()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises UnsupportedModelError: what is added differs from token to token."""
        raise UnsupportedModelError(
            "SLIM decides for every token how much of which expert is added, so it cannot be merged into the weights. "
            "Save it with save_pretrained and load it onto its base."
        )

    def unmerge(self) -> None:
        """Nothing is ever merged."""


def _whole(value: Tensor) -> Tensor:
    """The sum over all processes, of a parameter that FSDP has spread over them."""
    return value.full_tensor() if isinstance(value, DTensor) else value
