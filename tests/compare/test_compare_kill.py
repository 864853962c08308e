"""A killed comparison goes on where it was: finished cells are kept, and the results are those of a whole run."""

import json
import multiprocessing
import signal
import sys
from pathlib import Path

import pytest
import torch

import tiny_runs
from twinweave.compare import compare
from twinweave.training import load_recipe
from twinweave.training.trainer import TwinweaveTrainer

OVERRIDES = ["methods=[peft, peft_scaled, imsm]", "seeds=[0]", "sweeps.scale=[0.5]"]


def recipe_of(world):
    return load_recipe(tiny_runs.recipe_values(world), OVERRIDES)


def run_and_die(world: Path, moment: str) -> None:
    """In a process of its own: compare, and be gone in the second cell's training or scoring, or at the very end."""
    torch.set_num_threads(1)
    training_step = TwinweaveTrainer.training_step
    run_module = sys.modules["twinweave.compare.run"]

    def step_or_die(self, *args, **kwargs):
        if moment == "training" and "imsm-seed0" in str(self.run_folder) and self.state.global_step == 6:
            tiny_runs.die()
        return training_step(self, *args, **kwargs)

    TwinweaveTrainer.training_step = step_or_die
    if moment == "lens":
        run_module.read_lens = lambda *args: tiny_runs.die()
    if moment == "results":
        run_module.assemble = lambda *args: tiny_runs.die()
    compare(recipe_of(world))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    world = tiny_runs.make_world(tmp_path_factory.mktemp("whole"))
    return tiny_runs.without_times(json.loads(json.dumps(compare(recipe_of(world)))))


@pytest.fixture(scope="module")
def server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["twinweave.compare"])
    return context


@pytest.mark.parametrize("moment", ["training", "lens", "results"])
def test_a_killed_comparison_ends_with_the_results_of_a_whole_one(server, world, whole, moment):
    process = server.Process(target=tiny_runs.call, args=(str(Path(__file__)), list(sys.path), world, moment))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    done = {p: p.stat().st_mtime_ns for p in (world / "run").glob("cells/**/*") if p.is_file()}
    finished = {p: t for p, t in done.items() if "peft-seed0" in str(p) or moment != "training"}
    assert world / "run" / "cells" / "peft-seed0" / "cell.json" in finished
    assert (world / "run" / "cells" / "imsm-seed0" / "cell.json").exists() is (moment == "results")
    assert not (world / "run" / "results.json").exists()

    found = tiny_runs.without_times(json.loads(json.dumps(compare(recipe_of(world)))))
    assert {p: p.stat().st_mtime_ns for p in finished} == finished
    moved = [str(whole["base"]["name"]).removesuffix("/base"), str(world)]  # each has its own folder
    assert json.loads(json.dumps(whole).replace(*moved)) == found
    assert not list((world / "run").rglob("checkpoint-*"))
