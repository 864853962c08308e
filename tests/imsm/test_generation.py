"""`generate`: every way of running it gives the tokens that the uncached, unbatched, unpadded run gives."""

import copy

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, QuantizedCache
from transformers.generation.streamers import BaseStreamer

PAD = 0
MODES = {
    # without repetition, because tiny models love to repeat themselves whatever the gate says
    "greedy": {"do_sample": False, "no_repeat_ngram_size": 1, "suppress_tokens": [PAD]},
    "plain": {"do_sample": False},
    "beams": {"num_beams": 4, "do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 20},
    "beams, 3 returned": {"num_beams": 4, "num_return_sequences": 3, "do_sample": False},
    "sampling, 3 returned": {"do_sample": True, "num_return_sequences": 3},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "penalties": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}
LENGTHS = (4, 9, 7)


NAMES = ("llama", "gpt2", "gemma3", "mistral", "gemma3 above a trunk")


@pytest.fixture(scope="module")
def models(make_imsm):
    models = {arch: make_imsm(arch) for arch in NAMES[:4]}
    return models | {NAMES[4]: make_imsm("gemma3", peft_changes={"layers_to_transform": [1]})}


@pytest.fixture(params=["stacked", "two_pass"])
def plan(request):
    return request.param


@pytest.fixture(params=NAMES)
def model(request, plan, models):
    model = models[request.param]
    model.plan = plan
    yield model
    model.plan = "auto"


@pytest.fixture
def prompts(tokens):
    return [tokens(1, length, seed=length) for length in LENGTHS]


def left_padded(prompts):
    width = max(p.shape[1] for p in prompts)
    ids = torch.cat([torch.nn.functional.pad(p, (width - p.shape[1], 0), value=PAD) for p in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(p), (width - p.shape[1], 0)) for p in prompts])
    return ids, mask


def generate(model, ids, mode="greedy", **options):
    torch.manual_seed(5)
    return model.generate(input_ids=ids, **{"max_new_tokens": 7} | MODES[mode] | options)


@pytest.mark.parametrize("mode", MODES)
def test_cached_equals_uncached(model, mode, tokens):
    ids = tokens(2, 8)
    cached = generate(model, ids, mode)
    model.plan = "two_pass"
    assert torch.equal(cached, generate(model, ids, mode, use_cache=False))


@pytest.mark.parametrize("mode", ["greedy", "beams", "beams, 3 returned"])
def test_a_padded_batch_equals_its_rows_alone(model, mode, prompts):
    ids, mask = left_padded(prompts)
    batched = generate(model, ids, mode, attention_mask=mask)[:, ids.shape[1] :]
    alone = torch.cat([generate(model, p, mode)[:, p.shape[1] :] for p in prompts])
    assert torch.equal(batched, alone)
    assert torch.equal(generate(model, ids, mode, attention_mask=mask, use_cache=False)[:, ids.shape[1] :], alone)
    assert torch.equal(generate(model, ids, mode, attention_mask=mask, prefill_chunk_size=4)[:, ids.shape[1] :], alone)


def test_the_generated_tokens_depend_on_the_gate(models, make_imsm, prompts):
    """Otherwise the comparisons of this file would compare nothing."""
    ids, mask = left_padded(prompts)
    woven = generate(models["llama"], ids, attention_mask=mask)
    with models["llama"].use_memory("enhanced"):
        assert not torch.equal(generate(models["llama"], ids, attention_mask=mask), woven)
    average = make_imsm("llama", fusion="average")
    assert not torch.equal(generate(average, ids, attention_mask=mask), woven)


@pytest.mark.parametrize(
    "options",
    [{}, {"generation_config": GenerationConfig(max_new_tokens=7, do_sample=False)}, {"pad_token_id": PAD}],
    ids=["model's config", "own config", "argument"],
)
def test_padding_is_recognised_without_a_mask(model, options, prompts):
    ids, mask = left_padded(prompts)
    expected = generate(model, ids, "plain", attention_mask=mask)
    assert torch.equal(model.generate(input_ids=ids, **{"max_new_tokens": 7, "do_sample": False} | options), expected)
    assert torch.equal(model.generate(ids, **{"max_new_tokens": 7, "do_sample": False} | options), expected)


