"""Adapters of other kinds than LoRA's: switched off exactly, several at once, and what each needs of the twin."""

import pickle

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    LoraConfig,
    PeftModel,
    PolyConfig,
    PromptEncoderConfig,
    ShadowConfig,
    TrainableTokensConfig,
    VBLoRAConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file

from twinweave import IMSMConfig, IMSMModel, get_imsm_model
from twinweave.errors import DamagedFileError, UnsupportedModelError
from twinweave.files import read_safetensors

ATTENTION = ["q_proj", "v_proj"]


@pytest.fixture
def ids(tokens):
    return tokens(2, 9)


def logits(model, ids, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def wrapped(base, perturb, config, seed=1):
    torch.manual_seed(3)
    model = get_imsm_model(base, config, IMSMConfig(gate_rank=3))
    perturb(model, seed=seed)
    return model.eval()


def lora(**changes):
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=ATTENTION, **changes)


def adaption(**changes):
    settings = {"adapter_len": 4, "adapter_layers": 2, "target_modules": "self_attn"}
    return AdaptionPromptConfig(task_type="CAUSAL_LM", **settings | changes)


@pytest.mark.parametrize("make", [lora, adaption, lambda: ShadowConfig(task_type="CAUSAL_LM", r=4)])
def test_adapters_come_and_go(make, make_base, perturb, ids):
    expected = logits(make_base(), ids)
    model = wrapped(make_base(), perturb, make())
    first = logits(model, ids)
    model.add_adapter("other", make())
    model.eval()  # what is added is in training mode
    assert torch.equal(logits(model, ids), first)
    model.set_adapter("other")
    perturb(model, seed=4)
    with model.use_memory("enhanced"):
        other = logits(model, ids)
    assert not torch.equal(other, first)
    for name in ("other", "default", "other"):
        model.set_adapter(name)
        for memory in (model.use_memory("original"), model.disable_adapter()):
            with memory:
                assert torch.equal(logits(model, ids), expected)
        with model.use_memory("enhanced"):
            assert torch.equal(logits(model, ids), other) == (name == "other")
        model.retention = float("inf")
        assert torch.equal(logits(model, ids), expected)
        model.retention = 0.0
    model.set_adapter("default")
    model.delete_adapter("other")
    with model.use_memory("original"):
        assert torch.equal(logits(model, ids), expected)
    assert torch.equal(logits(model.unload(), ids), expected)


@torch.no_grad()
def test_two_active_adapters_are_one_enhanced_memory(make_base, perturb, ids):
    model = wrapped(make_base(), perturb, lora())
    model.add_adapter("other", lora())
    model.base_model.set_adapter(["default", "other"])
    perturb(model, seed=5)
    torch.manual_seed(3)
    plain = get_peft_model(make_base(), lora()).eval()
    plain.add_adapter("other", lora())
    plain.base_model.set_adapter(["default", "other"])
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith("gate.")})
    with model.use_memory("enhanced"):
        assert torch.equal(logits(model, ids), logits(plain, ids))
    with model.use_memory("original"):
        assert torch.equal(logits(model, ids), logits(make_base(), ids))
    options = {"max_new_tokens": 5, "do_sample": False}
    cached = model.generate(input_ids=ids, **options)
    assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **options))


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mistral"])
def test_adaption_prompts(arch, make_base, perturb, ids, tmp_path):
    target = "attn" if arch == "gpt2" else "self_attn"
    model = wrapped(make_base(arch), perturb, adaption(target_modules=target))
    model.save_pretrained(tmp_path)
    with model.use_memory("enhanced"):
        assert torch.equal(logits(model, ids), logits(PeftModel.from_pretrained(make_base(arch), tmp_path).eval(), ids))
    again = IMSMModel.from_pretrained(tmp_path, make_base(arch))
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert torch.equal(logits(model.unload(), ids), logits(make_base(arch), ids))


def test_shadow_learns_from_all_labels_wherever_the_head_runs(make_base, perturb, ids):
    model = wrapped(make_base(), perturb, ShadowConfig(task_type="CAUSAL_LM", r=4, auxiliary_loss_weight=0.7))
    labels = torch.where(torch.arange(9) > 3, ids, -100)
    out = model(input_ids=ids, labels=labels)
    few = model(input_ids=ids, labels=labels, logits_at_labels=True)
    torch.testing.assert_close(few.loss, out.loss)
    plain_loss = torch.nn.functional.cross_entropy(out.logits[:, 3:-1].flatten(0, 1), ids[:, 4:].flatten())
    torch.testing.assert_close(out.loss, plain_loss + 0.7 * out.shadow_loss)


def test_every_row_has_a_task_of_its_own(make_base, perturb, ids):
    config = PolyConfig(task_type="CAUSAL_LM", r=4, n_tasks=2, n_skills=2, target_modules=ATTENTION)
    model = wrapped(make_base(), perturb, config)
    tasks = torch.tensor([0, 1])
    both = logits(model, ids, task_ids=tasks)
    for row in (0, 1):
        alone = logits(model, ids[row : row + 1], task_ids=tasks[row : row + 1])
        torch.testing.assert_close(alone, both[row : row + 1], atol=1e-5, rtol=1e-5)


def test_trained_tokens_of_a_tied_head_are_the_heads_too(make_base, make_peft):
    base = make_base(tie_word_embeddings=True)
    base.tie_weights()
    with pytest.raises(UnsupportedModelError, match=r"lm_head.*trainable_token_indices"):
        get_imsm_model(base, TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[5, 9]))
    get_imsm_model(base, make_peft())


def test_a_tensor_that_layers_share_is_saved_once_and_missed_if_it_is_gone(make_base, perturb, ids, tmp_path):
    config = VBLoRAConfig(task_type="CAUSAL_LM", num_vectors=16, vector_length=8, target_modules=ATTENTION)
    model = wrapped(make_base(), perturb, config)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(IMSMModel.from_pretrained(tmp_path, make_base()), ids), logits(model, ids))
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({n: t for n, t in tensors.items() if "vector_bank" not in n}, file, metadata={"format": "pt"})
    with pytest.raises(DamagedFileError, match="vblora_vector_bank"):
        IMSMModel.from_pretrained(tmp_path, make_base())


def test_what_was_saved_without_its_encoder_is_not_trained_on(make_base, perturb, tmp_path):
    config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16)
    wrapped(make_base(), perturb, config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="P_TUNING"):
        IMSMModel.from_pretrained(tmp_path, make_base(), is_trainable=True)


def test_a_header_as_long_as_a_pickles_first_bytes_is_no_pickle(tmp_path):
    """The length of a safetensors header stands first: 640 is 80 02, and 80 02 is how pickles start."""
    file = tmp_path / "t.safetensors"
    for padding in range(800):
        save_file({"t": torch.ones(3)}, file, metadata={"filler": "x" * padding})
        if file.read_bytes()[:2] == b"\x80\x02":
            break
    assert torch.equal(read_safetensors(file)["t"], torch.ones(3))
    file.write_bytes(pickle.dumps({"{": torch.ones(3)}, protocol=2))
    with pytest.raises(DamagedFileError):
        read_safetensors(file)
