"""The formula of the paper, term by term, against a loop that does as it says."""

import pytest
import torch
from torch import nn

from twinweave.genadapter import GenerativeAdapterConfig
from twinweave.genadapter.generator import Generator

HIDDEN, IN, OUT, SIZE, RANK = 6, 5, 7, 8, 3
EXTRAS = [{}, {"token_gate": True}, {"topic_key": True}, {"token_gate": True, "topic_key": True}]


def make(**settings):
    torch.manual_seed(0)
    config = GenerativeAdapterConfig(**{"state_size": SIZE, "rank": RANK, "scale": 0.25} | settings)
    generator = Generator(HIDDEN, IN, OUT, config)
    torch.nn.init.normal_(generator.output)
    torch.nn.init.normal_(generator.norm, mean=1.0, std=0.1)
    return generator.eval()


def by_hand(generator, hidden):
    """S of one chunk [M, d]: an outer product for each token."""
    total = torch.zeros(SIZE, SIZE)
    rows = [row / (row.pow(2).mean() + 1e-6).sqrt() * generator.norm for row in hidden]
    for row in rows:
        key, share = generator.key @ row, 1.0
        if generator.topic is not None:
            key = key + generator.topic @ (sum(rows) / len(rows))
        if generator.gate is not None:
            share = (generator.gate[:-1] @ row + generator.gate[-1]).sigmoid()
        total += share * torch.outer(key, generator.value @ row)
    return total


@torch.no_grad()
@pytest.mark.parametrize("extras", EXTRAS)
def test_the_sum_over_tokens(extras):
    generator = make(**extras)
    if generator.gate is not None:
        nn.init.normal_(generator.gate)
    hidden = torch.randn(2, 4, HIDDEN)
    found = generator.sums(hidden, torch.ones(2, 4))
    for one, chunk in zip(found, hidden, strict=True):
        torch.testing.assert_close(one, by_hand(generator, chunk))


@torch.no_grad()
@pytest.mark.parametrize("tokens", [2, 6])
def test_the_weight_change(tokens):
    generator, x = make(), torch.randn(4, IN)
    sums = by_hand(generator, torch.randn(tokens, HIDDEN))
    u, sigma, vh = torch.linalg.svd(sums)
    kept = [i for i in range(RANK) if sigma[i] > 1e-5 * sigma[0]]
    assert len(kept) == min(tokens, RANK)
    norm = sum(torch.outer(u[:, i], vh[i]) for i in kept)
    change = 0.25 * generator.output @ norm.T @ generator.query
    torch.testing.assert_close(generator.change(x[None], norm[None])[0], x @ change.T)
    a, b = generator.lora(sums)
    assert (a.shape, b.shape) == ((RANK, IN), (OUT, RANK))
    torch.testing.assert_close(b @ a, change)


@torch.no_grad()
def test_frobenius_in_the_place_of_the_decomposition():
    generator = make(normalization="frobenius", rank=SIZE)
    sums, x = torch.randn(SIZE, SIZE), torch.randn(1, 4, IN)
    a, b = generator.lora(sums)
    torch.testing.assert_close(generator.change(x, generator.normalized(sums[None])), x @ (b @ a).T)


@torch.no_grad()
@pytest.mark.parametrize("extras", EXTRAS)
def test_padding_may_hold_anything(extras):
    generator, hidden = make(**extras), torch.randn(1, 4, HIDDEN)
    expected = generator.sums(hidden, torch.ones(1, 4))
    padded = torch.cat((hidden, torch.full((1, 2, HIDDEN), torch.nan)), 1)
    torch.testing.assert_close(generator.sums(padded, torch.tensor([[1, 1, 1, 1, 0, 0]])), expected)


def test_padding_that_is_no_number_leaves_the_gradient_finite():
    generator = make()
    hidden = torch.full((1, 4, HIDDEN), torch.nan)
    hidden[:, :2] = torch.randn(1, 2, HIDDEN)
    generator.sums(hidden, torch.tensor([[1, 1, 0, 0]])).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in generator.parameters() if p.grad is not None)


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_autocast_changes_no_bit(training):
    generator = make().train(training)
    hidden, mask = torch.randn(2, 9, HIDDEN), torch.ones(2, 9)
    sums = generator.sums(hidden, mask)
    normalized = generator.normalized(sums)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(generator.sums(hidden, mask), sums)
        assert torch.equal(generator.normalized(sums), normalized)


@torch.no_grad()
@pytest.mark.parametrize("rank", [RANK, SIZE])
def test_a_loss_needs_no_decomposition_and_is_the_same_in_validation(rank, monkeypatch):
    generator = make(rank=rank)
    made = torch.randn(2, SIZE, rank) @ torch.randn(2, rank, SIZE)
    a, b = generator.lora(made)
    exact = (b @ a) / generator.config.scale

    def never(*args, **kwargs):
        raise AssertionError("decomposed")

    monkeypatch.setattr(torch.linalg, "svd", never)
    found = generator.normalized(made)
    assert torch.equal(generator.train().normalized(made), found)
    change = generator.output @ found.mT @ generator.query
    assert (change - exact).norm() < 0.02 * exact.norm()


def test_it_moves_without_losing_precision():
    generator = make()
    before = {name: p.detach().clone() for name, p in generator.named_parameters()}
    for moved in (generator.to(torch.bfloat16), generator.half(), generator.double()):
        assert all(torch.equal(p, before[name]) for name, p in moved.named_parameters())
    assert all(p.device.type == "meta" for p in generator.to("meta", torch.bfloat16).parameters())
