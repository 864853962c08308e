"""The gate's arithmetic against the paper's formula for one position, and its exact ends."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinweave.imsm import IMSMConfig, MemoryGate


def make_gate(d, rank, fusion="query_gate", seed=0, dtype=torch.float32):
    gate = MemoryGate(d, IMSMConfig(gate_rank=rank, fusion=fusion))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return gate.to(dtype)


def states(rows, length, d, seed, dtype=torch.float32):
    return torch.randn(4, rows, length, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


shapes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))


@given(shape=shapes, fusion=st.sampled_from(["query_gate", "gate", "average"]), retention=st.floats(-5, 5))
@settings(max_examples=80, deadline=None)
def test_one_position_at_a_time(shape, fusion, retention):
    rows, length, d, rank, seed = shape
    gate = make_gate(d, rank, fusion, seed)
    q, h, h_tuned, q_tuned = states(rows, length, d, seed)
    query = gate.project_query(q, q_tuned) if gate.reads_query else None
    with torch.no_grad():
        z, g = gate(h, h_tuned, query, retention)
    for b in range(rows):
        for t in range(length):
            if fusion == "average":
                logits = torch.zeros(d)
            else:
                blocks = (q, h, h_tuned, q_tuned) if fusion == "query_gate" else (h, h_tuned)
                u = torch.cat([block[b, t] for block in blocks])
                logits = (u @ gate.w_a) @ gate.w_b
            share = 1 / (1 + torch.exp(-(logits + retention)))
            torch.testing.assert_close(g[b, t], share, atol=1e-5, rtol=1e-4)
            mixed = share * h[b, t] + (1 - share) * h_tuned[b, t]
            torch.testing.assert_close(z[b, t], mixed, atol=1e-5, rtol=1e-4)


@given(shape=shapes, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
@settings(max_examples=60, deadline=None)
def test_the_ends_are_exact_in_every_precision(shape, dtype):
    rows, length, d, rank, seed = shape
    gate = make_gate(d, rank, seed=seed)
    _, h, h_tuned, _ = states(rows, length, d, seed, dtype)
    h = h * torch.tensor([1e-3, 1.0, 1e3])[seed % 3].to(dtype)
    query = gate.project_query(h, h_tuned)
    assert query.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.no_grad():
        for retention, end in ((math.inf, h), (-math.inf, h_tuned)):
            z, g = gate(h, h_tuned, query, retention)
            assert torch.equal(z, end)
            assert z.dtype == dtype
            assert (g == (1.0 if retention > 0 else 0.0)).all()
        assert torch.equal(gate(h, h, query, 0.3)[0], h)  # equal memories: whatever the gate says


@pytest.mark.parametrize("fusion", ["query_gate", "gate"])
def test_gradients(fusion):
    gate = make_gate(4, 2, fusion, dtype=torch.float64)
    q, h, h_tuned, q_tuned = (s.requires_grad_() for s in states(2, 3, 4, 1, torch.float64).unbind())

    def run(q, h, h_tuned, q_tuned, *_):
        return gate(h, h_tuned, gate.project_query(q, q_tuned) if gate.reads_query else None)[0]

    assert torch.autograd.gradcheck(run, (q, h, h_tuned, q_tuned, *gate.parameters()))


def test_a_fresh_gate_hears_both_alike():
    gate = MemoryGate(8, IMSMConfig())
    _, h, h_tuned, _ = states(2, 3, 8, 0)
    z, g = gate(h, h_tuned, gate.project_query(h, h_tuned))
    assert (g == 0.5).all()
    torch.testing.assert_close(z, (h + h_tuned) / 2)
    assert gate.w_a.std() > 0
    assert gate.w_a.abs().max() <= 1 / math.sqrt(4 * 8)


def test_the_projection_of_a_mean_is_the_mean_of_projections():
    gate = make_gate(6, 3)
    h, h_tuned, _, _ = states(1, 5, 6, 2)
    mean = gate.project_query(h, h_tuned).mean(1, keepdim=True)
    expected = gate.project_query(h.mean(1, keepdim=True), h_tuned.mean(1, keepdim=True))
    torch.testing.assert_close(mean, expected)


@pytest.mark.parametrize(("fusion", "rows"), [("query_gate", 4), ("gate", 2)])
def test_shapes_of_the_factors(fusion, rows):
    gate = MemoryGate(16, IMSMConfig(gate_rank=5, fusion=fusion))
    assert gate.w_a.shape == (rows * 16, 5)
    assert gate.w_b.shape == (5, 16)
    assert not list(MemoryGate(16, IMSMConfig(fusion="average")).parameters())
    assert not list(MemoryGate(16, IMSMConfig(fusion="enhanced")).parameters())


def test_the_enhanced_memory_alone_is_that_memory():
    gate = MemoryGate(16, IMSMConfig(fusion="enhanced"))
    h, h_tuned = torch.randn(2, 2, 5, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gate(h, h_tuned, None)[0], h_tuned)
    assert torch.equal(gate(h, h_tuned, None, retention=50.0)[0], h_tuned)
    assert torch.equal(gate(h, h_tuned, None, retention=float("inf"))[0], h)
    strange = torch.tensor([1.0, 0.0]).view(2, 1, 1).expand(2, 5, 1)
    assert torch.equal(gate(h, h_tuned, None, strangeness=strange)[0], torch.stack((h[0], h_tuned[1])))


def test_half_precision_states_are_gated_in_fp32():
    """A gate computed in bf16 would be off in the third digit."""
    gate = make_gate(16, 4)
    _, h, h_tuned, _ = states(2, 3, 16, 0, torch.bfloat16)
    got = gate(h, h_tuned, gate.project_query(h, h_tuned))[1]
    h, h_tuned = h.float(), h_tuned.float()
    assert got.dtype == torch.float32
    assert torch.equal(got, gate(h, h_tuned, gate.project_query(h, h_tuned))[1])


def test_autocast_does_not_touch_the_gate():
    gate = make_gate(16, 4)
    _, h, h_tuned, _ = states(2, 3, 16, 0)
    expected = gate(h, h_tuned, gate.project_query(h, h_tuned))
    with torch.autocast("cpu", torch.bfloat16):
        got = gate(h, h_tuned, gate.project_query(h, h_tuned))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, expected, strict=True))