def test_a_pad_token_that_is_eos_is_no_padding(models, tokens):
    """transformers then reads it as a token, and so must the gate."""
    model = models["llama"]
    ids = tokens(1, 6)
    ids[0, 2] = PAD
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": PAD, "eos_token_id": PAD}
    assert torch.equal(
        model.generate(input_ids=ids, **options),
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options),
    )


@pytest.mark.parametrize("mode", ["greedy", "beams"])
@pytest.mark.parametrize("options", [{"prefill_chunk_size": 3}, {"cache_implementation": "static"}], ids=str)
def test_other_ways_of_caching(model, mode, options, prompts):
    ids, mask = left_padded(prompts)
    expected = generate(model, ids, mode, attention_mask=mask)
    assert torch.equal(generate(model, ids, mode, attention_mask=mask, disable_compile=True, **options), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_pefts_own_switch_gives_the_base(models, plan, name, make_base, tokens):
    model = models[name]
    model.plan = plan
    with model.disable_adapter():
        found = generate(model, tokens(2, 6))
    model.plan = "auto"
    assert torch.equal(found, generate(make_base(name), tokens(2, 6)))


class Listener(BaseStreamer):
    def __init__(self):
        self.heard = []

    def put(self, value):
        self.heard.append(value.flatten())

    def end(self):
        self.heard = torch.cat(self.heard)


def test_a_streamer_hears_every_token(model, tokens):
    listener, ids = Listener(), tokens(1, 6)
    assert torch.equal(generate(model, ids, streamer=listener)[0], listener.heard)


@pytest.mark.parametrize("mode", ["greedy", "beams"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_quantised_cache_differs_by_its_rounding_only(models, plan, name, mode, tokens):
    model = models[name]
    model.plan = plan
    options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 2}
    quantised = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    expected = generate(model, tokens(2, 6), mode, **options).logits
    out = generate(model, tokens(2, 6), mode, **options, **quantised)
    model.plan = "auto"
    assert isinstance(out.past_key_values, QuantizedCache)
    assert torch.equal(out.logits[0], expected[0])  # the prompt is read before it is rounded
    rounding = (out.logits[1] - expected[1]).norm() / expected[1].norm()
    assert 0 < rounding < 0.1


def test_static_cache_between_memories(models, make_base, tokens):
    model, ids = models["llama"], tokens(2, 6)
    options = {"cache_implementation": "static", "disable_compile": True}
    expected = generate(model, ids)
    assert torch.equal(generate(model, ids, **options), expected)
    with model.use_memory("original"):
        assert torch.equal(generate(model, ids, **options), generate(make_base(), ids))
    assert torch.equal(generate(model, ids, **options), expected)


def test_prompt_lookup_crops_and_goes_on(model, tokens):
    ids = tokens(1, 4).repeat(1, 3)
    for mode in ("plain", "greedy"):  # some candidates accepted; none accepted
        expected = generate(model, ids, mode, max_new_tokens=12)
        assert torch.equal(generate(model, ids, mode, max_new_tokens=12, prompt_lookup_num_tokens=3), expected)


def test_an_assistant_changes_nothing(models, make_base, tokens):
    ids = tokens(1, 8)
    expected = generate(models["llama"], ids, max_new_tokens=12)
    assert torch.equal(generate(models["llama"], ids, max_new_tokens=12, assistant_model=make_base()), expected)


def test_several_eos_ids(model, prompts):
    ids, mask = left_padded(prompts)
    free = generate(model, ids, attention_mask=mask)[:, ids.shape[1] :]
    ends = [int(free[0, 2]), int(free[1, 4])]
    got = generate(model, ids, attention_mask=mask, eos_token_id=ends)[:, ids.shape[1] :]
    for row, tokens_free in zip(got, free, strict=True):
        stop = next((i for i, token in enumerate(tokens_free.tolist()) if token in ends), len(tokens_free) - 1)
        assert torch.equal(row[: stop + 1], tokens_free[: stop + 1])
        assert (row[stop + 1 :] == PAD).all()


def test_query_mask_within_the_prompt(model, prompts):
    ids, mask = left_padded(prompts)
    query = torch.zeros_like(ids)
    query[:, -3:-1] = 1
    expected = generate(model, ids, attention_mask=mask)
    got = generate(model, ids, attention_mask=mask, query_mask=query)
    assert not torch.equal(got, expected)
    alone = [generate(model, p, query_mask=query[:1, -p.shape[1] :])[:, p.shape[1] :] for p in prompts]
    assert torch.equal(got[:, ids.shape[1] :], torch.cat(alone))
    for options in ({"use_cache": False}, {"prefill_chunk_size": 4}, {"num_beams": 1, "num_return_sequences": 1}):
        assert torch.equal(generate(model, ids, attention_mask=mask, query_mask=query, **options), got)
    assert torch.equal(generate(model, ids, attention_mask=mask, query_mask=mask), expected)


def test_from_embeddings(model, prompts):
    ids, mask = left_padded(prompts)
    expected = generate(model, ids, "plain", attention_mask=mask)[:, ids.shape[1] :]
    embeddings = model.get_input_embeddings()(ids)
    options = {"inputs_embeds": embeddings, "attention_mask": mask, "max_new_tokens": 7, "do_sample": False}
    assert torch.equal(model.generate(**options), expected)
    assert torch.equal(model.generate(input_ids=None, **options), expected)


def test_from_nothing(models):
    got = models["llama"].generate(max_new_tokens=5, do_sample=False)
    assert torch.equal(got, generate(models["llama"], torch.tensor([[1]]), "plain", max_new_tokens=5))
    bos = torch.tensor([[1]])
    assert torch.equal(models["llama"].generate(inputs=None, input_ids=bos, max_new_tokens=5, do_sample=False), got)


def returned(model, ids, mode="greedy", **options):
    out = generate(model, ids, mode, return_dict_in_generate=True, **options)
    return out.sequences, out.past_key_values


@pytest.mark.parametrize("only_new_tokens", [False, True])
def test_going_on_from_a_returned_cache(model, only_new_tokens, tokens):
    sequences, cache = returned(model, tokens(2, 6))
    longer = torch.cat((sequences, tokens(2, 4, seed=8)), dim=1)
    mask = torch.ones_like(longer)
    new = longer[:, cache.get_seq_length() :] if only_new_tokens else longer
    got, cache = returned(model, new, "plain", attention_mask=mask, past_key_values=cache)
    expected = generate(model, longer, "plain", attention_mask=mask)
    assert torch.equal(got[:, new.shape[1] :], expected[:, longer.shape[1] :])
    # and a third turn
    longest = torch.cat((expected, tokens(2, 3, seed=9)), dim=1)
    third, _ = returned(model, longest, attention_mask=torch.ones_like(longest), past_key_values=cache)
    assert torch.equal(third, generate(model, longest, attention_mask=torch.ones_like(longest)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_going_on_in_a_padded_batch_whose_rows_ended_at_different_times(models, name, prompts, tokens):
    """Padding behind an answer that ended early is no part of the next query."""
    model = models[name]
    ids, mask = left_padded(prompts)
    free = generate(model, ids, attention_mask=mask)
    end = int(free[0, ids.shape[1] + 1])
    sequences, cache = returned(model, ids, attention_mask=mask, eos_token_id=end)
    answer = sequences[:, ids.shape[1] :]
    assert (answer == PAD).any(), "no row ended early: the test needs another seed"
    longer = torch.cat((sequences, tokens(3, 4, seed=8)), dim=1)
    longer_mask = torch.cat((mask, (answer != PAD).long(), torch.ones(3, 4, dtype=torch.long)), dim=1)
    got, _ = returned(model, longer, attention_mask=longer_mask, past_key_values=cache)
    assert torch.equal(got, generate(model, longer, attention_mask=longer_mask))
    # a sliding window counts columns, so that padding in the middle changes what the base itself sees
    for row in range(3) if name != "gemma3" else ():
        alone = longer[row][longer_mask[row] == 1][None]
        assert torch.equal(got[row, longer.shape[1] :], generate(model, alone)[0, alone.shape[1] :])


def test_going_on_with_a_query_mask_over_everything(models, tokens):
    model = models["llama"]
    sequences, cache = returned(model, tokens(2, 6))
    longer = torch.cat((sequences, tokens(2, 4, seed=8)), dim=1)
    query = torch.zeros_like(longer)
    query[:, 2:5] = query[:, -4:] = 1
    options = {"attention_mask": torch.ones_like(longer), "query_mask": query}
    got, _ = returned(model, longer, past_key_values=cache, **options)
    assert torch.equal(got, generate(model, longer, **options))


def test_going_on_after_a_query_mask_keeps_that_query(models, tokens):
    """What was generated, and what comes now, is no query unless somebody says so."""
    model, prompt = models["llama"], tokens(2, 6)
    query = torch.zeros_like(prompt)
    query[:, 2:5] = 1
    sequences, cache = returned(model, prompt, query_mask=query)
    longer = torch.cat((sequences, tokens(2, 4, seed=8)), dim=1)
    mask = torch.ones_like(longer)
    got, _ = returned(model, longer, attention_mask=mask, past_key_values=cache)
    whole = torch.nn.functional.pad(query, (0, longer.shape[1] - query.shape[1]))
    assert torch.equal(got, generate(model, longer, attention_mask=mask, query_mask=whole))
    assert not torch.equal(got, generate(model, longer, attention_mask=mask))


def test_one_prompt_cache_for_several_continuations(model, tokens):
    """The usual recipe: read the shared prompt once, continue copies of its cache."""
    prompt = tokens(1, 7)
    with torch.no_grad():
        cache = model(input_ids=prompt, past_key_values=DynamicCache(config=model.config)).past_key_values
    for seed in range(3):
        whole = torch.cat((prompt, tokens(1, 3, seed=20 + seed)), dim=1)
        assert torch.equal(generate(model, whole, past_key_values=copy.deepcopy(cache)), generate(model, whole))
    assert cache.get_seq_length() == 7


def test_an_empty_cache_of_the_callers(model, tokens):
    ids = tokens(2, 7)
    cache = DynamicCache(config=model.config)
    assert torch.equal(generate(model, ids, past_key_values=cache), generate(model, ids))
    assert cache.get_seq_length() == 13
    assert isinstance(cache, DynamicCache)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_row_alone_equals_the_row_in_a_padded_batch(model, side, tokens):
    """The logits of plain forward calls, with and without labels."""
    row, other = tokens(1, 8), tokens(1, 12, seed=3)
    amount = (4, 0) if side == "left" else (0, 4)
    ids = torch.cat((torch.nn.functional.pad(row, amount, value=PAD), other))
    mask = torch.cat((torch.nn.functional.pad(torch.ones_like(row), amount), torch.ones_like(other)))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for start in (None, 3):
        labels = alone_labels = None
        if start is not None:
            alone_labels = row.clone()
            alone_labels[:, :start] = -100
            labels = torch.full_like(ids, -100)
            labels[0, mask[0] == 1] = alone_labels[0]
        alone = model(input_ids=row, labels=alone_labels).logits
        batched = model(input_ids=ids, attention_mask=mask, position_ids=positions, labels=labels).logits
        torch.testing.assert_close(batched[0, mask[0] == 1], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["ia3", "dora", "ln_tuning", "vera"])
def test_other_adapters_generate_the_same_with_and_without_cache(kind, make_imsm, prompts):
    model = make_imsm("llama", kind)
    ids, mask = left_padded(prompts)
    for mode in ("greedy", "beams"):
        expected = generate(model, ids, mode, attention_mask=mask, use_cache=False)
        assert torch.equal(generate(model, ids, mode, attention_mask=mask), expected)
