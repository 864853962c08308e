"""Bad input gives our own error, with the value and the fix, and leaves what was passed usable."""

import pytest
import torch
from peft import KasaConfig, LoftQConfig, XLoraConfig
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DynamicCache,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from twinweave import IMSMConfig, TwinweaveError, get_imsm_model
from twinweave.errors import UnsupportedModelError, UsageError

TINY_BERT = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
TINY_T5 = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)

NO_CAUSAL_LMS = {
    "BertModel": lambda base: BertModel(TINY_BERT),
    "BertForMaskedLM": lambda base: BertForMaskedLM(TINY_BERT),
    "BertForSequenceClassification": lambda base: BertForSequenceClassification(TINY_BERT),
    "T5ForConditionalGeneration": lambda base: T5ForConditionalGeneration(TINY_T5),
    "LlamaModel": lambda base: LlamaModel(base.config),
    "LlamaForSequenceClassification": lambda base: LlamaForSequenceClassification(base.config),
    "Linear": lambda base: torch.nn.Linear(2, 2),
    "str": lambda base: "meta-llama/Llama-3.1-8B",
}


@pytest.fixture
def ids(tokens):
    return tokens(2, 8)


@pytest.mark.parametrize("name", NO_CAUSAL_LMS)
def test_what_is_no_causal_language_model(name, make_base, make_peft):
    with pytest.raises(UnsupportedModelError, match=name):
        get_imsm_model(NO_CAUSAL_LMS[name](make_base()), make_peft())


def test_wrapping_twice(make_base, make_peft, ids):
    base = make_base()
    model = get_imsm_model(base, make_peft())
    expected = model(input_ids=ids).logits
    with pytest.raises(UnsupportedModelError, match="already carries an adapter"):
        get_imsm_model(base, make_peft())
    assert torch.equal(model(input_ids=ids).logits, expected)


def still_usable(base, make_base, make_peft, ids):
    """A refused base is as it was and can be wrapped."""
    with torch.no_grad():
        expected = make_base()(input_ids=ids).logits
        assert torch.equal(base(input_ids=ids).logits, expected)
        model = get_imsm_model(base, make_peft()).eval()
        assert torch.equal(model(input_ids=ids).logits, expected)
        assert len(model.get_base_model().get_decoder()._forward_hooks) == 1


@pytest.mark.parametrize("targets", [["query_key_value"], "no_such_.*", ["q_proj_"]])
def test_target_modules_that_match_nothing(targets, make_base, make_peft, ids):
    base = make_base()
    with pytest.raises(UnsupportedModelError, match=r"q_proj.*target_modules") as caught:
        get_imsm_model(base, make_peft(target_modules=targets))
    assert (targets if isinstance(targets, str) else targets[0]) in str(caught.value)
    still_usable(base, make_base, make_peft, ids)


def test_target_modules_that_the_adapter_cannot_change(make_base, make_peft, ids):
    base = make_base()
    with pytest.raises(UnsupportedModelError, match="input_layernorm"):
        get_imsm_model(base, make_peft(target_modules=["q_proj", "input_layernorm"]))
    with pytest.raises(UnsupportedModelError, match="rotary_emb"):
        get_imsm_model(base, make_peft("oft", target_modules=["rotary_emb"]))
    still_usable(base, make_base, make_peft, ids)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bias": "all"}, "bias='all'"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"init_lora_weights": "loftq", "loftq_config": LoftQConfig()}, "loftq"),
        ({"kasa_config": KasaConfig()}, "kasa_config"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication"),
        ({"task_type": "SEQ_CLS"}, "SEQ_CLS"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
    ],
    ids=str,
)
def test_adapters_that_change_the_base_or_what_both_memories_share(changes, words, make_base, make_peft, ids):
    base = make_base()
    with pytest.raises(UnsupportedModelError, match=words):
        get_imsm_model(base, make_peft(**changes))
    still_usable(base, make_base, make_peft, ids)


