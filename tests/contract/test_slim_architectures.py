"""SLIM on other architectures than Llama's: where it goes, a slice of the contract, and mixtures of experts.

`make contract` has all architectures and every check.
"""

import re

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from contract import architectures, checks
from twinweave import SlimConfig, get_slim_model
from twinweave.blocks import feed_forward_layers, is_mixture
from twinweave.errors import UnsupportedModelError
from twinweave.slim.layer import SlimLayer

GATED = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
SHARED = {"mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj", "mlp.shared_experts.down_proj"}
EXPECTED = {
    "qwen3": GATED,
    "seed_oss": GATED,  # whose classes' names have "ssm" in them
    "gemma3n_text": GATED,  # and no LAuReL, AltUp or per-layer embeddings
    "axk2": GATED | SHARED,  # and no norms with gates of low rank
    "deepseek_v3": GATED | SHARED,
    "glm": {"mlp.gate_up_proj", "mlp.down_proj"},
    "gpt2": {"mlp.c_fc", "mlp.c_proj"},
    "bert": {"intermediate.dense", "output.dense"},
    "bart": {"fc1", "fc2"},
    "xlm": {"lin1", "lin2"},  # attentions in a list of their own
    "xmod": {"intermediate.dense", "output.dense"},  # and no language's adapter
    "xlstm": {"ffn.proj_up_gate", "ffn.proj_up", "ffn.proj_down"},
    "ctrl": {"ffn.0", "ffn.2"},
    "modernbert-decoder": {"mlp.Wi", "mlp.Wo"},
    "git": {"intermediate.dense", "output.dense"},  # and not the vision tower
    "lfm2": {"feed_forward.w1", "feed_forward.w2", "feed_forward.w3"},
    "nemotron_h": {f"mixer.{name}" for name in ("up_proj", "down_proj", "shared_experts.up_proj")}
    | {"mixer.shared_experts.down_proj"},
    "qwen3_next": {f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")},
    "qwen4_exp_text": {f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")},
    "zamba2": {"shared_transformer.feed_forward.gate_up_proj", "shared_transformer.feed_forward.down_proj"},
    "mixtral": {"mlp"},
    "zaya": {"mlp"},
    "granitemoe": {"block_sparse_moe"},
    "jamba": {f"feed_forward.{name}_proj" for name in ("gate", "up", "down")} | {"feed_forward"},
}
KINDS = {
    "dense, transposed weights": "gpt2",
    "hybrid, shared experts": "qwen3_next",
    "decoder of an encoder-decoder": "bart",
    "shared block": "zamba2",
    "mixture of experts": "mixtral",
    "mixture of experts that gives a tuple": "gpt_oss",
}
CHECKED = (
    "base runs",
    "memories differ",
    "step 0 is the base",
    "original after training",
    "enhanced is plain PEFT",
    "causal",
    "cached greedy",
    "gradient",
    "at labels",
    "rehearsal",
    "checkpointing",
    "saved for PEFT",
    "bf16",
)


@pytest.mark.parametrize("name", EXPECTED)
def test_feed_forwards_are_found(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architectures.tiny_config(name))
    found = feed_forward_layers(model)
    assert len(found) == len(set(found))
    assert {re.sub(r"^.*?\.\d+\.", "", layer) for layer in found} == EXPECTED[name]


@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
def test_a_slice_of_the_contract_with_slim(name):
    subject = architectures.slim_subject(name)
    assert checks.refusal(subject) is None
    results = {check: checks.run_check(check, subject) for check in CHECKED}
    assert all(result.status == "pass" for result in results.values()), results


def test_a_model_without_feed_forward_is_refused_and_stays_as_it_is():
    base = architectures.tiny_model("mamba2")
    with pytest.raises(UnsupportedModelError, match=r"no feed-forward.*target_modules.*in_proj, lm_head, out_proj"):
        get_slim_model(base)
    assert not any(isinstance(module, SlimLayer) for module in base.modules())


def test_what_is_neither_linear_nor_a_mixture_is_refused():
    with pytest.raises(UnsupportedModelError, match="GPT2Attention is neither"):
        get_slim_model(architectures.tiny_model("gpt2"), SlimConfig(target_modules=["attn"]))


def test_what_slim_breaks_in_plain_peft_is_not_excused(monkeypatch):
    def base_runs(subject):
        raise checks.NotApplicable("upstream: plain PEFT: the loss is not finite")

    monkeypatch.setitem(checks.CHECKS, "base runs", base_runs)
    assert checks.run_check("base runs", architectures.subject("qwen3")).status == "n/a"
    assert checks.run_check("base runs", architectures.slim_subject("qwen3")).status == "fail"


def test_a_base_that_gives_no_gradient_is_not_checked_with_slim_either():
    """Reformer; the gradient of SLIM's own term does not come through the base."""
    found = checks.run_check("base runs", architectures.slim_subject("reformer"))
    assert found.status == "n/a"
    assert found.note.startswith("upstream: plain LoRA: ")


@pytest.mark.parametrize("layers", [[1], 1])
def test_some_blocks_alone(layers):
    model = get_slim_model(architectures.tiny_model("gpt2"), SlimConfig(layers_to_transform=layers))
    adapted = [name for name, module in model.named_modules() if isinstance(module, SlimLayer)]
    assert [name.rsplit(".h.", 1)[1] for name in adapted] == ["1.mlp.c_fc", "1.mlp.c_proj"]


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "zaya", "dbrx"])
def test_a_mixture_is_adapted_as_a_whole(name):
    model = get_slim_model(architectures.tiny_model(name), SlimConfig(r=4, masking_ratio=0.0)).eval()
    layer = next(module for module in model.modules() if isinstance(module, SlimLayer))
    assert is_mixture(layer)
    layer.slim_B["default"].normal_()
    x = torch.randn(2, 5, architectures.HIDDEN)
    expected, found = layer.base_layer(x), layer(x)
    if name in ("gpt_oss", "zaya"):
        for other, same in zip(found[1:], expected[1:], strict=True):
            assert other is same is None or torch.equal(other, same)
        expected, found = expected[0], found[0]
    shares = layer.routings["default"](x.flatten(0, 1)).view(2, 5, -1)
    hidden = torch.einsum("btc,erc->bter", x, layer.slim_A["default"]) * shares[..., None]
    added = torch.einsum("bter,erd->btd", hidden, layer.slim_B["default"])
    assert added.abs().max() > 0.1
    torch.testing.assert_close(found, expected + added)


