"""The two ends of the weave are the base and plain PEFT, bit for bit, and the base's weights never move (fp32)."""

import copy
import hashlib
from itertools import pairwise

import pytest
import torch
from peft import PeftModel

from twinweave import get_imsm_model


def hashes(base):
    """A hash of every tensor of an unwrapped model, by the name it has there."""
    return {
        name: hashlib.sha256(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in base.state_dict().items()
    }


def hashes_inside(model, names):
    """The same of the base inside an adapted model, whose layers PEFT has renamed."""
    found = {}
    for name, tensor in model.get_base_model().state_dict().items():
        plain = name.replace(".base_layer.", ".")
        if plain in names and ".modules_to_save." not in name:
            data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            found[plain] = hashlib.sha256(data).hexdigest()
    return found


def train_a_little(model, tokens, steps=3):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        ids = tokens(3, 10, seed=50 + step)
        labels = ids.clone()
        labels[:, :4] = -100
        loss = model(input_ids=ids, labels=labels).loss
        assert torch.isfinite(loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture
def ids(tokens):
    return tokens(2, 11)


@pytest.mark.parametrize("fusion", ["query_gate", "gate", "average", "enhanced"])
@torch.no_grad()
def test_step_zero_is_the_base_bit_for_bit(arch, fusion, make_base, make_imsm, ids):
    expected = make_base(arch)(input_ids=ids).logits
    model = make_imsm(arch, "lora", trained=False, fusion=fusion)
    if fusion not in ("average", "enhanced"):
        model.gate.w_b.data.normal_()  # whatever the gate says
    assert torch.equal(model(input_ids=ids).logits, expected)


@torch.no_grad()
def test_step_zero_is_the_base_for_every_adapter(peft_kind, make_base, make_imsm, ids):
    expected = make_base()(input_ids=ids).logits
    model = make_imsm("llama", peft_kind, trained=False)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)


def check_original(model, base, ids):
    # matmul takes another kernel, with other last bits, for weights that require a gradient
    base.requires_grad_(False)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with torch.no_grad():
        expected = base(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        with model.use_memory("original"):
            got = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        assert torch.equal(got.logits, expected.logits)
        assert all(torch.equal(a, b) for a, b in zip(got.hidden_states, expected.hidden_states, strict=True))
        options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
        options |= {"output_logits": True, "return_dict_in_generate": True}
        expected = base.generate(**options)
        with model.use_memory("original"):
            got = model.generate(**options)
        assert torch.equal(got.sequences, expected.sequences)
        assert all(torch.equal(a, b) for a, b in zip(got.logits, expected.logits, strict=True))


def test_original_is_the_base_before_and_after_training(arch, make_base, make_imsm, tokens, ids):
    base = make_base(arch)
    model = make_imsm(arch, "lora", trained=False)
    check_original(model, base, ids)
    train_a_little(model, tokens)
    check_original(model, base, ids)
    with torch.no_grad():
        assert not torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)


def test_original_is_the_base_with_every_adapter(peft_kind, make_base, make_imsm, tokens, ids):
    model = make_imsm("llama", peft_kind)
    train_a_little(model, tokens, steps=2)
    check_original(model, make_base(), ids)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_original_is_the_base_in_training_mode_too(arch, make_base, make_imsm, ids):
    base, model = make_base(arch).train(), make_imsm(arch).train()
    torch.manual_seed(3)
    expected = base(input_ids=ids).logits
    torch.manual_seed(3)
    with model.use_memory("original"):
        got = model(input_ids=ids).logits
    assert torch.equal(got, expected)


@torch.no_grad()
def test_infinite_retention_is_the_base_and_the_adapter(arch, peft_kind, make_base, make_imsm, ids):
    if arch == "gpt2" and peft_kind in ("oft", "loha"):
        pytest.skip("PEFT has no such adapter for Conv1D layers")
    model = make_imsm(arch, peft_kind)
    with model.use_memory("enhanced"):
        enhanced = model(input_ids=ids).logits
    woven = model(input_ids=ids).logits
    model.retention = float("inf")
    assert torch.equal(model(input_ids=ids).logits, make_base(arch)(input_ids=ids).logits)
    model.retention = float("-inf")
    assert torch.equal(model(input_ids=ids).logits, enhanced)
    assert not torch.allclose(woven, enhanced, atol=1e-3)


@pytest.mark.parametrize("fusion", ["query_gate", "gate", "average", "enhanced"])
@torch.no_grad()
def test_infinite_retention_for_every_fusion_also_while_generating(fusion, make_base, make_imsm, ids):
    model, base = make_imsm("llama", fusion=fusion), make_base()
    options = {"input_ids": ids, "max_new_tokens": 6, "do_sample": False}
    model.retention = float("inf")
    assert torch.equal(model.generate(**options), base.generate(**options))
    with model.use_memory("enhanced"):
        enhanced = model.generate(**options)
    model.retention = float("-inf")
    assert torch.equal(model.generate(**options), enhanced)


@torch.no_grad()
def test_enhanced_is_plain_peft_loaded_from_the_saved_folder(arch, make_base, make_imsm, ids, tmp_path):
    model = make_imsm(arch)
    model.save_pretrained(tmp_path / "saved")
    plain = PeftModel.from_pretrained(make_base(arch), tmp_path / "saved").eval()
    with model.use_memory("enhanced"):
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
        got = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(got, plain.generate(input_ids=ids, max_new_tokens=5, do_sample=False))


@torch.no_grad()
def test_enhanced_is_plain_peft_for_every_adapter(peft_kind, make_base, make_imsm, ids, tmp_path):
    model = make_imsm("llama", peft_kind)
    model.save_pretrained(tmp_path / "saved")
    plain = PeftModel.from_pretrained(make_base(), tmp_path / "saved").eval()
    with model.use_memory("enhanced"):
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_no_base_tensor_changes(arch, make_base, make_imsm, tokens):
    before = hashes(make_base(arch))
    model = make_imsm(arch, trained=False)
    train_a_little(model, tokens)
    model.generate(input_ids=tokens(2, 5), max_new_tokens=3)
    assert hashes_inside(model, before) == before


def test_no_base_tensor_changes_with_any_adapter(peft_kind, make_base, make_imsm, tokens):
    before = hashes(make_base())
    model = make_imsm("llama", peft_kind, trained=False)
    assert hashes_inside(model, before) == before
    train_a_little(model, tokens)
    assert hashes_inside(model, before) == before


@torch.no_grad()
def test_memories_can_be_nested(make_base, make_imsm, ids):
    model, base = make_imsm(), make_base()
    original, woven = base(input_ids=ids).logits, model(input_ids=ids).logits
    with model.use_memory("enhanced"):
        enhanced = model(input_ids=ids).logits
    with model.use_memory("original"):
        with model.use_memory("enhanced"):
            assert torch.equal(model(input_ids=ids).logits, enhanced)
            with model.use_memory("original"):
                assert torch.equal(model(input_ids=ids).logits, original)
            assert torch.equal(model(input_ids=ids).logits, enhanced)
        with model.use_memory("interwoven"):
            assert torch.equal(model(input_ids=ids).logits, woven)
        assert torch.equal(model(input_ids=ids).logits, original)
    assert torch.equal(model(input_ids=ids).logits, woven)


@torch.no_grad()
def test_pefts_own_switch_gives_the_base(make_base, make_imsm, ids):
    model = make_imsm()
    woven = model(input_ids=ids).logits
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, make_base()(input_ids=ids).logits)
    assert torch.equal(model(input_ids=ids).logits, woven)


