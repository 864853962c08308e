"""The page of the forgetting study is made of the kept results, and they of runs."""

import json

import tiny_runs
from benchmarks import gate_positions, study
from twinweave.compare import compare
from twinweave.training import load_recipe


def test_the_page_in_the_repository_is_that_of_the_kept_results():
    assert study.PAGE.read_text(encoding="utf-8") == study.render()


def test_a_run_is_taken_in(world, tmp_path):
    recipe = load_recipe(tiny_runs.recipe_values(world, methods=["peft", "imsm"], name="forgetting-tiny"))
    results = compare(recipe)
    study.main([str(recipe.output_dir), "--kept", str(tmp_path), "--out", str(tmp_path / "page.md")])
    kept = json.loads((tmp_path / "tiny.json").read_text(encoding="utf-8"))
    assert all("curve" not in run for run in kept["runs"])
    assert kept["frontier"] == json.loads(json.dumps(results["frontier"]))
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert page.startswith("# What is forgotten")
    assert "## tiny" in page
    for label in ("LoRA", "IMSM"):
        assert f"| {label} |" in page


def test_the_gate_is_shown_place_by_place(world, capsys):
    changes = {"methods": ["imsm"], "seeds": [0]}
    recipe = load_recipe(tiny_runs.recipe_values(world, **changes))
    compare(recipe)
    model = recipe.output_dir / "cells" / "imsm-seed0" / "best"
    gate_positions.main([str(model), str(recipe.output_dir / "recipe.json"), "--prompts", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| reverse", "| text"]
    shares = [float(cell.split(" ± ")[0]) for line in lines[2:] for cell in line.split(" | ") if "±" in cell]
    assert shares
    assert all(0 < share < 1 for share in shares)
