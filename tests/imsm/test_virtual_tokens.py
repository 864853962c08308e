"""Prompt learning: virtual tokens belong to the enhanced memory, and everything else is about the real tokens."""

import copy

import pytest
import torch
from peft import (
    CartridgeConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from transformers import DynamicCache

from twinweave import IMSMConfig, IMSMModel, get_imsm_model
from twinweave.errors import UnsupportedModelError, UsageError

V = 4
CONFIGS = {
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=V),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=V),
    "p_tuning": lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=V, encoder_hidden_size=16),
    "cartridge": lambda: CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=V),
    "cpt": lambda: CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[4, 5, 6, 7], cpt_mask=[1] * V, cpt_tokens_type_mask=[1, 2, 3, 4]
    ),
}


@pytest.fixture(params=CONFIGS)
def kind(request):
    return request.param


@pytest.fixture
def ids(tokens):
    return tokens(2, 9)


def prompted(kind, make_base, perturb, trained=True, config=None):
    torch.manual_seed(3)
    model = get_imsm_model(make_base(), config or CONFIGS[kind](), IMSMConfig(gate_rank=3))
    if trained:
        perturb(model)
    return model.eval()


@torch.no_grad()
def test_the_ends(kind, make_base, perturb, ids, tmp_path):
    model = prompted(kind, make_base, perturb)
    out = model(input_ids=ids, output_hidden_states=True, output_gate=True)
    assert out.logits.shape[:2] == out.gate.shape[:2] == ids.shape
    assert {h.shape[1] for h in out.hidden_states} == {ids.shape[1]}
    expected = make_base()(input_ids=ids).logits
    for memory in (model.use_memory("original"), model.disable_adapter()):
        with memory:
            assert torch.equal(model(input_ids=ids).logits, expected)
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(make_base(), tmp_path).eval()
    own = plain(input_ids=ids).logits[:, -ids.shape[1] :]
    with model.use_memory("enhanced"):
        assert torch.equal(model(input_ids=ids).logits, own)
        options = {"max_new_tokens": 5, "do_sample": False}
        assert torch.equal(model.generate(input_ids=ids, **options), plain.generate(input_ids=ids, **options))
    model.retention = float("inf")
    assert torch.equal(model(input_ids=ids).logits, expected)
    model.retention = float("-inf")
    assert torch.equal(model(input_ids=ids).logits, own)
    model.retention = 0.0
    again = IMSMModel.from_pretrained(tmp_path, make_base())
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)  # not `out`: CPT projects at each call


