"""The settings of SLIM. Knows nothing about layers or models."""

from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from peft import PeftConfig
from peft.utils import PeftType

from ..errors import UsageError, unknown_name

Distance = Literal["max", "rms"]
ClusterMetric = Literal["euclidean", "mahalanobis"]
RouterSharing = Literal["input", "layer"]


class PeftName(str):
    """The name of a PEFT type that is not in PEFT's enum, with the one attribute of its members that PEFT reads."""

    @property
    def value(self) -> str:
        """The name itself."""
        return str.__str__(self)

    def __str__(self) -> str:
        return f"PeftType.{self.value}"  # as the enum's members are written, which PEFT takes apart


SLIM = cast(PeftType, PeftName("SLIM"))


@dataclass
class SlimConfig(PeftConfig):
    """Soft LoRA and identity mixture (SLIM, arXiv 2410.07739): which layers get it, and how it works.

    The paper's own setting is the default but for `distance` (see there). A plain mixture of LoRA experts is
    `num_identity_experts=0, masking_ratio=0, l1_weight=0`.
    """

    r: int = 16
    """Rank of each LoRA expert. All experts together have the parameters of one LoRA of rank num_experts · r."""

    num_experts: int = 8
    """LoRA experts per layer."""

    num_identity_experts: int = 2
    """Identity experts per layer: they add nothing, and their share is what the LoRA experts are weakened by."""

    top_k: int = 2
    """How many experts each token keeps, of both kinds. All of them: a soft mixture, as in LoRAMoE."""

    yielding_strength: float = 1.0
    """γ: how much a token's distance from the training data's clusters adds to the identity experts' logits. 0: not."""

    distance: Distance = "rms"
    """How far a token is from its cluster, in standard deviations: over the channels their root mean square, or their
    maximum. The paper's is the maximum, which grows with the number of channels even inside the domain."""

    num_clusters: int = 8
    """Clusters of the training data's tokens, per router."""

    cluster_rate: float = 0.01
    """η: the share of each training batch in the clusters' centres and variances."""

    cluster_metric: ClusterMetric = "euclidean"
    """What nearest means when a token looks for its cluster: squared distance, or that in units of the variance."""

    masking_ratio: float = 0.5
    """p of dynamic merging: the expected share of each expert's product B·A that is masked, by whole rows and columns,
    anew at every training step. 0: no merging."""

    merging_at_inference: bool = True
    """Whether masks drawn once, from `mask_seed`, are applied outside training too."""

    rescale_merging: bool = False
    """Whether what the masks leave is divided by 1 - p, as DARE does."""

    mask_seed: int = 0
    """What the masks of inference are drawn from."""

    l1_weight: float = 1e-2
    """μ: weight of the mean absolute value of A and B, summed over experts and layers, in the training loss."""

    router_sharing: RouterSharing = "input"
    """One router for all layers that read the same input (the gate and up projections of a gated feed-forward), or one
    for each layer."""

    router_init_std: float = 0.02
    """Standard deviation of the router's first weights."""

    target_modules: list[str] | str | None = field(default=None)
    """Names of the layers to adapt, as in LoraConfig; None: the linear layers of every feed-forward, as published.

    A mixture of experts, which most models keep in one tensor, is adapted as a whole, unless its block has linear
    layers of its own (shared experts): SLIM then reads what the mixture reads and adds to its output. Experts that are
    linear layers get SLIM each; what is padding among the tokens that the base's router sends them is not known."""

    exclude_modules: list[str] | str | None = None
    """Layers among them to leave out."""

    layers_to_transform: list[int] | int | None = None
    """Indices of the blocks to adapt; None: all."""

    layers_pattern: list[str] | str | None = None
    """Name of the list of blocks, where it is an unusual one."""

    modules_to_save: list[str] | None = None
    """Further modules to train and save as they are."""

    base_fingerprint: dict[str, Any] | None = None
    """Identifies the base that the adapter belongs to; written when the adapter is made."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SLIM
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # PEFT matches sets
        for name, kinds in (
            ("distance", Distance),
            ("cluster_metric", ClusterMetric),
            ("router_sharing", RouterSharing),
        ):
            if (value := getattr(self, name)) not in get_args(kinds):
                raise UsageError(unknown_name(name, str(value), get_args(kinds)))
        least = {"r": 1, "num_experts": 1, "num_identity_experts": 0, "num_clusters": 1, "mask_seed": 0, "top_k": 1}
        for name, lowest in least.items():
            if not _is_whole(value := getattr(self, name)) or value < lowest:
                raise UsageError(f"{name} is {value!r}; it must be a whole number of at least {lowest}.")
        if self.top_k > self.experts:
            raise UsageError(
                f"top_k is {self.top_k!r}; it must lie between 1 and the number of experts, {self.experts}."
            )
        for name in ("yielding_strength", "l1_weight", "router_init_std", "masking_ratio", "cluster_rate"):
            if not _is_number(value := getattr(self, name)) or not 0 <= value < float("inf"):
                raise UsageError(f"{name} is {value!r}; it must be a finite number of at least 0.")
        if self.masking_ratio >= 1:
            raise UsageError(f"masking_ratio is {self.masking_ratio!r}; it must lie in [0, 1).")
        if not 0 < self.cluster_rate <= 1:
            raise UsageError(f"cluster_rate is {self.cluster_rate!r}; it must lie in (0, 1].")
        for name in ("merging_at_inference", "rescale_merging"):
            if not isinstance(value := getattr(self, name), bool):
                raise UsageError(f"{name} is {value!r}; it must be true or false.")

    @property
    def experts(self) -> int:
        """LoRA and identity experts together."""
        return self.num_experts + self.num_identity_experts

    @property
    def yields(self) -> bool:
        """Whether tokens are compared with clusters at all."""
        return self.num_identity_experts > 0 and self.yielding_strength > 0


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or isinstance(value, float)