@torch.no_grad()
def test_hidden_states_are_the_enhanced_ones_with_the_woven_one_last(arch, make_imsm, ids):
    model = make_imsm(arch)
    with model.use_memory("enhanced"):
        enhanced = model(input_ids=ids, output_hidden_states=True).hidden_states
    out = model(input_ids=ids, output_hidden_states=True)
    assert len(out.hidden_states) == len(enhanced)
    assert all(torch.equal(a, b) for a, b in zip(out.hidden_states[:-1], enhanced[:-1], strict=True))
    assert torch.equal(model.get_output_embeddings()(out.hidden_states[-1]), out.logits)


@torch.no_grad()
def test_tuples_and_embeddings_give_the_same_logits(arch, make_imsm, ids):
    model = make_imsm(arch)
    expected = model(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids, return_dict=False)[0], expected)
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeddings).logits, expected)
    torch.testing.assert_close(model(input_ids=ids, logits_to_keep=2).logits, expected[:, -2:], atol=1e-5, rtol=1e-5)
    logits, *_, gate = model(input_ids=ids, return_dict=False, output_gate=True)
    assert torch.equal(logits, expected)
    assert gate.shape == (*ids.shape, model.gate.hidden_size)


@torch.no_grad()
def test_output_gate_is_the_share_of_the_original_memory(make_imsm, ids):
    model = make_imsm()
    out = model(input_ids=ids, output_gate=True)
    assert out.gate.shape == (2, 11, model.gate.hidden_size)
    assert ((out.gate > 0) & (out.gate < 1)).all()
    assert "gate" not in model(input_ids=ids)
    states = {}
    for memory in ("original", "enhanced"):
        with model.use_memory(memory):
            single = model(input_ids=ids, output_gate=True, output_hidden_states=True)
        states[memory] = single.hidden_states[-1]
        assert (single.gate == (1.0 if memory == "original" else 0.0)).all()
        assert single.gate.shape == out.gate.shape
    fused = out.gate * states["original"] + (1 - out.gate) * states["enhanced"]
    torch.testing.assert_close(model.get_output_embeddings()(fused), out.logits, atol=1e-5, rtol=1e-5)
    for retention, share in ((float("inf"), 1.0), (float("-inf"), 0.0)):
        model.retention = retention
        assert (model(input_ids=ids, output_gate=True).gate == share).all()


