"""The shares of the experts against the formula, computed literally, token by token."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinweave.slim import SlimConfig
from twinweave.slim.clustering import SlidingClusters
from twinweave.slim.router import Passing, Router, Routing


def make_router(channels=6, seed=0, std=1.0, **changes):
    torch.manual_seed(seed)
    config = SlimConfig(**{"num_experts": 3, "num_identity_experts": 2, "router_init_std": std} | changes)
    return Router(channels, config).double()


def literal(router, x, distance, config):
    """Shares of all experts, [N, E + identities]."""
    rows = []
    for n, token in enumerate(x):
        logits = [float(token @ w) for w in router.weight.detach()]
        for i in range(config["num_experts"], len(logits)):
            logits[i] += config["yielding_strength"] * (float(distance[n]) if distance is not None else 0.0)
        kept = sorted(range(len(logits)), key=lambda i: -logits[i])[: config["top_k"]]
        largest = max(logits)
        total = sum(math.exp(logits[i] - largest) for i in kept)
        rows.append([math.exp(v - largest) / total if i in kept else 0.0 for i, v in enumerate(logits)])
    return torch.tensor(rows, dtype=torch.float64)


@given(
    seed=st.integers(0, 10_000),
    experts=st.integers(1, 6),
    identities=st.integers(0, 3),
    share=st.floats(0, 1),
    strength=st.floats(0, 4),
    far=st.sampled_from([None, 1.0, 30.0]),
)
@settings(max_examples=60, deadline=None)
def test_shares_are_the_formula(seed, experts, identities, share, strength, far):
    top_k = 1 + round(share * (experts + identities - 1))
    changes = {
        "num_experts": experts, "num_identity_experts": identities, "top_k": top_k, "yielding_strength": strength,
    }  # fmt: skip
    router = make_router(seed=seed, **changes)
    x = torch.randn(7, 6, dtype=torch.float64)
    distance = None if far is None else far * torch.rand(7) - 1
    expected = literal(router, x, distance, changes)
    found = router(x, distance)
    torch.testing.assert_close(found, expected[:, :experts], atol=1e-6, rtol=1e-6)
    # with the identities' they are one: nothing is given to the LoRA experts for it
    torch.testing.assert_close(found.sum(1), 1 - expected[:, experts:].sum(1), atol=1e-6, rtol=1e-6)
    assert ((found > 0).sum(1) <= top_k).all()
    assert found.dtype == torch.float64


def test_lora_shares_are_not_renormalised():
    router = make_router(num_experts=1, num_identity_experts=1, top_k=2)
    with torch.no_grad():
        router.weight.zero_()
    assert torch.allclose(router(torch.randn(3, 6)), torch.full((3, 1), 0.5))
    shares = router(torch.randn(3, 6), torch.tensor([0.0, 1.0, 3.0]))[:, 0]
    torch.testing.assert_close(shares.float(), 1 / (1 + torch.tensor([0.0, 1.0, 3.0]).exp()))


def test_a_distant_token_goes_to_identity_alone():
    router = make_router()
    x = torch.randn(20, 6, dtype=torch.float64)
    assert (router(x).sum(1) > 0).any()
    assert not router(x, torch.full((20,), 500.0)).any()
    near = router(x, torch.full((20,), -500.0))
    torch.testing.assert_close(near.sum(1), torch.ones(20, dtype=torch.float64))


def test_no_distance_is_a_distance_of_zero():
    router, x = make_router(), torch.randn(9, 6, dtype=torch.float64)
    assert torch.equal(router(x), router(x, torch.zeros(9)))
    assert not torch.allclose(router(x), router(x, torch.ones(9)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_shares_are_computed_in_single_precision_at_least(dtype):
    router, x = make_router().float(), torch.randn(9, 6).to(dtype)
    expected = router(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = router(x)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_gradients_reach_the_router_and_the_input():
    router, x = make_router(), torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: torch.func.functional_call(router, {"weight": w}, (x,)),
                                    (x, router.weight.detach().requires_grad_()))  # fmt: skip


# --- from clusters to shares -------------------------------------------------------------------------------------


def make_routing(members=1, std=1.0):
    torch.manual_seed(0)
    config = SlimConfig(num_experts=3, num_clusters=2, router_init_std=std)
    clusters = SlidingClusters(6, config).eval()
    clusters.batches.fill_(1)
    routing = Routing(Router(6, config), clusters, Passing())
    routing.members = members
    return routing


def test_a_token_far_from_every_cluster_has_no_lora_share():
    routing = make_routing(std=0.02)
    near = 0.3 * torch.randn(30, 6)
    far = 1e3 * torch.ones(30, 6) + near
    assert (routing(near).sum(1) > 0).float().mean() > 0.5
    assert not routing(far).any()


def test_members_are_given_the_same_answer_once_and_it_is_not_kept():
    routing = make_routing(members=3)
    calls = []
    routing.router.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 5, 6)
    for _ in range(2):
        first = routing(x.reshape(-1, 6))
        assert routing(x.reshape(-1, 6)) is routing(x.reshape(-1, 6)) is first
        assert routing._kept is None
    assert len(calls) == 2


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_other_inputs_are_routed_by_themselves(mode):
    routing, alone = make_routing(members=2), make_routing()
    with mode():
        x = torch.randn(5, 6)
        for other in (x.clone(), x[:3], 2 * x, torch.randn(5, 6)):
            assert torch.equal(routing(x), alone(x))
            assert torch.equal(routing(other), alone(other))
            routing._kept = None
    if mode is not torch.inference_mode:  # tensors of which there have no version
        routing(x)
        x += 1.0  # in place
        assert torch.equal(routing(x), alone(x))


def test_an_answer_without_a_graph_is_not_given_where_one_is_needed():
    routing, x = make_routing(members=2), torch.randn(5, 6)
    with torch.no_grad():
        assert not routing(x).requires_grad
    assert routing(x).requires_grad
