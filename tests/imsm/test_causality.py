"""No logit depends on a later token, whoever calls and however the sequence is cut up."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

LENGTH = 12


@pytest.fixture(scope="module")
def models(make_imsm):
    """One model of each kind; the tests only read them."""
    return {arch: make_imsm(arch) for arch in ("llama", "gpt2", "gemma3", "mistral")}


@st.composite
def calls(draw):
    """A padded batch of one or two rows with or without query_mask and labels, and the position that changes."""
    ids = torch.tensor(
        draw(st.lists(st.lists(st.integers(3, 60), min_size=LENGTH, max_size=LENGTH), min_size=2, max_size=2))
    )
    changed = draw(st.integers(1, LENGTH - 1))
    inputs = {}
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    side, pads = draw(st.sampled_from(["none", "left", "right"])), draw(st.integers(1, 5))
    if side == "left":
        mask[1, :pads] = 0
    if side == "right":
        mask[1, -pads:] = 0
    if side != "none" or draw(st.booleans()):
        inputs["attention_mask"] = mask
    bits = st.lists(st.integers(0, 1), min_size=2 * LENGTH, max_size=2 * LENGTH)
    if draw(st.booleans()):
        inputs["query_mask"] = torch.tensor(draw(bits)).view(2, LENGTH)
    if draw(st.booleans()):
        chosen = torch.tensor(draw(bits)).view(2, LENGTH) == 1
        inputs["labels"] = torch.where(chosen & (mask == 1), ids, -100)
    return ids, changed, inputs


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mistral"])
@given(call=calls())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_later_token_changes_no_earlier_logit(models, name, call):
    ids, changed, inputs = call
    other = ids.clone()
    other[:, changed] = (other[:, changed] - 3 + 29) % 58 + 3
    with torch.no_grad():
        before = models[name](input_ids=ids, **inputs).logits
        after = models[name](input_ids=other, **inputs).logits
    torch.testing.assert_close(before[:, :changed], after[:, :changed], atol=1e-6, rtol=0)
    attended = inputs.get("attention_mask", torch.ones_like(ids))[:, changed] == 1
    if attended.any():  # and the comparison can fail at all
        assert not torch.allclose(before[attended, changed], after[attended, changed], atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "mistral"])
@given(data=st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_labels_do_not_tell_the_positions_before_them(models, name, data):
    """Which tokens are answers later on changes nothing before them."""
    ids = torch.arange(3, 3 + LENGTH).view(1, LENGTH)
    cut = data.draw(st.integers(1, LENGTH - 1))
    bits = st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH)
    one, two = (torch.where(torch.tensor([data.draw(bits)]), ids, -100) for _ in range(2))
    two[:, :cut] = one[:, :cut]
    with torch.no_grad():
        a, b = (models[name](input_ids=ids, labels=labels).logits for labels in (one, two))
    torch.testing.assert_close(a[:, :cut], b[:, :cut], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mistral"])
@given(call=calls(), cuts=st.lists(st.integers(1, LENGTH - 1), min_size=1, max_size=2, unique=True), full=st.booleans())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_chunks_give_what_one_call_gives(models, name, call, cuts, full):
    ids, _, inputs = call
    inputs.pop("labels", None)
    mask, query = inputs.get("attention_mask"), inputs.get("query_mask")
    positions = (mask.cumsum(1) - 1).clamp(min=0) if mask is not None else torch.arange(LENGTH).expand(2, -1)
    model = models[name]
    with torch.no_grad():
        expected = model(input_ids=ids, position_ids=positions, **inputs).logits
        cache, parts = DynamicCache(config=model.config), []
        for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), LENGTH], strict=True):
            chunk = {}
            if mask is not None:  # as long as everything so far, as transformers wants it
                chunk["attention_mask"] = mask[:, :end]
            if query is not None:
                chunk["query_mask"] = query[:, :end] if full else query[:, start:end]
            parts.append(
                model(
                    input_ids=ids[:, start:end], position_ids=positions[:, start:end], past_key_values=cache, **chunk
                ).logits
            )
    keep = mask == 1 if mask is not None else torch.ones_like(ids) == 1
    torch.testing.assert_close(torch.cat(parts, 1)[keep], expected[keep], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_chunks_into_a_static_cache(models, tokens):
    model, ids = models["llama"], tokens(2, LENGTH)
    cache = StaticCache(config=model.config, max_cache_len=20)
    parts = [model(input_ids=ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 5), (5, 6), (6, 12))]
    torch.testing.assert_close(torch.cat(parts, 1), model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    cache.reset()
    torch.testing.assert_close(
        model(input_ids=ids[:, :5], past_key_values=cache).logits, parts[0], atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_a_query_said_in_the_first_chunk_stays_the_query(models, tokens):
    model, ids = models["llama"], tokens(2, LENGTH)
    query = torch.zeros_like(ids)
    query[:, 1:4] = 1
    expected = model(input_ids=ids, query_mask=query).logits
    first = model(input_ids=ids[:, :6], query_mask=query[:, :6], use_cache=True)
    second = model(input_ids=ids[:, 6:], past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, expected[:, 6:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_cropping_goes_back_in_time(models, tokens):
    model, ids = models["llama"], tokens(2, LENGTH)
    cache = model(input_ids=ids[:, :8], use_cache=True).past_key_values
    cache.crop(-3)
    second = model(input_ids=ids[:, 5:], past_key_values=cache)
    torch.testing.assert_close(second.logits, model(input_ids=ids).logits[:, 5:], atol=1e-5, rtol=1e-5)