@torch.no_grad()
def test_more_retention_means_more_of_the_original(make_imsm, ids):
    model, shares = make_imsm(), []
    for model.retention in (-4.0, -1.0, 0.0, 1.0, 4.0):
        shares.append(model(input_ids=ids, output_gate=True).gate)
    assert all((low < high).all() for low, high in pairwise(shares))


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
@torch.no_grad()
def test_a_deep_copy_is_independent(arch, make_imsm, perturb, ids):
    model = make_imsm(arch)
    before = model(input_ids=ids).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(input_ids=ids).logits, before)
    twin.retention = 3.0
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not torch.equal(twin(input_ids=ids).logits, before)
    twin.retention = 0.0
    perturb(twin.gate, seed=9)
    changed = twin(input_ids=ids).logits
    assert not torch.equal(changed, before)
    assert torch.equal(model(input_ids=ids).logits, before)
    perturb(model, seed=11)
    assert torch.equal(twin(input_ids=ids).logits, changed)
    with model.use_memory("original"):
        assert torch.equal(twin(input_ids=ids).logits, changed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_base(dtype, make_base, make_imsm, ids, tmp_path):
    model = make_imsm(base=make_base().to(dtype))
    assert all(p.dtype == torch.float32 for p in model.gate.parameters())
    out = model(input_ids=ids, output_gate=True)
    assert out.logits.dtype == dtype
    assert torch.isfinite(out.logits).all()
    assert out.gate.dtype == torch.float32
    model.retention = float("inf")
    assert torch.equal(model(input_ids=ids).logits, make_base().to(dtype)(input_ids=ids).logits)
    model.retention = float("-inf")
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(make_base().to(dtype), tmp_path).eval()
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


@pytest.mark.parametrize("convert", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
@torch.no_grad()
def test_converting_the_whole_model_does_not_break_it(convert, make_base, make_imsm, ids):
    model = convert(make_imsm())
    base = convert(make_base())
    assert torch.isfinite(model(input_ids=ids).logits).all()
    assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape == (2, 14)
    model.retention = float("inf")
    assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)


@torch.no_grad()
def test_ends_are_exact_under_autocast(make_base, make_imsm, ids):
    model, base = make_imsm(), make_base()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(input_ids=ids).logits).all()
        model.retention = float("inf")
        assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)


@pytest.mark.parametrize("fusion", ["query_gate", "gate", "average", "enhanced"])
def test_number_of_gate_parameters(fusion, make_imsm):
    d, r = 32, 7
    expected = {"query_gate": 5 * d * r, "gate": 3 * d * r, "average": 0, "enhanced": 0}[fusion]
    model = make_imsm(trained=False, gate_rank=r, fusion=fusion)
    assert sum(p.numel() for p in model.gate.parameters()) == expected
    plain = make_imsm(trained=False, fusion="average").get_nb_trainable_parameters()[0]
    assert model.get_nb_trainable_parameters()[0] == plain + expected


@torch.no_grad()
def test_the_original_stays_reachable_when_the_head_could_be_adapted(make_base, make_peft, ids):
    """An adapter behind the weave would change both memories, so either it is refused or the ends stay exact."""
    from twinweave.errors import UnsupportedModelError

    for changes in ({"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}):
        with pytest.raises(UnsupportedModelError, match="lm_head"):
            get_imsm_model(make_base(), make_peft(**changes))
