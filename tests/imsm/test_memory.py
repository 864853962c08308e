"""The query memory and the paired caches against slow implementations with loops."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from twinweave.imsm.cache import TwinCache, is_empty, pair, pair_with_empty_copy
from twinweave.imsm.memory import ends_of_labels, extend, query_mean

K = 3


@st.composite
def masks(draw, rows, columns):
    bits = st.lists(st.booleans(), min_size=columns, max_size=columns)
    return torch.tensor([draw(bits) for _ in range(rows)]).view(rows, columns)


@st.composite
def streams(draw):
    """Features [B, T, k], two masks, and where to cut them into chunks."""
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    features = torch.randn(rows, columns, K, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    cuts = sorted(draw(st.sets(st.integers(1, columns - 1), max_size=4))) if columns > 1 else []
    return features, draw(masks(rows, columns)), draw(masks(rows, columns)), [0, *cuts, columns]


def mean_by_loop(features, included, ends):
    rows, columns = ends.shape
    out = torch.zeros(rows, columns, features.shape[-1])
    for b in range(rows):
        for t in range(columns):
            chosen = [features[b, c] for c in range(int(ends[b, t])) if included[b, c]]
            if chosen:
                out[b, t] = torch.stack(chosen).mean(0)
    return out


@given(stream=streams(), said=st.sampled_from(["chunk", "everything", "nothing"]), data=st.data())
@settings(max_examples=150, deadline=None)
def test_running_means_in_any_chunks(stream, said, data):
    features, attended, asked, cuts = stream
    rows, columns = attended.shape
    bounds = st.lists(st.integers(0, columns), min_size=rows * columns, max_size=rows * columns)
    ends = torch.tensor(data.draw(bounds)).view(rows, columns)
    state = None
    for start, end in pairwise(cuts):
        match said:
            case "chunk":
                state = extend(features[:, start:end], attended[:, start:end], asked[:, start:end], state)
            case "everything":
                state = extend(features[:, start:end], attended[:, :end], asked[:, :end], state)
            case "nothing":
                state = extend(features[:, start:end], state=state)
        assert state.columns == end
    included = torch.ones_like(attended) if said == "nothing" else attended & asked
    torch.testing.assert_close(query_mean(state, ends), mean_by_loop(features, included, ends), atol=1e-5, rtol=1e-5)


@given(stream=streams())
@settings(max_examples=60, deadline=None)
def test_the_last_word_about_a_column_counts(stream):
    """Earlier columns become padding, or query, when a later call says so."""
    features, attended, asked, cuts = stream
    if len(cuts) == 2:
        return
    state = None
    for start, end in pairwise(cuts[:-1]):
        state = extend(features[:, start:end], ~attended[:, :end], ~asked[:, :end], state)
    state = extend(features[:, cuts[-2] :], attended, asked, state)
    ends = torch.arange(1, attended.shape[1] + 1).expand_as(attended)
    expected = mean_by_loop(features, attended & asked, ends)
    torch.testing.assert_close(query_mean(state, ends), expected, atol=1e-5, rtol=1e-5)


def test_silence_after_a_query_mask_is_no_query():
    features = torch.arange(4.0).view(1, 4, 1)
    state = extend(features[:, :2], asked=torch.tensor([[True, False]]))
    state = extend(features[:, 2:], state=state)
    assert query_mean(state, torch.tensor([[4]])).item() == 0.0
    open_state = extend(features[:, 2:], state=extend(features[:, :2]))
    assert query_mean(open_state, torch.tensor([[4]])).item() == 1.5


def test_padding_may_hold_anything():
    features = torch.tensor([[[float("nan")], [float("inf")], [2.0], [4.0]]], requires_grad=True)
    state = extend(features, torch.tensor([[False, False, True, True]]))
    mean = query_mean(state, torch.tensor([[1, 2, 3, 4]]))
    assert mean.flatten().tolist() == [0.0, 0.0, 2.0, 3.0]
    mean.sum().backward()
    assert features.grad.flatten().tolist() == [0.0, 0.0, 1.5, 0.5]


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_ends_of_labels_against_a_loop(data):
    rows, columns = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    labelled, attended = data.draw(masks(rows, columns)), data.draw(masks(rows, columns))
    before = data.draw(masks(rows, 1))[:, 0]
    expected = torch.zeros(rows, columns, dtype=torch.long)
    for b in range(rows):
        start = 0
        for t in range(columns):
            if labelled[b, t] and (t == 0 or not labelled[b, t - 1]):
                start = t
            has_query = bool(before[b]) or bool(attended[b, :start].any())
            expected[b, t] = start if labelled[b, t] and has_query else t + 1
    labels = torch.where(labelled, 7, -100)
    assert torch.equal(ends_of_labels(labels, attended, before), expected)
    if not before.any():
        assert torch.equal(ends_of_labels(labels, attended), expected)


@given(stream=streams(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_rows_and_columns_of_the_query_follow_the_cache(stream, data):
    features, attended, asked, _ = stream
    rows, columns = attended.shape
    state = extend(features, attended, asked)
    order = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=5)))
    gone = data.draw(st.integers(0, columns - 1))
    state.select(order)
    state.crop(gone)
    keep = columns - gone
    assert state.columns == keep
    ends = torch.arange(1, keep + 1).expand(len(order), -1)
    expected = mean_by_loop(features[order, :keep], (attended & asked)[order, :keep], ends)
    torch.testing.assert_close(query_mean(state, ends), expected, atol=1e-5, rtol=1e-5)


@given(stream=streams(), masked=st.booleans(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_settled_mean_is_the_mean_computed_again(stream, masked, data):
    """The chunks of an answer, kept aside while the query's mean is known, and joined when somebody asks."""
    features, attended, asked, _ = stream
    rows, columns = attended.shape
    call = object()
    state = extend(features, attended, asked if masked else None)
    ends = torch.full((rows, 1), columns)
    state.settle(query_mean(state, ends), by=call)
    plain = extend(features, attended, asked if masked else None)
    for length in data.draw(st.lists(st.integers(1, 3), max_size=3)):
        chunk = torch.randn(rows, length, K, generator=torch.Generator().manual_seed(length))
        assert state.answer(chunk, by=object()) is None  # of another call's query nothing is known
        mean = state.answer(chunk, by=call)
        plain = extend(chunk, state=plain)
        torch.testing.assert_close(mean, query_mean(plain, ends))
        assert state.columns == plain.columns
        if data.draw(st.booleans()):
            order = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows)))
            state.select(order)
            plain.select(order)
    state.join()
    for name in ("features", "attended", "asked"):
        assert torch.equal(getattr(state, name), getattr(plain, name))


