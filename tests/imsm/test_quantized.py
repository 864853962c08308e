"""Bases of 8 and 4 bits. Skipped where bitsandbytes or torchao is absent; the fingerprint is tested everywhere."""

import copy
import importlib.util
import sys

import pytest
import torch
from peft import PeftModel, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from twinweave import IMSMModel
from twinweave.errors import BaseMismatchError, UnsupportedModelError
from twinweave.fingerprint import fingerprint
from twinweave.imsm.quantized import keep_differentiable


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def bits(kind):
    match kind:
        case "bnb-8bit":
            return BitsAndBytesConfig(load_in_8bit=True)
        case "bnb-8bit-rowwise":  # no column is kept in 16 bits, so that rows do not depend on each other
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
        case "bnb-4bit":
            return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        case "torchao-8bit":
            from torchao.quantization import Int8WeightOnlyConfig

            return TorchAoConfig(Int8WeightOnlyConfig())
        case "torchao-4bit":
            from torchao.quantization import IntxWeightOnlyConfig

            return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4))
    raise AssertionError(kind)


BNB = ("bnb-8bit", "bnb-8bit-rowwise", "bnb-4bit")
TORCHAO = ("torchao-8bit", "torchao-4bit")
KINDS = [
    *(pytest.param(kind, marks=needs("bitsandbytes")) for kind in BNB),
    *(pytest.param(kind, marks=needs("torchao")) for kind in TORCHAO),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_base):
    path = tmp_path_factory.mktemp("base")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4, "head_dim": 16}
    for seed, name in enumerate(("one", "other")):
        make_base(seed=seed, **sizes).save_pretrained(path / name)
    return path


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def load(folder, kind):
    """A fresh quantised base, in the form that training needs (see quantized.py)."""

    def make(name="one", dtype=torch.float32):
        base = AutoModelForCausalLM.from_pretrained(folder / name, quantization_config=bits(kind), dtype=dtype)
        keep_differentiable(base)
        return base.eval()

    return make


@pytest.fixture
def batch(tokens):
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :3] = 0
    labels = tokens(3, 9, seed=1)
    labels[:, :5] = -100
    return {"input_ids": tokens(3, 9), "attention_mask": mask}, labels


def train(model, batch, labels, steps=3):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for step in range(steps):
        model(**batch, labels=labels, logits_at_labels=bool(step % 2)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_memories_stay_what_they_are(load, make_imsm, batch, tmp_path, dtype):
    batch, labels = batch
    base = load(dtype=dtype)
    with torch.no_grad():
        expected = base(**batch).logits
    weights = copy.deepcopy({n: p.data for n, p in base.named_parameters()})
    model = make_imsm(base=base, trained=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}  # gate and adapter
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)  # at the start of training
        before = fingerprint(load(dtype=dtype))
    assert model.base_fingerprint == before
    train(model, batch, labels)
    kept = {n.replace(".base_layer", "").removeprefix("base_model.model."): p for n, p in model.named_parameters()}
    assert all(torch.equal(_raw(kept[n]), _raw(w)) for n, w in weights.items())
    with torch.no_grad():
        with model.use_memory("original"):
            assert torch.equal(model(**batch).logits, expected)
        with model.use_memory("enhanced"):
            enhanced = model(**batch).logits
        interwoven = model(**batch).logits
    assert not torch.equal(enhanced, expected)
    assert not torch.equal(interwoven, enhanced)

    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        plain = PeftModel.from_pretrained(load(dtype=dtype), str(tmp_path / "saved")).eval()
        assert torch.equal(plain(**batch).logits, enhanced)
        again = IMSMModel.from_pretrained(str(tmp_path / "saved"), load(dtype=dtype))
        assert torch.equal(again(**batch).logits, interwoven)


def _raw(weight):
    """What a weight of a quantised layer is stored as."""
    weight = weight.data
    return weight if type(weight) is torch.Tensor else weight.qdata


def test_stacked_equals_two_passes(load, kind, make_imsm, batch):
    batch, _ = batch
    model = make_imsm(base=load())
    logits = {}
    with torch.no_grad():
        for plan in ("two_pass", "stacked"):
            model.plan = plan
            logits[plan] = model(**batch, use_cache=True).logits
        with model.use_memory("original"):
            apart = (model(**batch).logits - logits["two_pass"]).abs().max()
    # LLM.int8 chooses the columns that stay in 16 bits by all rows of a batch, so that every other batch rounds anew
    tolerance = 0.05 if kind == "bnb-8bit" else 1e-5
    assert (logits["stacked"] - logits["two_pass"]).abs().max() <= tolerance * apart
    assert model._twin._stackable


