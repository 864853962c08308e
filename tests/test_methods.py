"""The table of methods: what each builds, what its dial does, and that a dial leaves the model as it found it."""

import pytest
import torch

from twinweave.errors import UnsupportedModelError, UsageError
from twinweave.imsm import DomainGuard, GuardSettings, IMSMConfig, IMSMModel
from twinweave.methods import METHODS, Settings, get_method, label_of
from twinweave.slim.clustering import SlidingClusters

TRAINED = [name for name, method in METHODS.items() if method.build]
DIALS = [name for name, method in METHODS.items() if method.dial]


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens(2, 7)).logits


def test_the_table_is_consistent():
    for name, method in METHODS.items():
        assert method.name == name
        assert method.label
        assert method.description.endswith(".")
        assert method.load is not None
        assert (method.build is None) is (method.dial is not None)
        if method.dial:
            assert METHODS[method.dial.of].build
            assert method.knob
        if method.knob:
            assert len(set(method.knob.values)) == len(method.knob.values) > 0
            assert (method.knob.multiplies == "term") is (method.dial is not None or method.term is not None)
        assert method.rehearses == "never" or method.build
    knobbed = [method for method in METHODS.values() if method.knob and method.build]
    assert len({method.knob.name for method in knobbed}) == len(knobbed)
    assert len({method.label for method in METHODS.values()}) == len(METHODS)
    with pytest.raises(UsageError, match=r"'imsm_gat'.*'imsm_gate'"):
        get_method("imsm_gat")


def test_labels_name_the_adapter():
    assert label_of("peft", "lora") == "LoRA"
    assert label_of("peft_scaled", "adalora") == "AdaLoRA × λ"
    assert label_of("peft", "vera") == "vera"
    assert label_of("imsm", "lora") == "IMSM"
    assert label_of("peft_lwf", "lora") == "LoRA + KL to the base (LwF)"
    assert label_of("peft_ewc", "ia3") == "(IA)³ + EWC"
    assert label_of("peft_l2", "lora") == "LoRA + L2-SP"
    assert [label_of(f"peft_{name}", "lora") for name in ("osf", "oft")] == ["OSF", "OFT"]
    assert label_of("peft_corda", "lora") == "CorDA (knowledge-preserved)"


@pytest.mark.parametrize("name", TRAINED)
def test_every_method_starts_as_the_base_and_survives_saving(name, make_base, make_peft, perturb, tokens, tmp_path):
    method = get_method(name)
    base = make_base()
    before = logits(base, tokens)
    model = method.build(base, make_peft("lora"), Settings(IMSMConfig(gate_rank=3))).eval()
    close = 1e-5 if name == "peft_osf" else 0.0  # what OSF adds is the difference of two equal products
    assert torch.allclose(logits(model, tokens), before, atol=close, rtol=0)
    if isinstance(model, IMSMModel):
        fusions = {"imsm_gate": "gate", "imsm_average": "average", "imsm_guard_alone": "enhanced"}
        assert model.imsm_config.fusion == fusions.get(name, "query_gate")
    perturb(model)
    model.save_pretrained(str(tmp_path))
    assert torch.equal(logits(method.load(str(tmp_path), make_base()).eval(), tokens), logits(model, tokens))


def test_the_settings_of_one_method_do_not_leak_into_another(make_base, make_peft):
    settings = Settings(IMSMConfig(gate_rank=3), {"num_experts": 2})
    for name in TRAINED:
        get_method(name).build(make_base(), make_peft("lora"), settings)
    assert settings == Settings(IMSMConfig(gate_rank=3), {"num_experts": 2})


@pytest.mark.parametrize("name", DIALS)
def test_a_dial_holds_for_its_block_only_whatever_happens_in_it(name, make_base, make_peft, perturb, tokens):
    dial = get_method(name).dial
    model = get_method(dial.of).build(make_base(), make_peft("lora"), Settings(IMSMConfig(gate_rank=3))).eval()
    perturb(model)
    for clusters in (module for module in model.modules() if isinstance(module, SlidingClusters)):
        clusters.batches.fill_(1)  # as in training: without one there is no distance to dial
    if get_method(name).guarded:
        with pytest.raises(UsageError, match="guard=on"), dial.apply(model, 0.5):
            pass
        border = torch.tensor([0.1, 1.0])
        model.guard = DomainGuard(GuardSettings(strength=5.0), torch.eye(32)[:, :3], torch.zeros(1, 3), border)
    before = logits(model, tokens)
    with dial.apply(model, 0.5):
        assert not torch.equal(logits(model, tokens), before)
    assert torch.equal(logits(model, tokens), before)
    with pytest.raises(ZeroDivisionError), dial.apply(model, 0.5):
        raise ZeroDivisionError
    assert torch.equal(logits(model, tokens), before)


def test_the_ends_of_the_dials_are_the_base_and_the_trained_model(make_base, make_peft, perturb, tokens):
    base = logits(make_base(), tokens)
    plain = get_method("peft").build(make_base(), make_peft("lora"), Settings()).eval()
    perturb(plain)
    enhanced = logits(plain, tokens)
    scale = get_method("peft_scaled").dial.apply
    with scale(plain, 0.0):
        assert torch.allclose(logits(plain, tokens), base, atol=1e-6)
    with scale(plain, 1.0):
        assert torch.equal(logits(plain, tokens), enhanced)
    woven = get_method("imsm").build(make_base(), make_peft("lora"), Settings(IMSMConfig(gate_rank=3))).eval()
    perturb(woven)
    retention = get_method("imsm_retention").dial.apply
    trained = logits(woven, tokens)
    with retention(woven, 0.0):
        assert torch.equal(logits(woven, tokens), trained)
    with retention(woven, float("inf")):
        assert torch.equal(logits(woven, tokens), base)
    woven.retention = 1.0
    with retention(woven, 0.5):  # on top of what the model was saved with
        assert woven.retention == 1.5


def test_scaling_is_the_interpolation_of_weights(make_base, make_peft, perturb, tokens):
    model = get_method("peft").build(make_base(), make_peft("lora"), Settings()).eval()
    perturb(model)
    with get_method("peft_scaled").dial.apply(model, 0.25):
        scaled = logits(model, tokens)
    merged, base = model.merge_and_unload(), make_base()
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            parameter.copy_(torch.lerp(base.get_parameter(name), parameter, 0.25))
    assert torch.allclose(logits(merged, tokens), scaled, atol=1e-5)


def test_what_cannot_be_built_or_scaled_is_our_error(make_base, make_peft):
    for name in (name for name in TRAINED if not get_method(name).reads):  # what reads has no adapter of the recipe
        nowhere = Settings(slim={"target_modules": ["nothing"]})  # SLIM's own, which the adapter's say nothing about
        for bad in (make_peft("lora", target_modules=["nothing"]), make_peft("lora", r=-1)):
            with pytest.raises(UnsupportedModelError):
                get_method(name).build(make_base(), bad, nowhere)
        with pytest.raises(UnsupportedModelError):
            get_method(name).build(torch.nn.Linear(2, 2), make_peft("lora"), Settings())
    ia3 = get_method("peft").build(make_base(), make_peft("ia3"), Settings())
    with pytest.raises(UsageError, match="peft_scaled"), get_method("peft_scaled").dial.apply(ia3, 0.5):
        pass