def filled_twin(rows=3, columns=5):
    """A pair of caches with numbers that tell rows, columns and memories apart."""
    values = torch.arange(rows * columns, dtype=torch.float32).view(rows, 1, columns, 1)
    cache = pair_with_empty_copy(DynamicCache())
    for layer in range(2):
        cache.update(values + layer, values + layer, layer)
        cache.original.update(values + 100 + layer, values + 100 + layer, layer)
    cache.query = extend(values.view(rows, columns, 1))
    return cache, values


def check(cache, expected):
    for layer in range(2):
        assert torch.equal(cache.layers[layer].keys, expected + layer)
        assert torch.equal(cache.layers[layer].values, expected + layer)
        assert torch.equal(cache.original.layers[layer].keys, expected + 100 + layer)
        assert torch.equal(cache.original.layers[layer].values, expected + 100 + layer)
    assert torch.equal(cache.query.features, expected.view(expected.shape[0], -1, 1))


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 2, 0], [1, 0, 1]])
def test_reorder(order):
    cache, values = filled_twin()
    cache.reorder_cache(torch.tensor(order))
    check(cache, values[order])


def test_repeat_select_crop_and_reset():
    cache, values = filled_twin()
    cache.batch_repeat_interleave(2)
    check(cache, values.repeat_interleave(2, dim=0))
    cache.batch_select_indices(torch.tensor([5, 0, 3]))
    check(cache, values[[2, 0, 1]])
    cache.crop(-2)
    check(cache, values[[2, 0, 1], :, :3])
    cache.crop(0)
    check(cache, values[[2, 0, 1], :, :3])
    assert not is_empty(cache)
    cache.reset()
    assert cache.query is None
    assert is_empty(cache) == is_empty(DynamicCache()) or (cache.layers[0].keys == 0).all()


def test_a_selection_by_mask():
    cache, values = filled_twin()
    cache.batch_select_indices(torch.tensor([True, False, True]))
    check(cache, values[[0, 2]])


def test_pairing_keeps_the_object_and_its_class():
    cache, other = DynamicCache(), DynamicCache()
    twin = pair(cache, other)
    assert twin is cache
    assert isinstance(twin, DynamicCache)
    assert isinstance(twin, TwinCache)
    assert twin.original is other
    assert not isinstance(DynamicCache(), TwinCache)


def test_a_copy_of_a_pair_is_a_pair_of_its_own():
    cache, values = filled_twin()
    again = copy.deepcopy(cache)
    again.reorder_cache(torch.tensor([2, 1, 0]))
    check(cache, values)
    check(again, values.flip(0))


def test_a_cache_that_streams_from_the_host_can_be_paired():
    cache = DynamicCache(offloading=True)  # holds a torch.Stream, which cannot be copied
    twin = pair_with_empty_copy(cache)
    assert twin.original is not cache
    assert twin.original.prefetch_stream is twin.prefetch_stream
