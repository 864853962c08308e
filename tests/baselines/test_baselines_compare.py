"""All baselines in one tiny comparison; cells of sweeps that are finished are kept, and a killed one goes on."""

import json
import multiprocessing
import signal
import sys
from pathlib import Path

import pytest
import torch

import tiny_runs
from twinweave.compare import compare
from twinweave.compare.check import check_recipe
from twinweave.errors import RecipeError
from twinweave.methods import METHODS, knobs, load_plain
from twinweave.training import load_base, load_recipe
from twinweave.training.trainer import TwinweaveTrainer

BASELINES = [name for name, method in METHODS.items() if name.startswith("peft") and method.build]
REHEARSAL = {"sequences": 20, "length": 16, "batch_size": 2}
KILLED = "peft_corda-corda_rate=0.5-seed0"
KILL_OVERRIDES = ["methods=[peft, peft_lwf, peft_corda]", "sweeps={lwf_weight: [0.5, 2], corda_rate: [0.5]}"]


def recipe_of(world, *overrides):
    return load_recipe(tiny_runs.recipe_values(world, rehearsal=REHEARSAL, seeds=[0]), overrides)


def run_and_die(world: Path) -> None:
    """In a process of its own: compare, and be gone after the first checkpoint of the last cell."""
    torch.set_num_threads(1)
    training_step = TwinweaveTrainer.training_step

    def step_or_die(self, *args, **kwargs):
        if KILLED in str(self.run_folder) and self.state.global_step == 6:
            tiny_runs.die()
        return training_step(self, *args, **kwargs)

    TwinweaveTrainer.training_step = step_or_die
    compare(recipe_of(world, *KILL_OVERRIDES))


def times(world):
    return {p: p.stat().st_mtime_ns for p in (world / "run" / "cells").rglob("*") if p.is_file()}


def test_every_baseline_is_compared_and_finished_cells_are_kept(world):
    few = [f"{name}: [{knob.values[0]}]" for name, knob in knobs().items()]
    recipe = recipe_of(world, f"methods=[{', '.join(BASELINES)}]", f"sweeps={{{', '.join(few)}}}")
    results = compare(recipe)
    assert [run["method"] for run in results["runs"]] == BASELINES
    by_method = {run["method"]: run for run in results["runs"]}
    assert all(run["trainable_parameters"] > 0 and run["curve"]["train"] for run in results["runs"])
    scores = [run["target_score"] for name, run in by_method.items()]
    assert len(set(scores)) == len(scores)  # each did something of its own
    assert {line["label"] for line in results["summary"]} >= {
        "LoRA + KL to the base (LwF)", "LoRA + L2-SP", "LoRA + EWC", "OSF", "OFT", "CorDA (knowledge-preserved)",
    }  # fmt: skip
    for folder in (world / "run" / "cells").iterdir():
        load_plain(str(folder / "best"), load_base(recipe.base))
    kept = times(world)
    more = {"sweeps": recipe.sweeps | {"l2_weight": [recipe.sweeps["l2_weight"][0], 7.0]}}
    again = compare(recipe.model_copy(update=more))
    assert len(again["runs"]) == len(results["runs"]) + 1
    assert {path: when for path, when in times(world).items() if path in kept} == kept


def test_a_killed_sweep_goes_on_to_the_results_of_a_whole_one(world, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["twinweave.compare"])
    process = context.Process(target=tiny_runs.call, args=(str(Path(__file__)), list(sys.path), world))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    finished = times(world)
    cells = sorted(p.parent.name for p in finished if p.name == "cell.json")
    assert cells == ["peft-seed0", "peft_lwf-lwf_weight=0.5-seed0", "peft_lwf-lwf_weight=2.0-seed0"]
    assert list((world / "run" / "cells" / KILLED).glob("checkpoint-*/trained.safetensors"))

    found = tiny_runs.without_times(compare(recipe_of(world, *KILL_OVERRIDES)))
    assert {p: t for p, t in times(world).items() if p.parent.parent.name != KILLED and p in finished}.items() <= (
        finished.items()
    )
    other = recipe_of(world, *KILL_OVERRIDES, f"output={tmp_path / 'whole'}")
    whole = tiny_runs.without_times(compare(other))
    assert json.dumps(whole["runs"]) == json.dumps(found["runs"])


@pytest.mark.parametrize("method", [name for name in BASELINES if METHODS[name].rehearses == "always"])
def test_general_text_is_missed_before_anything_is_trained(world, method):
    recipe = recipe_of(world, f"methods=[{method}]", "rehearsal=off")
    with pytest.raises(RecipeError, match=f"{method} needs general text"):
        check_recipe(recipe)
    with pytest.raises(RecipeError, match=f"{method} needs general text"):
        compare(recipe)
    assert not (world / "run").exists()
