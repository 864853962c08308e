"""The polar factor: exact, truncated where there is nothing, and with a gradient that stays finite."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinweave.genadapter.normalization import frobenius, leading_directions, newton_schulz, orthogonal_factors


def matrix_of_rank(n, rank, seed, spread=1.0):
    made = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(n, n, generator=made, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(n, n, generator=made, dtype=torch.float64))
    sigma = torch.zeros(n, dtype=torch.float64)
    sigma[:rank] = 1 + spread * torch.rand(rank, generator=made, dtype=torch.float64)
    return ((u * sigma) @ v.T).float(), (u[:, :rank] @ v[:, :rank].T).float()


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 12), rank=st.integers(0, 12), kept=st.integers(1, 12), seed=st.integers(0, 999),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e6]),
)  # fmt: skip
def test_kept_singular_values_are_one_and_no_more_than_there_are(n, rank, kept, seed, scale):
    rank, kept = min(rank, n), min(kept, n)
    matrix, _ = matrix_of_rank(n, rank, seed)
    u, v = orthogonal_factors(matrix * scale, kept, 1e-5)
    assert u.shape == v.shape == (n, kept)
    sigma = torch.linalg.svdvals((u @ v.T).double())
    count = min(rank, kept)
    torch.testing.assert_close(sigma[:count], torch.ones(count, dtype=torch.float64), rtol=0, atol=1e-5)
    assert (sigma[count:] < 1e-6).all()
    assert not u[:, count:].any()
    assert not v[:, count:].any()


def test_of_a_batch_each_matrix_is_cut_by_itself():
    small, _ = matrix_of_rank(6, 2, 0)
    large, _ = matrix_of_rank(6, 5, 1)
    batch = torch.stack([1e-8 * small, 1e8 * large, torch.zeros(6, 6)])
    u, v = orthogonal_factors(batch, 4, 1e-5)
    assert [int(torch.linalg.matrix_rank(m)) for m in u @ v.mT] == [2, 4, 0]


@pytest.mark.parametrize("rank", [0, 1, 3, 8])
def test_the_iteration_agrees_with_the_exact_factor(rank):
    matrix, polar = matrix_of_rank(8, rank, rank, spread=20.0)
    # float32 rounding in null directions, 1e-7 of the largest, is grown like the rest
    torch.testing.assert_close(newton_schulz(matrix, 12), polar, rtol=0, atol=1e-4 if rank == 8 else 2e-2)


@pytest.mark.parametrize(
    "matrix",
    [torch.zeros(6, 6), torch.eye(6), torch.ones(6, 6), torch.diag(torch.tensor([3.0, 3, 3, 1e-6, 0, 0]))],
    ids=["zero", "equal", "rank one", "repeated and vanishing"],
)
def test_the_gradient_of_the_iteration_is_finite(matrix):
    matrix = matrix.clone().requires_grad_()
    (newton_schulz(matrix, 12) * torch.randn(6, 6, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert torch.isfinite(matrix.grad).all()
    matrix.grad = None
    frobenius(matrix).sum().backward()
    assert torch.isfinite(matrix.grad).all()


@settings(deadline=None, max_examples=30)
@given(rank=st.integers(1, 7), seed=st.integers(0, 999))
def test_training_cuts_to_the_directions_that_reading_keeps(rank, seed):
    made = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(8, 8, generator=made)).Q for _ in range(2))
    sigma = torch.tensor([1.0] * rank + [0.05] * (8 - rank))
    matrix = (u * sigma) @ v.T
    q = leading_directions(matrix, rank)
    assert torch.equal(q, leading_directions(matrix, rank))
    torch.testing.assert_close(q.T @ q, torch.eye(rank), rtol=0, atol=1e-5)
    exact_u, exact_v = orthogonal_factors(matrix, rank, 1e-5)
    torch.testing.assert_close(q @ newton_schulz(q.T @ matrix, 12), exact_u @ exact_v.T, rtol=0, atol=1e-3)


def test_a_matrix_of_nothing_has_directions_too_and_stays_nothing():
    q = leading_directions(torch.zeros(2, 6, 6), 2)
    assert torch.isfinite(q).all()
    assert not (q @ newton_schulz(q.mT @ torch.zeros(2, 6, 6), 12)).any()


def test_frobenius_keeps_proportions():
    matrix, _ = matrix_of_rank(5, 3, 0)
    found = frobenius(matrix)
    assert float(torch.linalg.matrix_norm(found)) == pytest.approx(5**0.5, rel=1e-5)
    torch.testing.assert_close(found * (matrix[0, 0] / found[0, 0]), matrix)
    assert not frobenius(torch.zeros(5, 5)).any()
