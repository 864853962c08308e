"""A recipe that loads its base in 8 or 4 bits. The runs are skipped where bitsandbytes is absent."""

import importlib.util
import json

import pytest
import torch

import tiny_runs
from twinweave.compare import check_recipe, compare
from twinweave.errors import RecipeError, UnsupportedModelError
from twinweave.training import load_base, load_recipe

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def recipe(world, quantization, methods=("peft", "imsm"), **changes):
    base = {"name": str(world / "base"), "quantization": quantization} | changes
    values = tiny_runs.recipe_values(world, seeds=[0], methods=list(methods)) | {"base": base}
    values["training"] |= {"epochs": 1}
    return load_recipe(values)


@needs_bitsandbytes
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_comparison(world, quantization):
    checked = recipe(world, quantization)
    base = load_base(checked.base)
    assert base.model.layers[0].self_attn.q_proj.weight.dtype == {"8bit": torch.int8, "4bit": torch.uint8}[quantization]
    assert base.lm_head.weight.dtype == torch.float32
    assert f"{quantization} in float32" in dict(check_recipe(checked))["base"]
    results = compare(checked)
    assert {run["method"] for run in results["runs"]} == {"peft", "imsm"}
    assert all(run["target"]["reverse"]["loss"] < results["base"]["target_score"] for run in results["runs"])
    assert compare(checked) == results | {"provenance": compare(checked)["provenance"]}


@needs_bitsandbytes
@pytest.mark.parametrize("method", ["peft_osf", "peft_l2"])
def test_methods_that_compute_with_the_weights_are_refused_before_anything_is_trained(world, method):
    with pytest.raises(RecipeError, match=f"{method} computes with the base's weights"):
        compare(recipe(world, "4bit", methods=("peft", method)))
    assert not (world / "run").exists()


@needs_bitsandbytes
def test_what_it_computes_in(world):
    base = load_base(recipe(world, "4bit", dtype="bfloat16").base)
    assert base.lm_head.weight.dtype == torch.bfloat16
    assert base(torch.tensor([[4, 5]])).logits.dtype == torch.bfloat16


def test_without_bitsandbytes(world, monkeypatch):
    monkeypatch.setattr("twinweave.training.recipe.is_bitsandbytes_available", lambda: False)
    with pytest.raises(RecipeError, match=r"4bit needs bitsandbytes .*pip install 'twinweave\[quantization\]'"):
        recipe(world, "4bit")
    with pytest.raises(RecipeError, match=r"'base.quantization' is '3bit'"):
        recipe(world, "3bit")


def test_a_base_that_was_saved_quantised(world, monkeypatch):
    config = json.loads((world / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True}
    (world / "base" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda: False)
    with pytest.raises(UnsupportedModelError, match=r"needs a package that is missing here: .*bitsandbytes"):
        load_base(recipe(world, None).base)


def test_runs_from_before_there_was_the_key_go_on(world):
    values = tiny_runs.recipe_values(world, seeds=[0], methods=["peft"])
    values["training"] |= {"epochs": 1}
    compare(load_recipe(values))
    file = world / "run" / "recipe.json"
    identity = json.loads(file.read_text())
    del identity["base"]["quantization"]
    file.write_text(json.dumps(identity))
    compare(load_recipe(values))
    identity["base"]["quantization"] = "8bit"
    file.write_text(json.dumps(identity))
    with pytest.raises(RecipeError, match="base differ"):
        compare(load_recipe(values))
