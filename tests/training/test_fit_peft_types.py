"""Recipes with adapters of other kinds than LoRA: store, guard, files, and going on from where a run was stopped."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny_runs
from twinweave.errors import RecipeError, TwinweaveError, UnsupportedModelError
from twinweave.imsm import IMSMModel
from twinweave.methods import get_method
from twinweave.training import fit, load_base, load_recipe, load_tokenizer, load_training_data
from twinweave.training.trainer import TwinweaveTrainer

TARGETS = {"target_modules": ["q_proj", "v_proj"]}
KINDS = {
    "prompt": {"type": "prompt_tuning", "num_virtual_tokens": 3},
    "p_tuning": {"type": "p_tuning", "num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "prefix": {"type": "prefix_tuning", "num_virtual_tokens": 3},
    "adaption": {"type": "adaption_prompt", "adapter_len": 3, "adapter_layers": 2, "target_modules": "self_attn"},
    "shadow": {"type": "shadow", "r": 4},
    "pissa": {"type": "lora", "r": 4, "init_lora_weights": "pissa", **TARGETS},
}


def run(world, folder, kind, method="imsm", **training):
    values = tiny_runs.recipe_values(world)
    recipe = load_recipe(values | {"peft": KINDS[kind], "training": values["training"] | training, "guard": {}})
    tokenizer = load_tokenizer(recipe.base)
    return fit(recipe, get_method(method), 0, load_training_data(recipe, tokenizer, 0), tokenizer, Path(world) / folder)


def files_of(folder):
    return {p.name: load_file(p) for p in folder.glob("*.safetensors")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_ends_the_same_and_a_store_changes_little(kind, world, monkeypatch):
    whole = run(world, "whole", kind, frozen_store="off")
    steps, own_step = [], TwinweaveTrainer.training_step

    def step_or_stop(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 7:
            raise KeyboardInterrupt
        return own_step(self, *args, **kwargs)

    monkeypatch.setattr(TwinweaveTrainer, "training_step", step_or_stop)
    with pytest.raises((KeyboardInterrupt, TwinweaveError)):
        run(world, "stopped", kind, frozen_store="off")
    assert run(world, "stopped", kind, frozen_store="off").curve == whole.curve
    for name in ("best", "last"):
        expected, found = files_of(world / "whole" / name), files_of(world / "stopped" / name)
        assert found.keys() == expected.keys()
        for file, tensors in expected.items():
            assert all(torch.equal(tensor, found[file][key]) for key, tensor in tensors.items()), file

    stored = run(world, "stored", kind, frozen_store="on")
    assert stored.curve.keys() == whole.curve.keys()
    for name, points in whole.curve.items():
        assert torch.tensor(stored.curve[name]).allclose(torch.tensor(points), atol=5e-3), name
    model = IMSMModel.from_pretrained(
        world / "whole" / "best", load_base(load_recipe(tiny_runs.recipe_values(world)).base)
    )
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[2, 5, 6, 7]])).logits.shape[:2] == (1, 4)


@pytest.mark.parametrize("kind", ["prompt", "pissa"])
def test_plain_peft_refuses_what_would_not_be_fair(kind, world):
    with pytest.raises((UnsupportedModelError, RecipeError)):
        run(world, "plain", kind, method="peft")
