"""Sliding clusters of the tokens a router has seen in training, and how far a token is from them.

Knows nothing about routers and experts. SLIM (arXiv 2410.07739), for a token x ∈ R^C and its nearest centre c:

    d = max over channels of |x − c| / σ − 1        (or the root mean square over channels in the maximum's place)
    c ← (1 − η) c + η · mean of the batch's tokens nearest to c,    σ² ← (1 − η) σ² + η · mean of their (x − c)²

A batch's sums are gathered while the model runs and taken over before its next run (`update`), so that a forward which
gradient checkpointing repeats in the backward pass finds the clusters of the first time.
"""

from collections.abc import Callable

import torch
from sklearn.cluster import kmeans_plusplus
from torch import Tensor, distributed, nn

from .config import SlimConfig

_FIRST_TOKENS = 256  # of the first batch, from which the clusters start
_LEAST_SHARE = 1e-6  # of the mean variance: what a channel's variance counts as at least


class SlidingClusters(nn.Module):
    """N_c clusters of vectors with C channels.

    Buffers, all fp32: `centres` and `variances`, [N_c, C]; `batches`, how many have been taken in (0: there are no
    clusters yet, and nothing is far from them). `track_running_stats`, as in torch's batch norm: whether running in
    training mode changes them.
    """

    centres: Tensor
    variances: Tensor
    batches: Tensor

    def __init__(self, channels: int, config: SlimConfig) -> None:
        super().__init__()
        self.distance = config.distance
        self.metric = config.cluster_metric
        self.rate = config.cluster_rate
        self.track_running_stats = True
        self.register_buffer("centres", torch.zeros(config.num_clusters, channels))
        self.register_buffer("variances", torch.ones(config.num_clusters, channels))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))
        self._first: Tensor | None = None  # tokens of the first batch
        self._start: Tensor | None = None  # the centres chosen among them
        self._sums: Tensor | None = None  # [N_c, 1 + 2·C]: tokens, and the sums of x − c and (x − c)²
        self.register_state_dict_pre_hook(lambda module, *_: module.update())

    @property
    def started(self) -> bool:
        """Whether there are clusters."""
        self._started = self.__dict__.get("_started") or bool(self.batches)  # read from the device until it is true
        return self._started

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SlidingClusters":
        """As in torch, but for the precision: what η = 0.01 of a batch adds is lost in bf16."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if (moved := getattr(self, name)).dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    @torch.no_grad()
    def forward(self, x: Tensor, attended: Tensor | None = None, gather: bool = False) -> Tensor | None:
        """How far each token is: [N, C] -> [N] in fp32, from -1 on; None while there are no clusters.

        `gather`: the tokens (those that are `attended`, bool [N]) are to be taken in by the next `update`.
        """
        x = x.float()
        gather = gather and self.training and self.track_running_stats
        if not self.started:
            if gather:
                kept = x if attended is None else x[attended]
                self._first = kept[:: max(1, len(kept) // _FIRST_TOKENS)][:_FIRST_TOKENS]
            return None
        nearest = self._nearest(x, self.centres)
        apart = x - self.centres[nearest]
        if gather:
            sums = self._sums_of(apart, nearest, attended, len(self.centres))
            self._sums = sums if self._sums is None else self._sums + sums
        scaled = apart.square_().mul_((1 / _floored(self.variances))[nearest])
        return (scaled.amax(-1) if self.distance == "max" else scaled.mean(-1)).sqrt() - 1

    def _nearest(self, x: Tensor, centres: Tensor) -> Tensor:
        """Index [N] of each token's cluster."""
        weight = 1 / _floored(self.variances) if self.metric == "mahalanobis" and self.started else None
        weighted = centres if weight is None else centres * weight
        squares = 0 if weight is None else x.square() @ weight.T  # without weights they are the same for all clusters
        return (squares - 2 * x @ weighted.T + (weighted * centres).sum(-1)).argmin(-1)

    @staticmethod
    def _sums_of(apart: Tensor, nearest: Tensor, attended: Tensor | None, clusters: int) -> Tensor:
        members = nn.functional.one_hot(nearest, clusters).to(apart.dtype)
        if attended is not None:
            members *= attended[:, None]
        return torch.cat((members.sum(0)[:, None], members.T @ apart, members.T @ apart.square()), -1)

    @torch.no_grad()
    def share(self) -> None:
        """Add up what all processes have gathered: each of them has to call it, whether or not it has seen a token."""
        if not self.started:
            self._choose_start()
            if self._start is None:
                return
        elif self._sums is None and _processes() > 1:
            self._sums = self.centres.new_zeros(len(self.centres), 1 + 2 * self.centres.shape[1])
        if self._sums is not None and _processes() > 1:
            distributed.all_reduce(self._sums)

    def _choose_start(self) -> None:
        """Centres among the first process's first tokens (k-means++), and this process's sums around them."""
        count, channels = self.centres.shape
        tokens = self.centres[:0] if self._first is None else self._first
        chosen = self.centres.new_zeros(count + 1, channels)  # the last row says whether there are any
        if _rank() == 0 and len(tokens) >= 2 * count:
            chosen[:count] = torch.from_numpy(kmeans_plusplus(tokens.cpu().numpy(), count, random_state=0)[0])
            chosen[count] = 1
        if _processes() > 1:
            distributed.broadcast(chosen, 0)
        self._first = None
        if not chosen[count, 0]:
            return
        self._start = chosen[:count]
        nearest = self._nearest(tokens, self._start)
        self._sums = self._sums_of(tokens - self._start[nearest], nearest, None, count)

    @torch.no_grad()
    def update(self) -> None:
        """Take in what was gathered, if anything was."""
        if self._sums is None:
            return
        count, moved, spread = self._sums.split((1, self.centres.shape[1], self.centres.shape[1]), -1)
        start, self._start, self._sums = self._start, None, None
        mean, variance = moved / count.clamp(min=1), spread / count.clamp(min=1)
        if start is not None:  # too few tokens for a variance of each cluster: they start with that around all centres
            pooled = (spread - count * mean.square()).sum(0) / count.sum()
            self.centres.copy_(start + mean)
            self.variances.copy_(pooled.expand_as(self.variances))
        else:
            rate = self.rate * (count > 0)
            self.centres += rate * mean
            self.variances += rate * (variance - self.variances)
        self.batches += 1


def _floored(variances: Tensor) -> Tensor:
    """Variances [N_c, C] of which none is so small that the distance is made by rounding."""
    return variances + _LEAST_SHARE * variances.mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny


def _processes() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _rank() -> int:
    return distributed.get_rank() if _processes() > 1 else 0
