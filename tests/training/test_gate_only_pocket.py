"""A LoRA from disk gets a gate that rehearses: the pocket world forgets less, and says the target as well."""

from pathlib import Path

import pytest
import yaml

from twinweave.compare import compare, train
from twinweave.training import load_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "pocket" / "gate-only.yaml"
NEAR = ("letters", "copy", "pick")


@pytest.mark.slow
def test_training_the_gate_alone_brings_back_what_a_lora_forgot(tmp_path):
    values = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    values["retained"] = [task | {"limit": 50} for task in values["retained"] if task["name"] in NEAR]
    values |= {"methods": ["peft", "imsm"], "evaluation": {"batch_size": 50, "lens_prompts": 0}, "sweeps": {}}
    lora = {"type": "lora", "r": 16, "lora_alpha": 16, "target_modules": "all-linear"}
    settings = values["training"] | {"learning_rate": 2e-3}  # those of the page's table: fewer sequences are too few
    first = {
        "method": "peft",
        "methods": ["peft"],
        "peft": lora,
        "training": settings,
        "output": str(tmp_path / "lora"),
    }
    train(load_recipe(values | first))
    gate = {"peft": {"path": str(tmp_path / "lora" / "best"), "train": False}, "output": str(tmp_path / "gate")}
    before, after = compare(load_recipe(values | gate))["runs"]
    assert (before["method"], after["method"]) == ("peft", "imsm")
    assert after["trainable_parameters"] == 5 * 128 * 8
    assert before["forgetting"] > 0.1
    assert after["forgetting"] < before["forgetting"] / 2
    assert after["target_score"] > before["target_score"] - 0.05
