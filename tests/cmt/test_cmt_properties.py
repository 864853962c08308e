"""Properties of the aggregator, the losses, padding and settings, for any input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from twinweave.cmt import CMTConfig
from twinweave.cmt.aggregator import Aggregator, pooled
from twinweave.cmt.compressor import padded_first
from twinweave.cmt.config import chunk_size_of
from twinweave.cmt.objective import contrasted, self_matching
from twinweave.errors import UsageError

seeds, sizes = st.integers(0, 10**6), st.integers(1, 5)


@settings(deadline=None, max_examples=30)
@given(seed=seeds, count=sizes, biased=st.booleans())
def test_order_and_repetition_of_memories_do_not_matter(seed, count, biased):
    torch.manual_seed(seed)
    config = CMTConfig(memory_tokens=3, aggregator_layers=2, aggregator_heads=2, aggregator_head_size=4)
    config.similarity_bias = biased
    psi = Aggregator(6, config)
    question, memories = torch.randn(2, 3, 6), torch.randn(2, count, 3, 6)
    with torch.no_grad():
        expected = psi(question, memories)
        for other in (memories[:, torch.randperm(count)], torch.cat((memories, memories), 1)):
            torch.testing.assert_close(psi(question, other), expected, rtol=1e-3, atol=1e-4)
        seen = torch.rand(2, count) < 0.5
        seen[:, 0] = True
        for row in range(2):
            alone = psi(question[row : row + 1], memories[row : row + 1, seen[row]])
            masked = psi(question, memories, seen)[row : row + 1]
            torch.testing.assert_close(masked, alone, rtol=1e-3, atol=1e-4)


@settings(deadline=None, max_examples=50)
@given(seed=seeds, questions=sizes, count=sizes, separation=st.floats(0, 2), identical=st.booleans())
def test_self_matching_is_a_double_loop(seed, questions, count, separation, identical):
    torch.manual_seed(seed)
    q = normalize(torch.randn(questions, 4), dim=-1)
    m = normalize(torch.ones(count, 4) if identical else torch.randn(count, 4), dim=-1).requires_grad_()
    belongs, same = torch.rand(questions, count) < 0.5, torch.eye(count, dtype=torch.bool)
    if count > 2 and not identical:  # of memories that are all equally near, either side may take any
        same[0, 1] = same[1, 0] = True
    found = self_matching(q, m, belongs, same, separation)
    terms = []
    for i in range(questions):
        mine = [j for j in range(count) if belongs[i, j]]
        if mine:
            own = max(mine, key=lambda j, i=i: (q[i] * m[j]).sum().item())
            others = [torch.exp(-((m[own] - m[j]) ** 2).sum()) for j in range(count) if not same[own, j]]
            terms.append(-(q[i] * m[own]).sum() + (separation * sum(others).log() if others else 0.0))
    expected = torch.stack(terms).mean() if terms else torch.tensor(0.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found.backward()
    assert torch.isfinite(m.grad).all()


@given(seed=seeds, alpha=st.floats(0, 5))
def test_contrasted_is_the_formula(seed, alpha):
    torch.manual_seed(seed)
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    torch.testing.assert_close(contrasted(a, b, alpha), (1 + alpha) * a - alpha * b, rtol=1e-4, atol=1e-4)
    assert torch.equal(contrasted(a, b, 0.0), a)


@given(rows=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=4))
def test_padding_goes_in_front_and_tokens_keep_their_order(rows):
    mask, ids = torch.tensor(rows).long(), torch.arange(4 * len(rows)).view(-1, 4)
    moved, seen = padded_first(ids, mask)
    for row in range(len(rows)):
        assert moved[row, seen[row] == 1].tolist() == ids[row, mask[row] == 1].tolist()
        assert seen[row].tolist() == sorted(mask[row].tolist())


@given(scale=st.floats(0.1, 100), seed=seeds)
def test_keys_have_length_one_whatever_the_size_of_a_memory(scale, seed):
    torch.manual_seed(seed)
    memory = torch.randn(2, 3, 8)
    torch.testing.assert_close(pooled(memory * scale), pooled(memory), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled(memory).norm(dim=-1), torch.ones(2))


@given(k=st.integers(1, 40), document=st.integers(1, 600), window=st.none() | st.integers(1, 700))
def test_chunks_fit_into_the_window(k, document, window):
    size = chunk_size_of(CMTConfig(memory_tokens=k, document_tokens=document), window)
    assert 1 <= size <= document
    if window is not None and window >= k + 2:
        assert 1 + size + k <= window


@pytest.mark.parametrize("name", ["memory_tokens", "document_tokens", "aggregator_layers", "prefix_rank", "top_k"])
@given(value=st.one_of(st.integers(max_value=0), st.booleans(), st.floats(), st.text(), st.none()))
def test_sizes_are_whole_numbers(name, value):
    with pytest.raises(UsageError, match=name):
        CMTConfig(**{name: value})


@given(value=st.one_of(st.floats(max_value=-1e-9), st.sampled_from([float("nan"), float("inf"), True, "1", None])))
def test_weights_are_numbers_of_at_least_zero(value):
    for name in ("memory_aware_weight", "self_matching_weight", "separation_weight"):
        with pytest.raises(UsageError, match=name):
            CMTConfig(**{name: value})


def test_settings_round_trip_and_unknown_ones():
    config = CMTConfig(memory_tokens=3, similarity_bias=True)
    assert CMTConfig.from_dict(config.to_dict()) == config
    with pytest.raises(UsageError):
        CMTConfig.from_dict({"memory_token": 3})
