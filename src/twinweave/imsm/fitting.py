"""Fitting the domain guard: one frozen pass over training and validation rows, then statistics of what it gave.

Knows nothing about recipes or training loops. Rows stream through: of each query k numbers are kept.
"""

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans
from sklearn.covariance import ledoit_wolf
from torch import Tensor

from ..errors import DataError
from .guard import DomainGuard, GuardSettings

if TYPE_CHECKING:
    from .model import IMSMModel

Batches = Iterable[Mapping[str, Tensor]]

_INPUTS = ("input_ids", "attention_mask", "labels", "query_mask")
_QUERIES_PER_CLUSTER = 10
_SHARE_HELD_OUT = 4  # at most one in so many training queries calibrates instead of a missing validation query
_FLOOR = 1e-6  # of the features' mean square: what rounding may move them by is no distance
_NEAREST = 1.0  # standard deviations: nothing nearer is strange, not even where all training queries are the same
_SLACK = 1e-3  # of the threshold: a query on the border stays within it however it is batched


def fit_guard(
    model: "IMSMModel", train: Batches, validation: Batches, settings: GuardSettings | None = None
) -> DomainGuard:
    """Give `model` a domain guard (`model.guard`, also returned) for the queries of the training data.

    `train`, `validation`: batches as for `forward`, each tensor [B, T], with labels (they say what the queries are);
    training batches in random order, read once. It depends on the base and the rows only, not on adapter and gate.
    Where validation has too few queries for `affected`, the last training queries help out; a warning says if that is
    not enough. Raises DataError without any training query.
    """
    settings = settings or GuardSettings()
    width = model.gate.hidden_size
    # of its own generator: the guard changes nothing about the run it is part of
    noise = torch.randn(width, min(settings.directions, width), generator=torch.Generator().manual_seed(0))
    directions = torch.linalg.qr(noise)[0]
    known = _features(model, train, directions, settings)
    fresh = _features(model, validation, directions, settings)
    if not len(known):
        raise DataError("The training rows have no query to fit the guard on: no label, or nothing to predict.")
    needed = math.ceil(1 / settings.affected) - 1
    lent = min(max(needed - len(fresh), 0), len(known) // _SHARE_HELD_OUT)
    known, fresh = known[: len(known) - lent], np.concatenate([fresh, known[len(known) - lent :]])
    whitening, centres = _statistics(known, settings.clusters)
    guard = DomainGuard(
        settings,
        directions @ torch.from_numpy(whitening).float(),
        torch.from_numpy(centres),
        torch.tensor([0.0, 1.0]),
    )
    distances = guard.distance(torch.from_numpy(fresh if len(fresh) else known) @ torch.from_numpy(whitening))
    if len(fresh) < needed:
        warnings.warn(
            f"The guard has {len(fresh)} queries to calibrate on, and affecting {settings.affected:.1%} of queries "
            f"takes {needed}: its border is the farthest of them, so a larger share may be affected. Give more rows.",
            stacklevel=2,
        )
    guard.border = _border(distances.numpy(), settings.affected)
    model.guard = guard.to(model.get_output_embeddings().weight.device)
    return guard


def _features(model: "IMSMModel", batches: Batches, directions: Tensor, settings: GuardSettings) -> np.ndarray:
    """What the frozen pass gives along `directions` [d, k] for every query (or label position): float64 [n, k]."""
    device = model.get_output_embeddings().weight.device
    directions = directions.to(device)
    found = [torch.empty(0, directions.shape[1])]
    for batch in batches:
        frozen = model.frozen_states(**{name: batch[name].to(device) for name in _INPUTS if name in batch})
        states = frozen.queries if settings.per == "query" else frozen.states
        found.append((states.float() @ directions).cpu())
    return torch.cat(found).double().numpy()


def _statistics(features: np.ndarray, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """The whitening [k, k] of features [n, k] within clusters, and the whitened centres [C, k]."""
    first = _whitening(features, features)  # clusters of near and far are told apart in every direction alike
    clusters = max(1, min(clusters, len(features) // _QUERIES_PER_CLUSTER))
    means = MiniBatchKMeans(clusters, n_init=3, random_state=0).fit(features @ first)
    centres = np.stack([features[means.labels_ == label].mean(0) for label in np.unique(means.labels_)])
    nearest = np.unique(means.labels_, return_inverse=True)[1]
    whitening = _whitening(features - centres[nearest], features)
    return whitening, centres @ whitening


def _whitening(deviations: np.ndarray, features: np.ndarray) -> np.ndarray:
    """W [k, k] with W Wᵀ the inverse of the deviations' covariance, shrunk as far as their number asks for."""
    covariance = ledoit_wolf(deviations)[0] if len(deviations) > 1 else np.zeros((deviations.shape[1],) * 2)
    floor = _FLOOR * np.square(features).mean() + np.finfo(np.float32).tiny
    return np.linalg.cholesky(np.linalg.inv(covariance + floor * np.eye(len(covariance))))


def _border(distances: np.ndarray, affected: float) -> Tensor:
    """τ and σ [2] from in-domain distances [n]: the conformal quantile, so that a new query from the same source lies
    beyond τ with a probability of at most `affected`; with too few distances the largest."""
    distances = np.sort(distances)
    rank = min(math.ceil((len(distances) + 1) * (1 - affected)), len(distances))
    threshold = max(distances[rank - 1] * (1 + _SLACK), _NEAREST)
    spread = max(threshold - np.median(distances), 0.1 * threshold)
    return torch.tensor([threshold, spread], dtype=torch.float32)
