"""Recipes that go on from an adapter on disk: what learns, what is left as it is, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_runs
from twinweave.compare import check_recipe, compare, train
from twinweave.errors import DamagedFileError, RecipeError, UnsupportedModelError
from twinweave.training import load_recipe

REHEARSAL = {"sequences": 24, "length": 16, "batch_size": 3, "positions": 6}


@pytest.fixture
def adapter(world):
    """What a plain PEFT run leaves."""
    train(load_recipe(tiny_runs.recipe_values(world, method="peft", output=str(world / "plain"))))
    return world / "plain" / "best"


def recipe_of(world, adapter, *overrides, **changes):
    values = tiny_runs.recipe_values(world, methods=["peft", "imsm_published", "imsm"], seeds=[0])
    values |= {"peft": {"path": str(adapter)}, "rehearsal": REHEARSAL, "sweeps": {}} | changes
    return load_recipe(values, overrides)


def weights_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_gate_alone_is_trained(world, adapter):
    results = compare(recipe_of(world, adapter, "peft.train=false", "training.evaluate_every=5"))
    runs = {run["method"]: run for run in results["runs"]}
    cells, given = world / "run" / "cells", weights_of(adapter)
    assert runs["peft"]["trainable_parameters"] == 0
    assert {run["peft"] for run in runs.values()} == {"lora"}
    gate = 5 * 32 * 2
    assert runs["imsm"]["trainable_parameters"] == runs["imsm_published"]["trainable_parameters"] == gate
    for name in runs:
        for kept in ("best", "last"):
            assert equal(weights_of(cells / f"{name}-seed0" / kept), given)
    gates = [
        load_file(cells / f"{name}-seed0" / "last" / "imsm_gate.safetensors") for name in ("imsm", "imsm_published")
    ]
    assert not torch.equal(gates[0]["w_b"], gates[1]["w_b"])
    assert all(gate["w_b"].abs().max() > 0 for gate in gates)
    losses = [loss for _, loss in runs["imsm_published"]["curve"]["train"]]
    assert losses[-1] < losses[0]


def test_adapter_and_gate_go_on_together(world, adapter):
    results = compare(recipe_of(world, adapter, "methods=[peft,imsm]"))
    cells, given = world / "run" / "cells", weights_of(adapter)
    for run in results["runs"]:
        learned = weights_of(cells / f"{run['method']}-seed0" / "last")
        assert learned.keys() == given.keys()
        assert not equal(learned, given)


def test_an_adalora_adapter_keeps_its_ranks(world):
    peft = {"type": "adalora", "init_r": 6, "target_r": 3, "target_modules": ["q_proj"]}
    train(load_recipe(tiny_runs.recipe_values(world, peft=peft, method="peft", output=str(world / "plain"))))
    adapter = world / "plain" / "last"
    with pytest.raises(RecipeError, match="settled"):
        check_recipe(recipe_of(world, adapter))
    compare(recipe_of(world, adapter, "peft.train=false", "methods=[imsm]"))
    assert equal(weights_of(world / "run" / "cells" / "imsm-seed0" / "last"), weights_of(adapter))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["peft.r=4"], r"peft\.r: beside peft\.path"),
        (["peft.train=maybe"], "train='maybe'"),
        (["peft.train=false", "methods=[peft_rehearsal]"], "peft_rehearsal trains the adapter"),
        (["methods=[peft_oft]"], "peft_oft has an adapter of its own"),
    ],
)
def test_recipes_that_contradict_themselves(world, overrides, message):
    with pytest.raises(RecipeError, match=message):
        recipe_of(world, world / "nowhere", *overrides)


def test_checked_before_anything_is_trained(world, adapter):
    with pytest.raises(DamagedFileError, match="no folder"):
        check_recipe(recipe_of(world, world / "nowhere"))
    found = dict(check_recipe(recipe_of(world, adapter, "peft.train=false")))
    assert found["method imsm"].startswith("320 ")
    assert found["method peft"].startswith("0 ")
    weights = adapter / "adapter_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(DamagedFileError, match="pickle"):
        check_recipe(recipe_of(world, adapter))
    with pytest.raises(DamagedFileError, match="pickle"):
        compare(recipe_of(world, adapter))
    assert not (world / "run").exists()


def test_what_leaves_nothing_to_train_is_said_before_a_run(world, adapter):
    with pytest.raises(RecipeError, match="imsm_average has no gate"):
        recipe_of(world, adapter, "peft.train=false", "methods=[imsm_average]")


def test_another_adapter_in_the_folder_is_another_run(world, adapter):
    compare(recipe_of(world, adapter, "peft.train=false", "methods=[peft]"))
    weights = {name: tensor + 1 for name, tensor in weights_of(adapter).items()}
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match="another run: adapter"):
        compare(recipe_of(world, adapter, "peft.train=false", "methods=[peft, imsm]"))


def test_a_start_that_moved_the_base_is_refused_by_every_method(world, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    for method in ("peft", "imsm"):
        with pytest.raises(UnsupportedModelError, match="path_initial_model"):
            compare(recipe_of(world, adapter, f"methods=[{method}]"))


def test_a_method_added_to_a_begun_run_is_checked_too(world, adapter, monkeypatch):
    compare(recipe_of(world, adapter, "methods=[peft]"))
    monkeypatch.setattr("twinweave.compare.check._is_quantised", lambda model: True)
    with pytest.raises(RecipeError, match="peft_l2"):
        compare(recipe_of(world, adapter, "methods=[peft, peft_l2]"))
