"""Killed at any moment, the same command goes on and ends with the same numbers, to the last bit.

The killed part runs in a process of its own, forked from a server that has imported everything once.
"""

import functools
import json
import multiprocessing
import shutil
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny_runs
from twinweave.errors import DamagedFileError, TrainingError
from twinweave.methods import get_method
from twinweave.training import checkpoints, fit, load_recipe, load_tokenizer, load_training_data
from twinweave.training.trainer import TwinweaveTrainer

ADALORA = {"type": "adalora", "init_r": 6, "target_r": 2, "lora_dropout": 0.2, "target_modules": ["q_proj", "v_proj"]}
CASES = {
    "peft": ("peft", {}),
    "imsm": ("imsm", {}),
    "adalora": ("imsm", {"peft": ADALORA}),
    "best is old": ("peft", {}),
    "accumulating": ("imsm", {"training": {"batch_size": 2, "gradient_accumulation": 2, "evaluate_every": 4}}),
}


def run(world, case, folder="run"):
    method, changes = CASES[case]
    values = tiny_runs.recipe_values(world)
    if case == "best is old":  # the better the training rows are known, the worse these
        rows = [{"prompt": f"reverse {' '.join(tiny_runs.letters(i))} :", "completion": "yes no yes"} for i in range(5)]
        values["train"]["validation"] = str(tiny_runs.write_rows(Path(world) / "contrary.jsonl", rows))
    settings = values["training"] | {"epochs": 4, "log_every": 3} | changes.get("training", {})
    recipe = load_recipe(values | changes | {"training": settings})
    tokenizer = load_tokenizer(recipe.base)
    return fit(recipe, get_method(method), 0, load_training_data(recipe, tokenizer, 0), tokenizer, Path(world) / folder)


def run_and_die(world: Path, case: str, moment: str) -> None:
    """In a process of its own: train, and be gone at the `moment`."""
    torch.set_num_threads(1)
    publish, training_step = checkpoints.publish, TwinweaveTrainer.training_step
    published = []

    def publish_or_die(*args, **kwargs):
        if moment == "while writing the second checkpoint" and published:
            tiny_runs.die()
        published.append(publish(*args, **kwargs))
        return published[-1]

    def step_or_die(self, *args, **kwargs):
        if moment == "in the middle of an epoch" and self.state.global_step == 10:
            tiny_runs.die()
        if moment == "slowly":  # somebody else kills us
            time.sleep(0.05)
        return training_step(self, *args, **kwargs)

    checkpoints.publish, TwinweaveTrainer.training_step = publish_or_die, step_or_die
    if moment == "before anything is said to be finished":
        sys.modules["twinweave.training.fit"].write_json_atomic = lambda *args, **kwargs: tiny_runs.die()
    run(world, case)


@pytest.fixture(scope="module")
def server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["twinweave.compare"])
    return context


def kill(server, world, case, moment):
    # by name, since test modules cannot be imported by another process
    process = server.Process(target=tiny_runs.call, args=(str(Path(__file__)), list(sys.path), world, case, moment))
    process.start()
    if moment == "slowly":
        while process.is_alive() and not list((world / "run").glob("checkpoint-*/complete.json")):
            time.sleep(0.01)
        process.kill()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert not (world / "run" / "training.json").exists()


def files(folder):
    return {
        f"{name}/{path.name}": load_file(path)
        for name in ("best", "last")
        for path in sorted((folder / name).glob("*.safetensors"))
    }