def test_every_adapter_learns_also_after_an_evaluation(load, make_imsm, make_peft, batch):
    """A frozen pass, or a validation, is a call in evaluation mode. On some CPUs bitsandbytes makes its 4-bit layers
    faster in it, and no gradient passes them from then on."""
    batch, labels = batch
    model = make_imsm(base=load(), peft_changes={"target_modules": ["q_proj", "v_proj", "down_proj"]})
    with torch.no_grad():
        model(**batch)
    model.train()
    model(**batch, labels=labels, logits_at_labels=True).loss.backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.abs().sum() > 0]
    assert not silent
    names = [n for n, p in model.named_parameters() if p.grad is not None]
    assert all("lora_" in n or n.startswith("gate.") for n in names)


def test_generation(load, make_imsm, batch):
    batch, _ = batch
    model = make_imsm(base=load())
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    whole = model.generate(**batch, **settings)
    assert whole.shape[1] > batch["input_ids"].shape[1]
    with model.use_memory("original"):
        original = model.generate(**batch, **settings)
    assert torch.equal(original, load().generate(**batch, **settings))


def test_another_base_is_refused(load, make_imsm, tmp_path, folder):
    make_imsm(base=load()).save_pretrained(tmp_path / "saved")
    with pytest.raises(BaseMismatchError, match="embeddings, norms or biases"):
        IMSMModel.from_pretrained(str(tmp_path / "saved"), load("other"))
    whole = AutoModelForCausalLM.from_pretrained(folder / "other")
    with pytest.raises(BaseMismatchError, match="embeddings, norms or biases"):
        IMSMModel.from_pretrained(str(tmp_path / "saved"), whole)
    IMSMModel.from_pretrained(str(tmp_path / "saved"), AutoModelForCausalLM.from_pretrained(folder / "one"))


@needs("bitsandbytes")
@pytest.mark.parametrize("kind", BNB)
def test_after_pefts_own_preparation(load, make_imsm, batch):
    batch, labels = batch
    model = make_imsm(base=prepare_model_for_kbit_training(load()), trained=False)
    train(model, batch, labels)
    assert all(torch.isfinite(p).all() for p in model.parameters() if p.requires_grad)


@needs("bitsandbytes")
def test_a_layer_that_was_rearranged_is_put_back(folder, make_imsm, batch):
    batch, labels = batch
    base = AutoModelForCausalLM.from_pretrained(
        folder / "one", quantization_config=bits("bnb-4bit"), dtype=torch.float32
    )
    with torch.no_grad():
        rearranged = base.eval()(**batch).logits  # on CPUs that have what it takes; elsewhere nothing happens
    model = make_imsm(base=base, trained=False)
    with torch.no_grad():
        plain = model(**batch).logits
    assert (plain - rearranged).norm() < 0.05 * plain.norm()
    train(model, batch, labels)
    assert all(p.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)


# --- without any library ----------------------------------------------------------------------------------------------


def test_a_quantised_base_is_known_by_what_stays(make_base):
    def quantised(seed=0):
        base = make_base(seed=seed)
        base.config.quantization_config = {"quant_method": "any"}
        for layer in base.model.layers:
            layer.mlp.down_proj.weight = torch.nn.Parameter(torch.zeros(7, 1, dtype=torch.uint8), requires_grad=False)
        return base

    mine = fingerprint(quantised())
    assert (mine.weights, mine.kept) == (None, fingerprint(make_base()).kept)
    assert str(mine) != str(fingerprint(quantised(seed=1)))
    assert not mine.differences(fingerprint(make_base()))
    assert not fingerprint(make_base()).differences(mine)
    assert "embeddings, norms or biases" in mine.differences(fingerprint(make_base(seed=1)))[0]


def test_a_missing_library_is_said(folder, make_imsm, tmp_path, monkeypatch):
    make_imsm(base=AutoModelForCausalLM.from_pretrained(folder / "one")).save_pretrained(str(tmp_path / "saved"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for where in ("transformers.utils.import_utils", "transformers.quantizers.quantizer_bnb_4bit"):
        monkeypatch.setattr(f"{where}.is_bitsandbytes_available", lambda *args, **kwargs: False)
    with pytest.raises(UnsupportedModelError, match="bitsandbytes"):
        IMSMModel.from_pretrained(
            str(tmp_path / "saved"), str(folder / "one"), quantization_config=BitsAndBytesConfig(load_in_4bit=True)
        )
