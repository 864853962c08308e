"""What is written: a generator that loads as it was, and LoRA files that plain PEFT takes."""

import json
import pickle

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from twinweave.errors import BaseMismatchError, DamagedFileError, UsageError
from twinweave.genadapter import GenerativeAdapter


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("normalization", ["svd", "frobenius"])
def test_plain_peft_gives_the_live_logits(make_reader, make_base, tokens, tmp_path, arch, normalization):
    rank = 12 if normalization == "frobenius" else 5
    reader = make_reader(arch=arch, normalization=normalization, rank=rank)
    state = reader.read("a text of more than one chunk, to be sure.")
    state.to_lora(tmp_path)
    plain = PeftModel.from_pretrained(make_base(arch), tmp_path).eval()
    with reader.adapted(state):
        torch.testing.assert_close(logits(plain, tokens(2, 9)), logits(reader, tokens(2, 9)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_files_hold_r_times_in_plus_out_numbers(reader, tmp_path, dtype, size):
    reader.read("x").to_lora(tmp_path, dtype=dtype)  # of rank one, and as large as any
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    numbers = sum(5 * (t.in_features + t.out_features) for t in reader.targets)
    assert sum(t.numel() for t in tensors.values()) == numbers
    assert {t.dtype for t in tensors.values()} == {dtype}
    header = int.from_bytes((tmp_path / "adapter_model.safetensors").read_bytes()[:8], "little")
    assert (tmp_path / "adapter_model.safetensors").stat().st_size == size * numbers + header + 8


def test_saved_and_loaded(reader, make_base, tokens, tmp_path):
    reader.save_pretrained(tmp_path)
    again = GenerativeAdapter.from_pretrained(tmp_path, make_base(), tokenizer=reader.tokenizer)
    assert not again.training
    assert again.fingerprint() == reader.fingerprint()
    assert again.read("the text") == reader.read("the text")
    assert {f.name for f in tmp_path.iterdir()} == {"generator.safetensors", "generator_config.json"}
    assert not any("base" in name for name in load_file(tmp_path / "generator.safetensors"))


def test_another_base_is_refused(reader, make_base, tmp_path):
    reader.save_pretrained(tmp_path)
    with pytest.raises(BaseMismatchError, match="another base"):
        GenerativeAdapter.from_pretrained(tmp_path, make_base(seed=1))
    GenerativeAdapter.from_pretrained(tmp_path, make_base(seed=1), allow_base_mismatch=True)


def test_damaged_files_are_refused(reader, make_base, tmp_path):
    reader.save_pretrained(tmp_path)
    weights, settings = tmp_path / "generator.safetensors", tmp_path / "generator_config.json"
    whole = weights.read_bytes()
    for content in (whole[:-4], whole[:30], b"", pickle.dumps({})):
        weights.write_bytes(content)
        with pytest.raises(DamagedFileError):
            GenerativeAdapter.from_pretrained(tmp_path, make_base())
    weights.write_bytes(whole)
    values = json.loads(settings.read_text())
    unknown = values | {"generative_adapter": values["generative_adapter"] | {"zzz": 1}}
    nameless = values | {"base": {"fingerprint": values["base"]["fingerprint"]}}
    layerless = {key: value for key, value in values.items() if key != "modules"}
    for content in ("{", "{}", *(json.dumps(v) for v in (values | {"base": {}}, unknown, nameless, layerless))):
        settings.write_text(content)
        with pytest.raises(DamagedFileError):
            GenerativeAdapter.from_pretrained(tmp_path, make_base())
    for named, message in (
        (["q_proj"], r"layer 0 that was adapted is model\.layers\.0\.\S+o_proj, and model\.layers\.0\.\S+q_proj is"),
        (["layers.0.self_attn.o_proj"], r"layer 1 that was adapted is .*layers\.1.*o_proj, and None is"),
    ):
        other = values["generative_adapter"] | {"target_modules": named}
        settings.write_text(json.dumps(values | {"generative_adapter": other}))
        with pytest.raises(DamagedFileError, match=message):
            GenerativeAdapter.from_pretrained(tmp_path, make_base())
    settings.write_text(json.dumps(values | {"generative_adapter": values["generative_adapter"] | {"state_size": 16}}))
    with pytest.raises(DamagedFileError, match="does not fit"):
        GenerativeAdapter.from_pretrained(tmp_path, make_base())


def test_a_failed_save_keeps_what_was_there(reader, make_reader, tmp_path, monkeypatch):
    reader.save_pretrained(tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("twinweave.genadapter.saving.write_json_atomic", full)
    with pytest.raises(OSError, match="disk full"):
        make_reader(seed=9).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="pickle"):
        reader.save_pretrained(tmp_path, safe_serialization=False)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