def test_adapters_that_run_the_model_by_themselves(make_base, make_peft, ids, tmp_path):
    base = make_base()
    with pytest.raises(UnsupportedModelError, match="XLORA"):
        get_imsm_model(base, XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters={"0": str(tmp_path)}))
    still_usable(base, make_base, make_peft, ids)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fusion": "gated"}, "Did you mean 'gate'"),
        ({"fusion": "query-gate"}, "Did you mean 'query_gate'"),
        ({"gate_rank": 0}, "gate_rank is 0"),
        ({"gate_rank": 2.5}, "gate_rank is 2.5"),
        ({"gate_dropout": 1.0}, "gate_dropout is 1.0"),
        ({"gate_dropout": -0.1}, "gate_dropout is -0.1"),
        ({"retention": float("nan")}, "retention"),
    ],
    ids=str,
)
def test_settings(settings, words):
    with pytest.raises(UsageError, match=words):
        IMSMConfig(**settings)
    with pytest.raises(UsageError, match=words):
        IMSMConfig.from_dict(settings)


def test_an_unknown_setting_names_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'gate_rank'"):
        IMSMConfig.from_dict({"gate_rnk": 3})


@pytest.mark.parametrize("retention", [0.0, -2.5, float("inf"), float("-inf")])
def test_settings_survive_the_way_through_plain_values(retention):
    config = IMSMConfig(gate_rank=3, fusion="gate", gate_dropout=0.2, retention=retention)
    assert IMSMConfig.from_dict(config.to_dict()) == config


def test_unknown_memory(make_imsm, ids):
    model = make_imsm()
    expected = model(input_ids=ids).logits
    with pytest.raises(UsageError, match="Did you mean 'original'"), model.use_memory("orginal"):
        pass
    assert torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("memory", ["original", "enhanced"])
def test_a_cache_of_one_memory_cannot_be_continued_by_both(memory, make_imsm, ids):
    model = make_imsm()
    with model.use_memory(memory):
        cache = model(input_ids=ids, use_cache=True).past_key_values
        expected = model(input_ids=ids, past_key_values=DynamicCache()).logits
    with pytest.raises(UsageError, match="8 tokens of one memory"):
        model(input_ids=ids[:, :1], past_key_values=cache)
    with pytest.raises(UsageError, match="8 tokens of one memory"):
        model.generate(
            input_ids=torch.cat((ids, ids), 1),
            attention_mask=torch.ones(2, 16),
            past_key_values=cache,
            max_new_tokens=2,
        )
    assert cache.get_seq_length() == 8
    with model.use_memory(memory):  # and goes on where it belongs
        assert torch.equal(model(input_ids=ids, past_key_values=DynamicCache()).logits, expected)
        model(input_ids=ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("memory", ["original", "enhanced"])
def test_a_cache_of_both_memories_cannot_be_continued_by_one(memory, make_imsm, ids):
    model = make_imsm()
    with torch.no_grad():
        expected = model(input_ids=torch.cat((ids, ids), 1)).logits[:, 8:]
        cache = model(input_ids=ids, use_cache=True).past_key_values
        with pytest.raises(UsageError, match=memory), model.use_memory(memory):
            model(input_ids=ids, past_key_values=cache)
        again = model(input_ids=ids, past_key_values=cache).logits
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-5)


def test_query_masks_of_another_shape(make_imsm, ids):
    model = make_imsm()
    good = model(input_ids=ids).logits
    for shape in ((1, 8), (3, 8), (2, 5)):
        with pytest.raises(UsageError, match=r"(?i)mask"):
            model(input_ids=ids, query_mask=torch.ones(shape))
        with pytest.raises(UsageError, match="query_mask"):
            model.generate(input_ids=ids, query_mask=torch.ones(shape), max_new_tokens=2)
    with pytest.raises(UsageError, match="query_mask"):
        model.generate(input_ids=ids, query_mask=torch.ones(2, 9), max_new_tokens=2)
    assert torch.equal(model(input_ids=ids).logits, good)


def test_merging_is_refused(make_base, make_imsm, ids):
    model = make_imsm()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(UsageError, match="cannot be merged"):
            merge()
    with model.use_memory("original"), torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, make_base()(input_ids=ids).logits)


def test_all_our_errors_have_one_parent():
    assert issubclass(UsageError, TwinweaveError)
    assert issubclass(UnsupportedModelError, TwinweaveError)
    assert (UsageError.exit_code, UnsupportedModelError.exit_code) == (2, 1)
