"""The domain guard of a recipe: fitted behind the training, in both saved models, of no influence on the training."""

import json

import pytest
import torch
from safetensors.torch import load_file

import tiny_runs
from twinweave.compare import compare
from twinweave.errors import RecipeError
from twinweave.imsm import GuardSettings, IMSMModel
from twinweave.methods import get_method
from twinweave.training import fit, load_base, load_recipe, load_tokenizer, load_training_data

ON = ["rehearsal=off", "guard={directions: 8, affected: 0.2, strength: 2}"]


def run(world, method, folder, overrides):
    recipe = load_recipe(tiny_runs.recipe_values(world), overrides)
    tokenizer = load_tokenizer(recipe.base)
    data = load_training_data(recipe, tokenizer, 0)
    return fit(recipe, get_method(method), 0, data, tokenizer, world / folder)


def files_of(folder):
    return {p.name: load_file(p) for p in folder.glob("*.safetensors")}


def test_both_saved_models_have_the_guard_and_training_is_what_it_was(world):
    plain = run(world, "imsm", "plain", ["rehearsal=off"])
    guarded = run(world, "imsm", "guarded", ON)
    assert guarded.curve == plain.curve
    base = load_base(load_recipe(tiny_runs.recipe_values(world)).base)
    for name in ("best", "last"):
        without, found = files_of(world / "plain" / name), files_of(world / "guarded" / name)
        guard = found.pop("imsm_guard.safetensors")
        assert found.keys() == without.keys()
        for file, tensors in found.items():
            assert all(torch.equal(tensor, without[file][key]) for key, tensor in tensors.items())
        assert guard["map"].shape == (32, 8)
        settings = json.loads((world / "guarded" / name / "imsm_config.json").read_text())
        assert settings.pop("guard") == GuardSettings(directions=8, affected=0.2, strength=2).model_dump()
        assert settings == json.loads((world / "plain" / name / "imsm_config.json").read_text())
    model = IMSMModel.from_pretrained(world / "guarded" / "best", base)
    for name, tensor in guard.items():  # the last model's
        assert torch.equal(model.guard.state_dict()[name], tensor)
    assert not list((world / "guarded").rglob(".*tmp*"))


@pytest.mark.parametrize("method", ["imsm_published", "imsm_gate", "peft"])
def test_methods_as_published_have_none(world, method):
    run(world, method, "run", ON)
    assert not list((world / "run").rglob("imsm_guard*"))


def test_the_section_is_off_or_on(world):
    values = tiny_runs.recipe_values(world)
    assert load_recipe(values).guard is None
    for text, expected in (("off", None), ("null", None), ("on", GuardSettings()), ("{}", GuardSettings())):
        assert load_recipe(values, [f"guard={text}"]).guard == expected
    assert load_recipe(values, ["guard.clusters=7"]).guard == GuardSettings(clusters=7)
    with pytest.raises(RecipeError, match=r"Did you mean 'guard\.clusters'"):
        load_recipe(values, ["guard.cluster=7"])
    for bad in ("guard.affected=0", "guard.affected=1", "guard.strength=-1", "guard.per=row", "guard.strength=.inf"):
        with pytest.raises(RecipeError, match=bad.split("=")[0].replace(".", r"\.")):
            load_recipe(values, [bad])
    with pytest.raises(RecipeError, match="guard=on"):
        load_recipe(values, ["methods=[imsm, imsm_guard]"])


def test_the_dial_shows_what_the_guard_does(world):
    overrides = [*ON, "methods=[imsm, imsm_guard, imsm_published]", "seeds=[0]", "sweeps.guard=[0, 2]"]
    results = compare(load_recipe(tiny_runs.recipe_values(world), overrides))

    def scores(method, **setting):
        (found,) = [r for r in results["runs"] if r["method"] == method and r["setting"] == setting]
        return found["target"], found["retained"]

    assert scores("imsm_guard", guard=2.0) == scores("imsm")
    assert scores("imsm_guard", guard=0.0) == scores("imsm_published")
    assert scores("imsm_guard", guard=0.0) != scores("imsm_guard", guard=2.0)
