"""The page of the forgetting study is made of the kept results, and they of runs."""

import json

import tiny_runs
from benchmarks import study
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
