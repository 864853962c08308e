"""PiSSA, OLoRA, CorDA and LoRA-GA start and learn as in PEFT, over the base as it is."""

import pytest
import torch
from peft import LoftQConfig, LoraConfig, LoraGAConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file

from twinweave import IMSMConfig, IMSMModel, TwinweaveError, get_imsm_model
from twinweave.errors import UnsupportedModelError
from twinweave.imsm.starts import START

TOO_LARGE = {"r": 20, "target_modules": ["v_proj"]}  # a weight of 16 x 32


@pytest.fixture
def ids(tokens):
    return tokens(3, 9)


def config(start, **changes):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": start}
    if start == "lora_ga":
        settings["lora_ga_config"] = LoraGAConfig()
    if start == "loftq":
        settings["loftq_config"] = LoftQConfig()
    if start == "corda":
        settings["corda_config"] = CordaConfig(corda_method="kpm")
    return LoraConfig(task_type="CAUSAL_LM", **settings | changes)


def prepared(base, start, ids):
    """What PEFT has to be told of a base before it can make the start."""
    if start == "lora_ga":
        base.requires_grad_(True)
        preprocess_loraga(base, config(start), lambda: base(input_ids=ids, labels=ids).loss.backward())
        base.zero_grad()
    if start == "corda":
        preprocess_corda(base, config(start), run_model=lambda: [base(input_ids=row[None]) for row in ids])
    return base


def svd_without_chance(matrix, q=6, niter=2):
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :q], s[:q], vh[:q].T


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def trained(model, ids, decay=0.0):
    """Steps of the adapter alone; of an IMSM model as its enhanced memory."""
    learning = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("gate.")]
    optimizer = torch.optim.SGD(learning, lr=0.1, weight_decay=decay)
    model.train()
    for _ in range(4):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize(
    ("start", "changes"),
    [
        ("pissa", {}),
        ("pissa", {"use_rslora": True, "rank_pattern": {"v_proj": 2}}),
        ("olora", {"target_modules": "all-linear"}),
        ("corda", {}),
        ("lora_ga", {}),
    ],
    ids=str,
)
def test_it_is_what_peft_trains_over_a_changed_base(start, changes, make_base, ids, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "svd_lowrank", svd_without_chance)
    expected = logits(make_base(), ids)
    models = []
    for wrap in (
        get_peft_model,
        lambda base, c: get_imsm_model(base, c, IMSMConfig(gate_rank=3, retention=-torch.inf)),
    ):
        base = prepared(make_base(), start, ids)
        torch.manual_seed(5)
        models.append(wrap(base, config(start, **changes)).eval())
    plain, model = models
    with model.use_memory("original"):
        assert torch.equal(logits(model, ids), expected)
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-4, rtol=1e-4)
    names = {name.replace(f".{START}.", ".default.") for name, p in model.named_parameters() if p.requires_grad}
    assert names - {"gate.w_a", "gate.w_b"} == {name for name, p in plain.named_parameters() if p.requires_grad}

    started = {n: p.clone() for n, p in model.named_parameters() if f".{START}." in n}
    found, wanted = (logits(trained(m, ids, decay=0.1), ids) for m in (model, plain))
    assert (wanted - expected).abs().max() > 0.1
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)
    assert all(torch.equal(p, started[n]) for n, p in model.named_parameters() if n in started)
    with model.use_memory("original"):
        assert torch.equal(logits(model, ids), expected)

    model.save_pretrained(tmp_path)
    shapes = {t.shape[0] for n, t in load_file(tmp_path / "adapter_model.safetensors").items() if "lora_A" in n}
    assert shapes == ({8, 4} if "rank_pattern" in changes else {8})
    for loaded in (PeftModel.from_pretrained(make_base(), tmp_path), IMSMModel.from_pretrained(tmp_path, make_base())):
        torch.testing.assert_close(logits(loaded.eval(), ids), found, atol=1e-4, rtol=1e-4)


def test_the_start_stays_with_its_adapter(make_base, make_peft, perturb, ids):
    model = get_imsm_model(make_base(), config("pissa"), IMSMConfig(gate_rank=3)).eval()
    perturb(model)
    expected = logits(model, ids)
    model.add_adapter("other", make_peft())
    model.set_adapter("other")
    assert torch.equal(logits(model, ids), logits(make_base(), ids))
    model.set_adapter("default")
    assert torch.equal(logits(model, ids), expected)
    assert not any(p.requires_grad for n, p in model.named_parameters() if f".{START}." in n)


@pytest.mark.parametrize(
    ("start", "changes", "words"),
    [
        ("pissa", {"use_dora": True}, "use_dora"),
        ("olora", {"target_modules": ["embed_tokens", "q_proj"]}, "Embedding"),
        ("pissa", TOO_LARGE, "r=20"),
        ("corda", {}, "preprocess_corda"),
        ("lora_ga", {}, "preprocess_loraga"),
        ("loftq", {}, "quantised"),
    ],
    ids=str,
)
def test_starts_that_cannot_be_made_leave_the_base_alone(start, changes, words, make_base, make_peft, ids):
    base = make_base()
    with pytest.raises(UnsupportedModelError, match=words):
        get_imsm_model(base, config(start, **changes))
    assert torch.equal(logits(base, ids), logits(make_base(), ids))
    assert torch.equal(logits(get_imsm_model(base, make_peft()).eval(), ids), logits(make_base(), ids))


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("second", {"init_lora_weights": "pissa"}, "first adapter"),
        ("second", {"target_modules": ["lm_head"]}, "lm_head"),
        ("imsm_start", {}, "taken"),
    ],
)
def test_no_second_adapter_changes_the_base(name, changes, reason, make_base, make_peft, ids):
    before = logits(make_base(), ids)
    model = get_imsm_model(make_base(), make_peft()).eval()
    expected = logits(model, ids)
    with pytest.raises(TwinweaveError, match=reason):
        model.add_adapter(name, make_peft(**changes))
    assert torch.equal(logits(model, ids), expected)
    with model.use_memory("original"):
        assert torch.equal(logits(model, ids), before)


def test_a_saved_start_is_loaded_into_the_model_it_came_from(make_base, make_peft, perturb, ids, tmp_path):
    model = get_imsm_model(make_base(), make_peft(init_lora_weights="pissa")).eval()
    perturb(model)
    model.save_pretrained(tmp_path)
    expected = logits(model, ids)
    perturb(model)
    assert not torch.allclose(logits(model, ids), expected)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model, ids), expected)
