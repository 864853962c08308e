"""What is written, what is read back, and what is refused."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

from twinweave import IMSMModel, get_imsm_model
from twinweave.errors import BaseMismatchError, DamagedFileError, UnsupportedModelError, UsageError
from twinweave.fingerprint import fingerprint

CONTRACT = {"adapter_config.json", "adapter_model.safetensors", "imsm_config.json", "imsm_gate.safetensors"}


@pytest.fixture
def ids(tokens):
    return tokens(2, 9)


@pytest.fixture
def saved(make_imsm, tmp_path):
    """A saved Llama model and the model itself."""
    model = make_imsm()
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved", model


@torch.no_grad()
def test_load_onto_a_fresh_base(arch, make_base, make_imsm, ids, tmp_path):
    model = make_imsm(arch)
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = IMSMModel.from_pretrained(tmp_path / "saved", make_base(arch))
    assert not loaded.training
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert torch.equal(
        loaded.generate(input_ids=ids, max_new_tokens=4), model.generate(input_ids=ids, max_new_tokens=4)
    )
    assert loaded.base_fingerprint == model.base_fingerprint


@pytest.mark.parametrize("fusion", ["query_gate", "gate", "average", "enhanced"])
@torch.no_grad()
def test_load_every_adapter_and_fusion(peft_kind, fusion, make_base, make_imsm, ids, tmp_path):
    model = make_imsm("llama", peft_kind, fusion=fusion, gate_rank=5, gate_dropout=0.1)
    model.save_pretrained(tmp_path)
    loaded = IMSMModel.from_pretrained(tmp_path, make_base())
    assert loaded.imsm_config == model.imsm_config
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


@torch.no_grad()
def test_base_none_loads_the_recorded_base(make_base, make_imsm, ids, tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    model = make_imsm(base=AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "base"
    )
    for base in (None, str(tmp_path / "base")):
        loaded = IMSMModel.from_pretrained(tmp_path / "saved", base)
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    half = IMSMModel.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(UnsupportedModelError, match=r"base=MODEL"):
        IMSMModel.from_pretrained(tmp_path / "saved")


def test_exactly_the_files_of_the_contract_and_no_base_weights(saved, make_imsm, tmp_path):
    folder, model = saved
    # README.md is the model card that PEFT writes beside every adapter
    assert {p.name for p in folder.rglob("*")} == CONTRACT | {"README.md"}
    assert [p.name for p in folder.parent.iterdir()] == ["saved"]
    assert all("lora_" in name for name in load_file(folder / "adapter_model.safetensors"))
    assert set(load_file(folder / "imsm_gate.safetensors")) == {"w_a", "w_b"}
    for targets in (["embed_tokens", "q_proj"], "all-linear"):  # PEFT would add the embeddings here
        model = make_imsm(peft_changes={"target_modules": targets})
        model.save_pretrained(tmp_path / "more")
        assert all("lora_" in name for name in load_file(tmp_path / "more" / "adapter_model.safetensors"))


@torch.no_grad()
def test_an_adapter_on_the_embeddings_comes_back(make_base, make_imsm, ids, tmp_path):
    model = make_imsm(peft_changes={"target_modules": ["embed_tokens", "q_proj"]})
    model.save_pretrained(tmp_path)
    loaded = IMSMModel.from_pretrained(tmp_path, make_base())
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    model.retention = float("inf")
    assert torch.equal(model(input_ids=ids).logits, make_base()(input_ids=ids).logits)


@torch.no_grad()
def test_modules_to_save_below_the_head_come_back(make_base, make_imsm, ids, tmp_path):
    model = make_imsm(peft_changes={"modules_to_save": ["norm"]})
    model.save_pretrained(tmp_path)
    loaded = IMSMModel.from_pretrained(tmp_path, make_base())
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    with model.use_memory("original"):
        assert torch.equal(model(input_ids=ids).logits, make_base()(input_ids=ids).logits)


@torch.no_grad()
def test_plain_peft_loads_the_folder(saved, make_base, ids):
    folder, model = saved
    plain = PeftModel.from_pretrained(make_base(), str(folder)).eval()
    assert type(plain) is not IMSMModel
    with model.use_memory("enhanced"):
        assert torch.equal(plain(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("retention", [0.0, 1.5, -3, float("inf"), float("-inf")])
@torch.no_grad()
def test_retention_is_saved(retention, saved, make_base, ids):
    folder, model = saved
    model.retention = retention
    model.save_pretrained(folder)
    json.loads((folder / "imsm_config.json").read_text(), parse_constant=pytest.fail)  # is JSON, without Infinity
    loaded = IMSMModel.from_pretrained(folder, make_base())
    assert loaded.retention == retention
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_trainable_or_not(saved, make_base):
    folder, model = saved
    frozen = IMSMModel.from_pretrained(folder, make_base())
    assert not any(p.requires_grad for p in frozen.parameters())
    live = IMSMModel.from_pretrained(folder, make_base(), is_trainable=True)
    expected = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in live.named_parameters() if p.requires_grad} == expected
    assert live.training


@torch.no_grad()
def test_load_adapter_on_a_live_model_brings_the_gate_too(saved, perturb, ids):
    """What Trainer does with the best checkpoint, and on resuming."""
    folder, model = saved
    expected = model(input_ids=ids).logits
    for trainable in (False, True):
        perturb(model, seed=77)
        assert not torch.equal(model(input_ids=ids).logits, expected)
        before = {n for n, p in model.named_parameters() if p.requires_grad}
        model.load_adapter(str(folder), "default", is_trainable=trainable)
        assert torch.equal(model(input_ids=ids).logits, expected)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == before


def test_saving_over_a_saved_model_replaces_it_and_keeps_other_files(saved, make_base, perturb, ids):
    folder, model = saved
    (folder / "notes.txt").write_text("mine")
    perturb(model, seed=5)
    model.save_pretrained(folder)
    with torch.no_grad():
        loaded = IMSMModel.from_pretrained(folder, make_base())
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert (folder / "notes.txt").read_text() == "mine"


def test_saving_into_the_working_directory(make_imsm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_imsm().save_pretrained(".")
    assert {p.name for p in tmp_path.iterdir()} == CONTRACT | {"README.md"}


def test_a_failing_save_leaves_the_last_one(saved, perturb, monkeypatch):
    folder, model = saved
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    perturb(model, seed=5)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("twinweave.imsm.saving.save_file", full)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_gathered_state_dict_is_what_is_saved(saved, make_base, ids):
    """A sharded trainer hands the whole weights in; those in the module may be pieces."""
    folder, model = saved
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(input_ids=ids).logits
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    model.save_pretrained(folder, state_dict=state)
    assert torch.equal(IMSMModel.from_pretrained(folder, make_base())(input_ids=ids).logits, expected)


def test_only_the_main_process_writes(make_imsm, tmp_path):
    make_imsm().save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not list((tmp_path / "saved").iterdir())


def test_pickles_are_not_written(make_imsm, tmp_path):
    with pytest.raises(DamagedFileError, match="safetensors"):
        make_imsm().save_pretrained(tmp_path / "saved", safe_serialization=False)
    assert not (tmp_path / "saved").exists()


# --- another base -------------------------------------------------------------------------------------------------


def test_another_base_is_refused_and_left_alone(saved, make_base, ids):
    folder, _ = saved
    cases = {
        "architecture or sizes": make_base(intermediate_size=40),
        "number of parameters": make_base(tie_word_embeddings=True),
        "the weights themselves": make_base(seed=1),
    }
    for words, other in cases.items():
        expected = other(input_ids=ids).logits
        with pytest.raises(BaseMismatchError, match=words) as caught:
            IMSMModel.from_pretrained(folder, other)
        assert "allow_base_mismatch" in str(caught.value)
        assert not any("lora" in name for name, _ in other.named_modules())
        assert torch.equal(other(input_ids=ids).logits, expected)


def test_another_base_can_be_allowed(saved, make_base, ids):
    folder, model = saved
    loaded = IMSMModel.from_pretrained(folder, make_base(seed=1), allow_base_mismatch=True)
    logits = loaded(input_ids=ids).logits
    assert torch.isfinite(logits).all()
    assert not torch.equal(logits, model(input_ids=ids).logits)


def test_another_precision_is_the_same_base(make_base, make_imsm, tmp_path, ids):
    source = make_base().to(torch.bfloat16)
    model = make_imsm(base=source)
    model.save_pretrained(tmp_path)
    as_fp32 = make_base().to(torch.bfloat16).float()
    assert fingerprint(as_fp32) == model.base_fingerprint
    assert torch.isfinite(IMSMModel.from_pretrained(tmp_path, as_fp32)(input_ids=ids).logits).all()


def test_options_for_a_base_that_is_already_loaded(saved, make_base):
    with pytest.raises(UsageError, match="dtype"):
        IMSMModel.from_pretrained(saved[0], make_base(), dtype=torch.float32)


def test_a_base_without_a_name_must_be_passed(saved):
    with pytest.raises(BaseMismatchError, match="base="):
        IMSMModel.from_pretrained(saved[0])


# --- damaged files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(CONTRACT))
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "noise", "pickle"])
def test_damaged_files(name, damage, saved, make_base):
    folder, _ = saved
    file = folder / name
    content = file.read_bytes()
    match damage:
        case "missing":
            file.unlink()
        case "empty":
            file.write_bytes(b"")
        case "cut":
            file.write_bytes(content[: len(content) // 2])
        case "noise":
            file.write_bytes(bytes(b ^ 0x5A for b in content))
        case "pickle":
            torch.save({"w_a": torch.zeros(1)}, file)
    with pytest.raises(DamagedFileError) as caught:
        IMSMModel.from_pretrained(folder, make_base())
    assert name in str(caught.value)


def test_a_pickled_adapter_is_refused_without_being_opened(saved, make_base):
    folder, _ = saved
    weights = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(weights, folder / "adapter_model.bin")
    with pytest.raises(DamagedFileError, match="pickle"):
        IMSMModel.from_pretrained(folder, make_base())


def test_weights_that_do_not_fit_their_settings(saved, make_base):
    folder, _ = saved
    gate, adapter = load_file(folder / "imsm_gate.safetensors"), load_file(folder / "adapter_model.safetensors")
    save_file({"w_a": gate["w_a"][:, :2].contiguous(), "w_b": gate["w_b"][:2]}, folder / "imsm_gate.safetensors")
    with pytest.raises(DamagedFileError, match="shapes"):
        IMSMModel.from_pretrained(folder, make_base())
    save_file({"w_a": gate["w_a"]}, folder / "imsm_gate.safetensors")
    with pytest.raises(DamagedFileError, match="w_b"):
        IMSMModel.from_pretrained(folder, make_base())
    save_file(gate, folder / "imsm_gate.safetensors")
    some = dict(list(adapter.items())[1:])
    save_file(some, folder / "adapter_model.safetensors")
    with pytest.raises(DamagedFileError, match="lacks 1"):
        IMSMModel.from_pretrained(folder, make_base())
    save_file({k: v[:1].contiguous() for k, v in adapter.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(DamagedFileError, match="adapter_model"):
        IMSMModel.from_pretrained(folder, make_base())


def test_a_folder_of_plain_peft_or_none_at_all(make_base, tmp_path):
    plain = get_peft_model(make_base(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(DamagedFileError, match=r"PeftModel\.from_pretrained"):
        IMSMModel.from_pretrained(tmp_path / "plain", make_base())
    with pytest.raises(DamagedFileError, match="no folder"):
        IMSMModel.from_pretrained(tmp_path / "nowhere", make_base())


def test_an_unknown_setting_in_the_file(saved, make_base):
    folder, _ = saved
    settings = json.loads((folder / "imsm_config.json").read_text())
    settings["imsm"]["gate_rnk"] = settings["imsm"].pop("gate_rank")
    (folder / "imsm_config.json").write_text(json.dumps(settings))
    with pytest.raises(UsageError, match="gate_rank"):
        IMSMModel.from_pretrained(folder, make_base())


# --- transformers' Trainer ----------------------------------------------------------------------------------------


def test_trainer_saves_resumes_and_brings_back_the_best(make_imsm, make_base, tokens, tmp_path):
    rows = [{"input_ids": row, "labels": torch.cat((torch.full((3,), -100), row[3:]))} for row in tokens(8, 8)]

    def trainer(model, steps):
        return Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(tmp_path / "run"),
                max_steps=steps,
                per_device_train_batch_size=4,
                learning_rate=0.02,
                lr_scheduler_type="constant",
                save_steps=2,
                eval_steps=2,
                eval_strategy="steps",
                load_best_model_at_end=True,
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=rows,
            eval_dataset=rows[:2],
        )

    model = make_imsm(trained=False)
    first = trainer(model, 4)
    first.train()
    folder = tmp_path / "run" / "checkpoint-4"
    assert {p.name for p in folder.iterdir()} >= CONTRACT
    best = IMSMModel.from_pretrained(first.state.best_model_checkpoint, make_base())
    ids = rows[0]["input_ids"][None]
    with torch.no_grad():
        assert torch.equal(best(input_ids=ids).logits, model.eval()(input_ids=ids).logits)

    whole = make_imsm(trained=False)
    second = trainer(whole, 6)
    second.train(resume_from_checkpoint=str(folder))
    assert second.state.global_step == 6
    shutil.rmtree(tmp_path / "run")
    straight = make_imsm(trained=False)
    trainer(straight, 6).train()
    for (name, a), (_, b) in zip(whole.named_parameters(), straight.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_wrapping_again_after_unloading(saved, make_base, make_peft, ids):
    _, model = saved
    base = model.unload()
    assert torch.equal(base(input_ids=ids).logits, make_base()(input_ids=ids).logits)
    again = get_imsm_model(base, make_peft())
    assert torch.equal(again(input_ids=ids).logits, make_base()(input_ids=ids).logits)