class Mixture(nn.Module):
    """Experts that are modules, of which each gets the tokens that are routed to it."""

    def __init__(self, experts):
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.gate = nn.Linear(architectures.HIDDEN, len(experts), bias=False)
        self.idle = len(experts) - 1

    def forward(self, hidden_states):
        flat = hidden_states.flatten(0, 1)
        chosen = self.gate(flat)[:, : self.idle].argmax(-1)  # the last expert gets no token
        output = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            output = output.index_add(0, (rows := (chosen == i).nonzero()[:, 0]), expert(flat[rows]))
        return output.view_as(hidden_states)


def mixed():
    """A Qwen3 whose feed-forwards are such mixtures."""
    model = architectures.tiny_model("qwen3")
    others = [architectures.tiny_model("qwen3", initializer_range=0.1 * i) for i in (1, 2, 3)]
    torch.manual_seed(0)
    for i, block in enumerate(model.model.layers):
        block.mlp = Mixture([other.model.layers[i].mlp for other in others])
    return model.requires_grad_(False)


def test_experts_that_are_linear_layers_train_and_load(tmp_path):
    model = get_slim_model(mixed(), SlimConfig(r=4, num_clusters=2, l1_weight=0.0))
    assert sum(isinstance(module, SlimLayer) for module in model.modules()) == 2 * 3 * 3
    ids = torch.randint(10, 90, (4, 16), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(16) < 12).long().expand(4, 16), "labels": ids}
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        losses.append(model(**inputs).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    moved = {name for name, tensor in model.named_parameters() if "slim_B" in name and tensor.any()}
    assert moved
    assert all("experts.2." not in name for name in moved)
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(mixed(), tmp_path).eval()
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)
