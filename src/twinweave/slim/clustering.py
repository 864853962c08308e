"""Sliding clusters of the tokens a router has seen in training, and how far a token is from them.

Knows nothing about routers and experts. SLIM (arXiv 2410.07739), for a token x ∈ R^C and its nearest centre c:

    d = max over channels of |x − c| / σ − 1        (or the root mean square over channels in the maximum's place)
    c ← (1 − η) c + η · mean of the batch's tokens nearest to c,    σ² ← (1 − η) σ² + η · mean of their (x − c)²

A batch's sums are gathered while the model runs, added up over all processes when it has (`share`), and taken in before
its next run (`update`), so that a forward which gradient checkpointing repeats in the backward pass finds the clusters
of the first time. (Where one backward pass follows several forwards, only the last one's.)
"""

from collections.abc import Callable, Mapping

import torch
from sklearn.cluster import kmeans_plusplus
from torch import Tensor, distributed, nn

from .config import SlimConfig

_FIRST_TOKENS = 256  # of the first batch, from which the clusters start; more where there are more than 128 of them
_LEAST_VARIANCE = 1e-14  # squared rounding of fp32: where all tokens are equal
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
        self._started = False
        self._first: Tensor | None = None  # as long as there are no clusters: some of the tokens seen so far
        self._sums: Tensor | None = None  # of the pass that runs, [N_c, 1 + 2·C]: tokens, sums of x − c and (x − c)²
        self._start: Tensor | None = None  # the centres chosen among the first tokens
        self._due: list[Tensor] = []  # the sums of earlier passes, of all processes
        self.register_state_dict_pre_hook(_update)
        self.register_load_state_dict_pre_hook(_forget_if_replaced)

    @property
    def started(self) -> bool:
        """Whether there are clusters."""
        self._started = self._started or bool(self.batches)  # read from the device until it is true
        return self._started

    def forget(self) -> None:
        """Leave out what the pass that runs has gathered so far, and before there are clusters all first tokens."""
        self._first = self._sums = None

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
        with torch.autocast(x.device.type, enabled=False):
            return self._distances(x.float(), attended, gather and self.training and self.track_running_stats)

    def _distances(self, x: Tensor, attended: Tensor | None, gather: bool) -> Tensor | None:
        if not self.started:
            if gather:
                seen = x if attended is None else x[attended]
                self._first = _some_of(
                    seen if self._first is None else torch.cat((self._first, seen)), self._most_first
                )
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
            apart = apart.masked_fill(~attended[:, None], 0)  # what padding holds may be no number
        return torch.cat((members.sum(0)[:, None], members.T @ apart, members.T @ apart.square()), -1)

    @torch.compiler.disable
    @torch.no_grad()
    def share(self) -> None:
        """Add up what all processes have gathered: each of them has to call it, whether or not it has seen a token.

        A batch in which a number has run over is left out: the clusters would never be numbers again.
        """
        sums, self._sums = self._sums, None
        if not self.started:
            if not self._due:
                self._choose_start()
            return
        if _processes() > 1:
            sums = self.centres.new_zeros(len(self.centres), 1 + 2 * self.centres.shape[1]) if sums is None else sums
            distributed.all_reduce(sums)
        if sums is not None:
            self._due.append(torch.where(sums.isfinite().all(), sums, torch.zeros_like(sums)))

    @property
    def _most_first(self) -> int:
        """How many of the first tokens a process keeps."""
        return max(1, max(_FIRST_TOKENS, 2 * len(self.centres)) // _processes())

    def _choose_start(self) -> None:
        """Centres among the first tokens of all processes (k-means++, the same in each), and the sums around them."""
        count = len(self.centres)
        tokens = _of_all(self.centres[:0] if self._first is None else self._first, self._most_first)
        tokens = tokens[tokens.isfinite().all(-1)]
        if len(tokens) < 2 * count:
            return  # the next batch's are added to them
        self._first = None
        self._start = torch.from_numpy(kmeans_plusplus(tokens.cpu().numpy(), count, random_state=0)[0]).to(tokens)
        with torch.autocast(tokens.device.type, enabled=False):
            nearest = self._nearest(tokens, self._start)
            self._due.append(self._sums_of(tokens - self._start[nearest], nearest, None, count))

    @torch.no_grad()
    def update(self) -> None:
        """Take in what was gathered and shared, if anything was."""
        due, self._due = self._due, []
        for sums in due:
            self._take_in(sums)

    def _take_in(self, sums: Tensor) -> None:
        sums = sums.to(self.centres.device)  # to which the model may have been moved since
        count, moved, spread = sums.split((1, self.centres.shape[1], self.centres.shape[1]), -1)
        start, self._start = self._start, None
        mean, variance = moved / count.clamp(min=1), spread / count.clamp(min=1)
        if start is not None:  # too few tokens for a variance of each cluster: they start with that around all centres
            pooled = (spread - count * mean.square()).sum(0) / count.sum()
            self.centres.copy_(start.to(mean.device) + mean)
            self.variances.copy_(pooled.expand_as(self.variances))
        else:
            rate = self.rate * (count > 0)
            self.centres += rate * mean
            self.variances += rate * (variance - self.variances)
        self.batches += 1


def _floored(variances: Tensor) -> Tensor:
    """Variances [N_c, C] of which none is so small that the distance is made by rounding."""
    return variances + _LEAST_SHARE * variances.mean(-1, keepdim=True) + _LEAST_VARIANCE


def _update(clusters: SlidingClusters, *_: object) -> None:
    clusters.update()


def _forget_if_replaced(clusters: SlidingClusters, state: Mapping[str, Tensor], prefix: str, *_: object) -> None:
    if f"{prefix}centres" in state:
        clusters.forget()
        clusters._start, clusters._due, clusters._started = None, [], False


def _some_of(tokens: Tensor, most: int) -> Tensor:
    """At most so many of them, evenly spread."""
    return (
        tokens[torch.linspace(0, len(tokens) - 1, most, device=tokens.device).long()] if len(tokens) > most else tokens
    )


def _of_all(tokens: Tensor, most: int) -> Tensor:
    """The tokens of all processes, in their order; each has at most so many."""
    if _processes() == 1:
        return tokens
    own = tokens.new_zeros(most, 1 + tokens.shape[1])  # the first column: whether it is one
    own[: len(tokens), 0], own[: len(tokens), 1:] = 1, tokens
    parts = [torch.empty_like(own) for _ in range(_processes())]
    distributed.all_gather(parts, own)
    found = torch.cat(parts)
    return found[found[:, 0] > 0, 1:]


def _processes() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