def measured(training):
    timed = ("train_seconds", "tokens_per_second", "peak_memory_bytes")
    return {key: value for key, value in asdict(training).items() if key not in timed}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Case -> what its run gives when nothing happens to it, made once."""
    folder = tiny_runs.make_world(tmp_path_factory.mktemp("uninterrupted"))

    @functools.cache
    def reference(case):
        return measured(run(folder, case, case)), files(folder / case)

    return reference


def assert_same(world, resumed, reference):
    expected_numbers, expected = reference
    assert measured(resumed) == expected_numbers
    found = files(world / "run")
    assert found.keys() == expected.keys()
    for name, tensors in expected.items():
        assert found[name].keys() == tensors.keys()
        assert all(torch.equal(found[name][key], tensor) for key, tensor in tensors.items()), name
    assert sorted(p.name for p in (world / "run").iterdir()) == ["best", "last", "training.json"]  # no traces


@pytest.mark.parametrize(
    ("case", "moment"),
    [
        ("peft", "slowly"),
        ("imsm", "in the middle of an epoch"),
        ("imsm", "while writing the second checkpoint"),
        ("adalora", "in the middle of an epoch"),
        ("best is old", "in the middle of an epoch"),
        ("accumulating", "in the middle of an epoch"),
        ("peft", "before anything is said to be finished"),
    ],
)
def test_a_killed_training_ends_with_the_same_bits(server, world, uninterrupted, case, moment):
    kill(server, world, case, moment)
    done = checkpoints.complete_checkpoints(world / "run")
    assert done
    if moment == "while writing the second checkpoint":
        assert checkpoints.staging_folder(world / "run").exists()
        assert [p.name for p in done] == ["checkpoint-4"]
    if case == "accumulating":
        assert done[-1].name == "checkpoint-8"  # not at the end of an epoch
    tokens = json.loads((done[-1] / checkpoints.MARKER).read_text())["tokens"]
    resumed = run(world, case)
    assert resumed.tokens_per_second * resumed.train_seconds > 0.99 * tokens > 0  # both parts are counted
    if case == "best is old":
        assert resumed.best_step == 5  # from before the kill, and better than all that came after
    assert_same(world, resumed, uninterrupted(case))


@pytest.fixture
def stopped(world, monkeypatch):
    """A run that ended after step 10 of 16 with the checkpoint of step 8."""
    training_step = TwinweaveTrainer.training_step

    def step_or_stop(self, *args, **kwargs):
        if self.state.global_step == 10:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(TwinweaveTrainer, "training_step", step_or_stop)
    with pytest.raises(KeyboardInterrupt):
        run(world, "imsm")
    monkeypatch.setattr(TwinweaveTrainer, "training_step", training_step)
    return world


def test_what_was_not_finished_is_never_gone_on_from(stopped, uninterrupted):
    """Later checkpoints without a marker, in both places where a killed process can leave them."""
    whole = stopped / "run" / "checkpoint-8"
    for name in ("checkpoint-12", "checkpoint-999", ".writing/checkpoint-12"):
        broken = stopped / "run" / name
        shutil.copytree(whole, broken)
        (broken / checkpoints.MARKER).unlink()
        (broken / "trained.safetensors").write_bytes((whole / "trained.safetensors").read_bytes()[:100])
    assert [p.name for p in checkpoints.complete_checkpoints(stopped / "run")][-1] == "checkpoint-8"
    assert_same(stopped, run(stopped, "imsm"), uninterrupted("imsm"))


def test_a_damaged_checkpoint_is_our_error_and_removing_it_goes_on_from_an_older_one(stopped, uninterrupted):
    whole = stopped / "run" / "checkpoint-8"
    older = shutil.copytree(whole, stopped / "run" / "checkpoint-7")
    (whole / "trained.safetensors").write_bytes((older / "trained.safetensors").read_bytes()[:100])
    with pytest.raises(DamagedFileError, match=r"checkpoint-8.*damaged"):
        run(stopped, "imsm")
    shutil.rmtree(whole)
    older.rename(whole)
    assert_same(stopped, run(stopped, "imsm"), uninterrupted("imsm"))


def no_space(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("transformers.trainer.torch.save", RuntimeError("basic_ios::clear: iostream error")),  # what torch says
        ("twinweave.training.trainer.save_file", None),
        ("transformers.trainer_callback.TrainerState.save_to_json", OSError(28, "No space left on device")),
        ("twinweave.training.checkpoints.write_json_atomic", OSError(28, "No space left on device")),
    ],
)
def test_a_full_disk_keeps_the_previous_checkpoint_and_the_run_goes_on_later(
    world, uninterrupted, monkeypatch, place, error
):
    from safetensors import SafetensorError

    error = error or SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    save = TwinweaveTrainer._save_checkpoint

    def full(*args, **kwargs):
        raise error

    def second_is_full(self, *args, **kwargs):
        with monkeypatch.context() as patch:
            if self.state.global_step == 8:
                patch.setattr(place, full)
            return save(self, *args, **kwargs)

    monkeypatch.setattr(TwinweaveTrainer, "_save_checkpoint", second_is_full)
    with pytest.raises(TrainingError, match=r"checkpoint of step 8 could not be written.*checkpoint-4.*space"):
        run(world, "imsm")
    found = sorted(p.name for p in (world / "run").iterdir())
    assert found == ["checkpoint-4", "frozen", "frozen.json"]  # whole, and nothing half-written
    monkeypatch.setattr(TwinweaveTrainer, "_save_checkpoint", save)
    assert_same(world, run(world, "imsm"), uninterrupted("imsm"))


def test_a_full_disk_at_the_very_end_loses_nothing(world, uninterrupted, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["twinweave.training.fit"].shutil, "copy2", no_space)
        with pytest.raises(TrainingError, match=r"trained model could not be written.*checkpoint-16"):
            run(world, "peft")
    assert not (world / "run" / "best").exists()
    assert_same(world, run(world, "peft"), uninterrupted("peft"))
