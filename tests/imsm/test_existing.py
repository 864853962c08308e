"""Going on from an adapter that plain PEFT has trained: from its folder, or from the PeftModel around it."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, PromptTuningConfig, VBLoRAConfig, get_peft_model
from safetensors.torch import load_file, save_file

from twinweave import IMSMConfig, IMSMModel, get_imsm_model
from twinweave.errors import BaseMismatchError, DamagedFileError, UnsupportedModelError, UsageError


@pytest.fixture
def ids(tokens):
    return tokens(2, 8)


@pytest.fixture
def make_trained(make_base, make_peft, perturb):
    """A PeftModel whose adapter has moved, as training would have moved it."""

    def make(kind="lora", **changes):
        base = make_base()
        model = get_peft_model(base, make_peft(kind, **changes))
        perturb(model)
        return model.eval()

    return make


@pytest.fixture
def folder(make_trained, tmp_path):
    make_trained().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


@pytest.mark.parametrize("given", ["folder", "text", "model"])
def test_both_memories_are_the_ones_given(peft_kind, given, make_base, make_trained, ids, tmp_path):
    trained = make_trained(peft_kind)
    enhanced, original = logits(trained, ids), logits(make_base(), ids)
    assert not torch.allclose(enhanced, original, atol=1e-3)
    if given == "model":
        model = get_imsm_model(trained)
    else:
        trained.save_pretrained(tmp_path)
        model = get_imsm_model(make_base(), tmp_path if given == "folder" else str(tmp_path))
    model.eval()
    with model.use_memory("enhanced"):
        torch.testing.assert_close(logits(model, ids), enhanced, rtol=1e-5, atol=1e-5)
    with model.use_memory("original"):
        assert torch.equal(logits(model, ids), original)
    with torch.no_grad():  # the gate is fresh: half of each
        assert torch.equal(model(input_ids=ids, output_gate=True).gate, torch.full((*ids.shape, 32), 0.5))
    trainable = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"gate", "base_model"}


def test_the_gate_alone_learns(folder, make_base, ids):
    model = get_imsm_model(make_base(), folder, IMSMConfig(gate_rank=3), train_adapter=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert not model.trains_adapter
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for _ in range(2):
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"gate.w_a", "gate.w_b"}


def test_an_adapter_that_does_not_learn_has_no_dropout(make_trained, ids):
    model = get_imsm_model(make_trained(lora_dropout=0.5), train_adapter=False)
    model.train()
    assert model.training
    first = model(input_ids=ids, labels=ids).loss
    assert torch.equal(model(input_ids=ids, labels=ids).loss, first)
    model.base_model.set_adapter("default")  # PEFT's way to let it learn again
    assert model.trains_adapter
    model.train()
    assert not torch.equal(model(input_ids=ids, labels=ids).loss, first)


def test_what_is_saved_is_loaded_as_any_other(folder, make_base, perturb, ids, tmp_path):
    model = get_imsm_model(make_base(), folder, train_adapter=False)
    perturb(model)
    model.eval().save_pretrained(tmp_path / "woven")
    again = IMSMModel.from_pretrained(tmp_path / "woven", make_base())
    assert torch.equal(logits(again, ids), logits(model, ids))
    plain, kept = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "woven"))
    assert plain.keys() == kept.keys()
    assert all(torch.equal(plain[name], kept[name]) for name in plain)


def test_an_imsm_folder_gives_its_adapter_to_a_fresh_gate(make_imsm, make_base, ids, tmp_path):
    model = make_imsm()
    model.save_pretrained(tmp_path)
    again = get_imsm_model(make_base(), tmp_path).eval()
    assert again.gate.w_b.count_nonzero() == 0
    with model.use_memory("enhanced"), again.use_memory("enhanced"):
        assert torch.equal(logits(again, ids), logits(model, ids))
    other = make_base(seed=1)
    with pytest.raises(BaseMismatchError, match="weights themselves"):
        get_imsm_model(other, tmp_path)
    assert get_imsm_model(other, LoraConfig(target_modules=["q_proj"]))  # left as it was


def test_another_name_of_the_base_is_said(folder, make_base):
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    base = make_base()
    base.name_or_path = "some/where/llama"
    file.write_text(json.dumps(config | {"base_model_name_or_path": "hub/mistral"}))
    with pytest.warns(UserWarning, match=r"hub/mistral.*some/where/llama"):
        get_imsm_model(base, folder)


def test_another_shape_is_another_base(folder, make_base, ids):
    base = make_base(hidden_size=16)
    before = logits(base, ids)
    with pytest.raises(BaseMismatchError, match="another base"):
        get_imsm_model(base, folder)
    assert torch.equal(logits(base, ids), before)
    assert get_imsm_model(base, LoraConfig(target_modules=["q_proj"]))


def test_damaged_folders(folder, make_base):
    weights = load_file(folder / "adapter_model.safetensors")
    lost = dict(list(weights.items())[1:])
    save_file(lost, folder / "adapter_model.safetensors")
    with pytest.raises(DamagedFileError, match="lacks 1 of its tensors"):
        get_imsm_model(make_base(), folder)
    (folder / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(DamagedFileError):
        get_imsm_model(make_base(), folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(DamagedFileError, match="pickle"):
        get_imsm_model(make_base(), folder)
    with pytest.raises(DamagedFileError, match="no folder"):
        get_imsm_model(make_base(), folder / "nowhere")


def test_peft_models_that_cannot_be_taken_apart(make_trained, make_peft, make_imsm, ids):
    trained = make_trained()
    with pytest.raises(UsageError, match="brings its own adapter"):
        get_imsm_model(trained, make_peft())
    trained.merge_adapter()
    with pytest.raises(UsageError, match="unmerge_adapter"):
        get_imsm_model(trained)
    trained.unmerge_adapter()
    trained.add_adapter("second", make_peft())
    with pytest.raises(UsageError, match="default, second"):
        get_imsm_model(trained)
    trained.delete_adapter("second")
    before = logits(trained, ids)
    with pytest.raises(UnsupportedModelError, match="bias"):
        get_imsm_model(make_trained(bias="all"))
    assert isinstance(trained, PeftModel)
    assert torch.equal(logits(trained, ids), before)
    with pytest.raises(UsageError, match="has a gate"):
        get_imsm_model(make_imsm())


def test_nothing_to_train(make_base, make_peft, folder):
    with pytest.raises(UsageError, match="fresh one"):
        get_imsm_model(make_base(), make_peft(), train_adapter=False)
    with pytest.raises(UsageError, match="no adapter"):
        get_imsm_model(make_base())
    with pytest.raises(UnsupportedModelError, match="no gate to train"):
        get_imsm_model(make_base(), folder, IMSMConfig(fusion="average"), train_adapter=False)
    assert PeftModelForCausalLM.from_pretrained(make_base(), str(folder))


@pytest.mark.parametrize("given", ["PeftModel", "folder"])
@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LoraConfig(r=2, init_lora_weights="pissa", task_type="CAUSAL_LM"), "path_initial_model"),
        (PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "virtual tokens"),
    ],
)
def test_adapters_that_do_not_stand_beside_the_base(config, reason, given, make_base, tmp_path):
    trained = get_peft_model(make_base(), config)
    trained.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=reason):
        get_imsm_model(trained) if given == "PeftModel" else get_imsm_model(make_base(), tmp_path)


@pytest.mark.parametrize("leave", ["taken over", "unloaded"])
def test_trained_copies_of_modules_do_not_stay_in_the_base(leave, make_base, make_peft, make_trained, perturb, ids):
    before = logits(make_base(), ids)
    if leave == "taken over":
        model = get_imsm_model(make_trained(modules_to_save=["input_layernorm"])).eval()
        with model.use_memory("original"):
            assert torch.equal(logits(model, ids), before)
    else:
        model = get_imsm_model(make_base(), make_peft(modules_to_save=["input_layernorm"]))
        perturb(model)
        assert torch.equal(logits(model.unload(), ids), before)


def test_what_is_refused_leaves_the_trained_adapter_where_it_was(make_trained, ids):
    trained = make_trained(target_modules=["q_proj", "lm_head"])
    before = logits(trained, ids)
    with pytest.raises(UnsupportedModelError, match="lm_head"):
        get_imsm_model(trained)
    assert torch.equal(logits(trained, ids), before)


def test_layers_that_share_a_tensor_come_from_a_folder(make_base, make_trained, ids, tmp_path):
    trained = get_peft_model(
        make_base(), VBLoRAConfig(target_modules=["q_proj"], vector_length=4, num_vectors=8, task_type="CAUSAL_LM")
    ).eval()
    trained.save_pretrained(tmp_path)
    model = get_imsm_model(make_base(), tmp_path).eval()
    with model.use_memory("enhanced"):
        assert torch.allclose(logits(model, ids), logits(trained, ids), atol=1e-6)
