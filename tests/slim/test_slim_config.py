"""The settings of SLIM: what is refused, and that the neighbouring methods are settings of it."""

import json
import math

import pytest
import torch
from peft import PeftConfig
from peft.utils import PeftType

from twinweave.errors import UsageError
from twinweave.slim import SlimConfig, get_slim_model

BAD = [
    ("r", 0), ("r", 2.0), ("r", True), ("num_experts", 0), ("num_experts", "8"), ("num_identity_experts", -1),
    ("num_identity_experts", None), ("top_k", 0), ("top_k", 11), ("top_k", 1.5), ("top_k", None),
    ("yielding_strength", -0.5), ("yielding_strength", math.nan), ("yielding_strength", "1"),
    ("distance", "mean"), ("distance", None), ("distance", ["rms"]), ("num_clusters", 0), ("num_clusters", 2.5),
    ("cluster_rate", 0), ("cluster_rate", 1.01), ("cluster_rate", math.nan), ("cluster_rate", None),
    ("cluster_metric", "cosine"), ("masking_ratio", 1), ("masking_ratio", -0.1), ("masking_ratio", "half"),
    ("masking_ratio", math.nan), ("merging_at_inference", "no"), ("rescale_merging", None), ("mask_seed", -1),
    ("mask_seed", 0.5), ("l1_weight", -1e-3), ("l1_weight", math.inf), ("l1_weight", None),
    ("router_sharing", "block"), ("router_init_std", -1), ("router_init_std", math.nan),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_our_error_with_name_value_and_fix(name, value):
    with pytest.raises(UsageError) as raised:
        SlimConfig(**{name: value})
    message = str(raised.value)
    assert name in message
    assert str(value) in message
    assert any(fix in message for fix in ("must", "Known:", "Did you mean"))


def test_a_near_name_is_suggested():
    with pytest.raises(UsageError, match=r"'maxx'.*'max'"):
        SlimConfig(distance="maxx")


def test_the_defaults_are_the_papers():
    config = SlimConfig()
    assert (config.num_experts, config.num_identity_experts, config.top_k, config.r) == (8, 2, 2, 16)
    assert (config.num_clusters, config.cluster_rate, config.yielding_strength) == (8, 0.01, 1.0)
    assert (config.masking_ratio, config.l1_weight, config.router_init_std) == (0.5, 1e-2, 0.02)
    assert config.experts == 10
    assert config.yields


@pytest.mark.parametrize(
    "settings",
    [
        {"num_identity_experts": 0, "masking_ratio": 0, "l1_weight": 0},  # a plain mixture
        {"num_identity_experts": 0, "top_k": 8, "masking_ratio": 0},  # LoRAMoE: a soft mixture of all
        {"num_experts": 1, "num_identity_experts": 0, "top_k": 1},  # one LoRA
        {"num_experts": 1, "num_identity_experts": 1, "top_k": 1},
        {"yielding_strength": 0},
    ],
)
def test_other_mixtures_are_settings(settings, make_base, tokens, perturb):
    torch.manual_seed(0)
    model = get_slim_model(make_base(), SlimConfig(r=2, **settings))
    perturb(model)
    model.train()
    model(input_ids=tokens(2, 7), labels=tokens(2, 7)).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    assert any("slim_clusters" in name for name in model.state_dict()) is model.peft_config["default"].yields
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=tokens(2, 7)).logits
    assert not torch.allclose(model.eval()(input_ids=tokens(2, 7)).logits, base)


def test_it_is_written_and_read_as_any_config_of_peft(tmp_path):
    config = SlimConfig(r=3, target_modules=["up_proj", "down_proj"], distance="max")
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "SLIM"
    found = PeftConfig.from_pretrained(tmp_path)
    assert type(found) is SlimConfig
    found.target_modules = set(found.target_modules)
    assert found == config


def test_peft_has_not_taken_the_name():
    """Once it has, `register` would replace a method of its own."""
    assert "SLIM" not in PeftType.__members__