@torch.no_grad()
def test_caches_hold_the_real_tokens(kind, make_base, perturb, ids):
    model = prompted(kind, make_base, perturb)
    for memory in ("interwoven", "enhanced", "original"):
        with model.use_memory(memory):
            whole = model(input_ids=ids, use_cache=True)
            assert whole.past_key_values.get_seq_length() == ids.shape[1]
            for cache in (None, DynamicCache()):
                part = model(input_ids=ids[:, :5], past_key_values=cache, use_cache=True)
                assert part.past_key_values.get_seq_length() == 5
                rest = model(input_ids=ids[:, 5:8], past_key_values=part.past_key_values)
                torch.testing.assert_close(rest.logits, whole.logits[:, 5:8], atol=1e-5, rtol=1e-5)
                part.past_key_values.crop(-3)
                assert part.past_key_values.get_seq_length() == 5
                rest = model(input_ids=ids[:, 5:], past_key_values=part.past_key_values)
                torch.testing.assert_close(rest.logits, whole.logits[:, 5:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_left_padded_row_is_the_row_alone(kind, make_base, perturb, ids):
    model = prompted(kind, make_base, perturb)
    padded = torch.nn.functional.pad(ids, (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    for memory in ("interwoven", "enhanced"):
        with model.use_memory(memory):
            found = model(input_ids=padded, attention_mask=mask).logits[:, 3:]
            torch.testing.assert_close(found, model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
            options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
            alone = model.generate(input_ids=ids, **options)[:, 9:]
            assert torch.equal(model.generate(input_ids=padded, attention_mask=mask, **options)[:, 12:], alone)


def test_training_teaches_prompt_and_gate_alone(kind, make_base, perturb, ids):
    model = prompted(kind, make_base, perturb).train()
    labels = torch.where(torch.arange(9) > 3, ids, -100)
    losses = [model(input_ids=ids, labels=labels, logits_at_labels=at).loss for at in (False, True)]
    torch.testing.assert_close(losses[0], losses[1])
    sum(losses).backward()
    named = dict(model.named_parameters())
    learning = {name for name, p in named.items() if p.grad is not None and p.grad.any()}
    assert learning == {name for name, p in named.items() if p.requires_grad}
    assert {name.split(".")[0] for name in learning} == {"prompt_encoder", "gate"}


def test_a_task_of_its_own_for_every_row(make_base, perturb, ids):
    config = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=V, num_tasks=3)
    model = prompted("", make_base, perturb, config=config)
    with torch.no_grad():
        both = model(input_ids=ids, task_ids=torch.tensor([0, 2])).logits
        for row, task in enumerate((0, 2)):
            alone = model(input_ids=ids[row : row + 1], task_ids=torch.tensor([task])).logits
            torch.testing.assert_close(alone, both[row : row + 1], atol=1e-5, rtol=1e-5)
        options = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False}
        both = model.generate(input_ids=ids, task_ids=torch.tensor([0, 2]), **options)
        alone = model.generate(input_ids=ids[1:], task_ids=torch.tensor([2]), **options)
        assert torch.equal(alone, both[1:])


def test_a_deep_copy_is_independent(kind, make_base, perturb, ids):
    model = prompted(kind, make_base, perturb)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        twin = copy.deepcopy(model)
        perturb(twin, seed=9)
        torch.testing.assert_close(model(input_ids=ids).logits, before)  # to rounding: CPT projects at each call
        assert (twin(input_ids=ids).logits - before).abs().max() > 0.01


@torch.no_grad()
def test_several_prompts_at_once(make_base, perturb, ids):
    model = prompted("prompt", make_base, perturb)
    first = model(input_ids=ids).logits
    model.add_adapter("longer", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7))
    assert torch.equal(model(input_ids=ids).logits, first)
    model.set_adapter("longer")
    second = model(input_ids=ids)
    assert second.logits.shape == first.shape
    assert not torch.equal(second.logits, first)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    model.set_adapter("default")
    assert torch.equal(model(input_ids=ids).logits, first)
    with pytest.raises(UsageError, match="another adapter"):
        model(input_ids=ids[:, :1], past_key_values=cache)


@torch.no_grad()
def test_what_cannot_go_on(make_base, perturb, ids):
    model = prompted("prompt", make_base, perturb)
    with model.use_memory("original"):
        cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(UsageError, match="9 tokens of one memory"):
        model(input_ids=ids[:, :1], past_key_values=cache)
    with model.use_memory("enhanced"):
        cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(UsageError, match="other memories"):
        model(input_ids=ids[:, :1], past_key_values=cache)
    with pytest.raises(UsageError, match="cache_implementation"):
        model.generate(input_ids=ids, max_new_tokens=3, cache_implementation="static")


@pytest.mark.parametrize("kind", ["prefix", "cartridge"])
def test_prefixes_do_not_go_with_gradient_checkpointing(kind, make_base, perturb, ids):
    model = prompted(kind, make_base, perturb)
    model.gradient_checkpointing_enable()
    with pytest.raises(UnsupportedModelError, match="gradient checkpointing"):
        model.train()(input_ids=ids, labels=ids)
    base = make_base()
    base.gradient_checkpointing_enable()
    with pytest.raises(UnsupportedModelError, match="gradient checkpointing"):
        get_imsm_model(base, CONFIGS[kind]())


def test_the_base_comes_back(kind, make_base, perturb, ids):
    model = prompted(kind, make_base, perturb)
    base = model.unload()
    with torch.no_grad():
        assert torch.equal(base(input_ids=ids).logits, make_base()(input_ids=ids).logits)
    assert not base.get_decoder()._forward_hooks
