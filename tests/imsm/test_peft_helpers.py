"""PEFT's own helpers on a model of two memories: what each of them means there."""

import pytest
import torch
from peft import PeftModel

from twinweave.errors import UsageError


@pytest.fixture
def ids(tokens):
    return tokens(2, 8)


@torch.no_grad()
def answers(model, ids):
    """The logits of each memory, and of both."""
    found = []
    for memory in ("original", "enhanced", "interwoven"):
        with model.use_memory(memory):
            found.append(model(input_ids=ids).logits)
    return found


def equal(one, other):
    return [torch.equal(a, b) for a, b in zip(one, other, strict=True)]


def test_trainable_parameters_include_the_gate(make_imsm, capsys):
    model = make_imsm(gate_rank=3)
    adapter = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    model.print_trainable_parameters()
    assert f"trainable params: {adapter + 5 * 32 * 3:,} " in capsys.readouterr().out


def test_a_second_adapter_is_added_chosen_and_deleted(make_imsm, make_peft, perturb, ids):
    model = make_imsm()
    before = answers(model, ids)
    model.add_adapter("second", make_peft("lora", target_modules=["q_proj", "down_proj"]))
    assert equal(answers(model, ids), before) == [True, True, True]
    model.set_adapter("second")
    gate = [p.detach().clone() for p in model.gate.parameters()]
    fresh = answers(model, ids)
    assert equal(fresh, [before[0]] * 3)  # a fresh adapter says what the base says, whatever the gate
    perturb(model)
    for parameter, old in zip(model.gate.parameters(), gate, strict=True):
        parameter.data.copy_(old)
    moved = answers(model, ids)
    assert equal(moved, before) == [True, False, False]
    model.set_adapter("default")
    assert equal(answers(model, ids), before) == [True, True, True]
    model.delete_adapter("second")
    assert list(model.peft_config) == ["default"]
    assert equal(answers(model, ids), before) == [True, True, True]
    cached = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0, use_cache=False))


def test_loading_a_second_adapter_leaves_the_gate_alone(make_imsm, perturb, ids, tmp_path):
    other = make_imsm()
    perturb(other, seed=9)
    other.save_pretrained(tmp_path)
    model = make_imsm()
    before = answers(model, ids)
    model.load_adapter(str(tmp_path), "second")
    assert equal(answers(model, ids), before) == [True, True, True]


def test_merging_is_refused_and_what_is_left_instead(make_imsm, make_base, ids, tmp_path):
    model = make_imsm()
    before = answers(model, ids)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(UsageError, match=r"PeftModel\.from_pretrained"):
            merge()
    assert equal(answers(model, ids), before) == [True, True, True]
    model.save_pretrained(tmp_path)
    merged = PeftModel.from_pretrained(make_base(), str(tmp_path)).merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, before[1], rtol=1e-4, atol=1e-4)
        base = model.unload()
        assert torch.equal(base(input_ids=ids).logits, before[0])


@torch.no_grad()
def test_disabling_the_adapter_leaves_two_equal_memories(make_imsm, ids):
    model = make_imsm()
    original = answers(model, ids)[0]
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, original)
