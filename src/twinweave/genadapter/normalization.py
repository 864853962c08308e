"""Making every remembered direction count alike: the polar factor U Vᵀ of a matrix, exact and differentiable.

Knows nothing about where the matrices come from.
"""

import torch
from torch import Tensor

# Coefficients of x -> a·x + b·x³ + c·x⁵ on singular values. The first grows small ones fast and keeps all below 1.3;
# the second has its fixed point at 1, which it reaches from there with its first and second derivative zero.
_GROW = (3.4445, -4.7750, 2.0315)
_SETTLE = (15 / 8, -10 / 8, 3 / 8)
_SETTLING_STEPS = 3
_SUBSPACE_STEPS = 2


def orthogonal_factors(matrix: Tensor, rank: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """U and V [..., n, rank], U Vᵀ being the polar factor of `matrix` [..., n, n] cut to its `rank` largest directions.

    Directions whose singular value is at most `tolerance` of the largest are zero in both: a sum over fewer tokens than
    n has null directions, which hold rounding alone and would be raised to full strength. Decomposed exactly, in
    float64, since the adapter of a text should not depend on a random state.
    """
    u, sigma, vh = torch.linalg.svd(matrix.double())
    kept = (sigma > tolerance * sigma[..., :1])[..., None, :rank].to(u.dtype)
    return (u[..., :rank] * kept).to(matrix.dtype), (vh.mT[..., :rank] * kept).to(matrix.dtype)


def newton_schulz(matrix: Tensor, steps: int) -> Tensor:
    """The polar factor of `matrix` [..., m, n], m ≤ n, by an iteration of matrix products, for training.

    The gradient of a decomposition has 1/(σᵢ - σⱼ) and 1/σᵢ in it and explodes where singular values meet or vanish;
    that of a polynomial does not. Directions with σ below about 3.4^-steps of the Frobenius norm are not grown to 1.
    """
    x = matrix / _norm(matrix)
    for step in range(steps):
        a, b, c = _GROW if step < steps - _SETTLING_STEPS else _SETTLE
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@torch.no_grad()
def leading_directions(matrix: Tensor, rank: int) -> Tensor:
    """Q [..., n, rank] with orthonormal columns, which span about the `rank` largest directions of the columns of
    `matrix` [..., n, n]; a constant for the gradient.

    Subspace iteration from a fixed start, so that the same matrix gives the same Q. Q·polar(Qᵀ S) is then the polar
    factor cut to these directions, at rank/n of the cost.
    """
    start = torch.randn(matrix.shape[-1], rank, generator=torch.Generator().manual_seed(0)).to(matrix)
    q = torch.linalg.qr(matrix @ start).Q
    for _ in range(_SUBSPACE_STEPS):
        q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ q).Q).Q
    return q


def frobenius(matrix: Tensor) -> Tensor:
    """`matrix` [..., n, n] divided by its Frobenius norm, times √n, the norm of an orthogonal matrix; 0 stays 0."""
    return matrix * (matrix.shape[-1] ** 0.5 / _norm(matrix))


def _norm(matrix: Tensor) -> Tensor:
    """The Frobenius norm [..., 1, 1], infinite where it is 0: a state that has read nothing stays 0, and so does its
    gradient, which a tiny divisor would make infinite."""
    norm = torch.linalg.matrix_norm(matrix, keepdim=True)
    return norm.masked_fill(norm == 0, torch.inf)
