"""A memory model on disk."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from twinweave.cmt import MemoryModel
from twinweave.errors import BaseMismatchError, DamagedFileError, UsageError


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(make_memory, make_base, tmp_path, step, texts, tokenizer, trainable, dtype):
    bank = tmp_path / "bank.lance"
    model = make_memory(base=make_base().to(dtype), bank=bank)
    model.memorize(texts)
    model.save_pretrained(tmp_path / "saved")
    base = make_base().to(dtype)
    again = MemoryModel.from_pretrained(
        tmp_path / "saved", base, bank=bank, tokenizer=tokenizer, is_trainable=trainable
    )
    assert again.training == trainable
    assert any(p.requires_grad for p in again.parameters()) == trainable
    assert again.settings == model.settings
    assert again.fingerprint() == model.fingerprint()
    own, found = model.state_dict(), again.state_dict()
    assert own.keys() == found.keys()
    assert all(torch.equal(found[n], own[n]) for n in own)
    with torch.no_grad():
        assert torch.equal(again.eval()(**step()).loss, model(**step()).loss)
    assert again.generate("who?", max_new_tokens=3) == model.generate("who?", max_new_tokens=3)


@pytest.fixture
def saved(make_memory, tmp_path):
    make_memory().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_another_base_is_refused(saved, make_base):
    with pytest.raises(BaseMismatchError):
        MemoryModel.from_pretrained(saved, make_base(seed=1))
    MemoryModel.from_pretrained(saved, make_base(seed=1), allow_base_mismatch=True)


@pytest.mark.parametrize("name", ["cmt_config.json", "cmt.safetensors", "adapter_model.safetensors"])
@pytest.mark.parametrize("how", ["missing", "cut", "pickled", "empty"])
def test_damaged_files_are_refused(saved, make_base, name, how):
    file = saved / name
    content = file.read_bytes()
    file.unlink()
    if how == "pickled":
        torch.save({"a": torch.ones(2)}, file)
    elif how != "missing":
        file.write_bytes(content[: len(content) // 2] if how == "cut" else b"")
    with pytest.raises(DamagedFileError):
        MemoryModel.from_pretrained(saved, make_base())


@pytest.mark.parametrize("name", ["cmt.safetensors", "adapter_model.safetensors"])
def test_missing_and_misshapen_parts_are_refused(saved, make_base, name):
    tensors = load_file(saved / name)
    first = sorted(tensors)[0]
    save_file({n: t for n, t in tensors.items() if n != first}, saved / name)
    with pytest.raises(DamagedFileError):
        MemoryModel.from_pretrained(saved, make_base())
    save_file(tensors | {first: torch.ones(3, 3)}, saved / name)
    with pytest.raises(DamagedFileError):
        MemoryModel.from_pretrained(saved, make_base())


def test_a_setting_that_is_none_is_refused(saved, make_base):
    config = json.loads((saved / "cmt_config.json").read_text())
    config["cmt"]["memory_token"] = 3
    (saved / "cmt_config.json").write_text(json.dumps(config))
    with pytest.raises(DamagedFileError):
        MemoryModel.from_pretrained(saved, make_base())


def test_only_safetensors(make_memory, tmp_path):
    with pytest.raises(UsageError):
        make_memory().save_pretrained(tmp_path / "saved", safe_serialization=False)
    assert not (tmp_path / "saved").exists()
