"""Generation from memories: every way of decoding against calls with the whole answer."""

import copy

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StaticCache, TemperatureLogitsWarper

from twinweave.errors import UsageError

OPTIONS = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
LOGITS = {"return_dict_in_generate": True, "output_logits": True}


@pytest.fixture
def prompts(tokens):
    ids = tokens(3, 8)
    mask = torch.ones_like(ids)
    mask[0, :4], mask[2, :1] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def stepwise(model, input_ids, attention_mask, steps):
    """Greedy decoding without a cache: a whole call for every token."""
    width, ids, mask = input_ids.shape[1], input_ids, attention_mask
    for _ in range(steps):
        asked = (torch.arange(ids.shape[1]) < width).expand(ids.shape)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, query_mask=asked).logits
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), 1)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
    return ids


@pytest.mark.parametrize(
    "cache",
    [
        {},
        {"cache_implementation": "static"},
        {"cache_implementation": "offloaded"},
        {"past_key_values": "dynamic"},
        {"generation_config": GenerationConfig(cache_implementation="static", max_new_tokens=6, pad_token_id=0)},
        {"prefill_chunk_size": 3},
    ],
    ids=["default", "static", "offloaded", "given", "of a config", "in chunks"],
)
def test_greedy_is_step_by_step(given, arch, prompts, cache):
    if cache.get("cache_implementation") == "offloaded" and not torch.cuda.is_available():
        pytest.skip("offloading is for accelerators")
    model = given(arch)
    cache = {name: DynamicCache() if value == "dynamic" else value for name, value in cache.items()}
    options = {} if "generation_config" in cache else OPTIONS
    if "generation_config" in cache and arch != "llama":
        pytest.skip("once is enough")
    assert torch.equal(model.generate(**prompts, **options, **cache), stepwise(model, **prompts, steps=6))


def test_the_base_may_have_other_defaults(given, prompts):
    model = given()
    expected = model.generate(**prompts, **OPTIONS)
    config = model.base.generation_config
    config.cache_implementation, config.max_new_tokens, config.use_cache = "static", 6, False
    before, caller = config.to_dict(), GenerationConfig(do_sample=False, pad_token_id=0)
    kept = copy.deepcopy(caller.to_dict())
    assert torch.equal(model.generate(**prompts, generation_config=caller), expected)
    assert config.to_dict() == before
    assert caller.to_dict() == kept
    config.num_beams = 2
    assert model.generate(**prompts, pad_token_id=0).shape[0] == 3


def test_max_length_counts_the_prompt_alone(given, prompts):
    model = given()
    options = {"do_sample": False, "pad_token_id": 0, "max_length": 14}
    for more in ({}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(**prompts, **options, **more), model.generate(**prompts, **OPTIONS))


def test_beams_score_what_a_whole_call_says(given, prompts):
    model = given()
    options = OPTIONS | {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.0}
    found = model.generate(**prompts, **options, return_dict_in_generate=True, output_scores=True)
    asked = (torch.arange(14) < 8).expand(9, 14)
    mask = torch.cat((prompts["attention_mask"].repeat_interleave(3, 0), torch.ones(9, 6, dtype=torch.long)), 1)
    with torch.no_grad():
        logits = model(input_ids=found.sequences, attention_mask=mask, query_mask=asked).logits[:, 7:-1]
    scores = logits.log_softmax(-1).gather(-1, found.sequences[:, 8:, None]).sum((1, 2))
    torch.testing.assert_close(found.sequences_scores, scores, rtol=1e-3, atol=1e-3)
    for row in range(3):
        alone = {name: tensor[row : row + 1] for name, tensor in prompts.items()}
        assert torch.equal(model.generate(**alone, **options), found.sequences[3 * row : 3 * row + 3])


def test_samples_are_repeatable_and_of_their_row(given, prompts):
    model = given()
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        options = OPTIONS | {"do_sample": True, "num_return_sequences": 2}
        found.append(model.generate(**prompts, **options, **LOGITS))
    assert torch.equal(found[0].sequences, found[1].sequences)
    greedy = model.generate(**prompts, **OPTIONS, **LOGITS)
    torch.testing.assert_close(found[0].logits[0], greedy.logits[0].repeat_interleave(2, 0))


def test_a_streamer_gets_every_token(given, tokens):
    class Streamer:
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.seen.append("end")

    streamer, ids = Streamer(), tokens(1, 7)
    found = given().generate(input_ids=ids, **OPTIONS, streamer=streamer)
    assert streamer.seen == [*found[0].tolist(), "end"]


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_contrast_is_two_passes_over_everything(given, make_base, prompts, alpha):
    model, base = given(), make_base()
    ids, mask = prompts["input_ids"], prompts["attention_mask"]
    for _ in range(6):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            asked = (torch.arange(ids.shape[1]) < 8).expand(ids.shape)
            with_memory = model(input_ids=ids, attention_mask=mask, query_mask=asked).logits[:, -1]
            without = base(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]
        new = ((1 + alpha) * with_memory - alpha * without).argmax(-1, keepdim=True)
        ids, mask = torch.cat((ids, new), 1), torch.cat((mask, torch.ones_like(new)), 1)
    assert torch.equal(model.generate(**prompts, **OPTIONS, contrast=alpha), ids)
    assert torch.equal(model.generate(**prompts, **OPTIONS, contrast=alpha, cache_implementation="static"), ids)
    processors = LogitsProcessorList([TemperatureLogitsWarper(2.0)])
    assert torch.equal(model.generate(**prompts, **OPTIONS, contrast=alpha, logits_processor=processors), ids)
    assert len(processors) == 1, "the caller's list is as it was"
    twice = model.generate(**prompts, **(OPTIONS | {"do_sample": True, "num_return_sequences": 2}), contrast=alpha)
    assert twice.shape == (6, 14)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"contrast": 0.5, "num_beams": 2}, "contrast cannot be used with beams"),
        ({"contrast": 0.5, "generation_config": GenerationConfig(num_beams=2)}, "contrast cannot be used with beams"),
        ({"contrast": -1}, "contrast is -1"),
        ({"contrast": float("nan")}, "contrast is nan"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens cannot be used"),
        ({"generation_config": GenerationConfig(prompt_lookup_num_tokens=2)}, "prompt_lookup_num_tokens cannot"),
        ({"assistant_model": "the base"}, "assistant_model cannot be used"),
        ({"use_cache": False}, "use_cache=False"),
        ({"cache_implementation": "quantized"}, "cache_implementation is 'quantized'"),
        ({"top_k": 0}, "top_k is 0"),
    ],
)
def test_options_that_do_not_go_with_memories(given, make_memory, tmp_path, prompts, options, why):
    model = given()
    if "top_k" in options:
        model = make_memory(bank=tmp_path / "bank.lance")
        model.memorize("a text")
    with pytest.raises(UsageError, match=why):
        model.generate(**prompts, max_new_tokens=2, **options)


def test_a_cache_has_to_be_empty(given, make_base, tokens, prompts):
    cache = make_base()(input_ids=tokens(3, 4), use_cache=True).past_key_values
    with pytest.raises(UsageError, match="has tokens in it already"):
        given().generate(**prompts, past_key_values=cache)
    room = StaticCache(config=make_base().config, max_cache_len=32)
    model = given()
    assert torch.equal(model.generate(**prompts, **OPTIONS, past_key_values=room), model.generate(**prompts, **OPTIONS))
