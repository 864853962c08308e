"""`twinweave evaluate --lm-eval`: a run's model beside its base, on local tasks; what is kept of it."""

import builtins
import json
import shutil
import sys
from functools import partial

import pytest
import yaml

pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager

import tiny_runs
from twinweave.cli import main
from twinweave.compare import compare
from twinweave.training import load_recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    world = tiny_runs.make_world(tmp_path_factory.mktemp("trained"))
    rows = [{"q": f"copy {a} ?", "options": ["yes", f"no {a}"], "answer": i % 2} for i, a in enumerate("abcdefgh")]
    tiny_runs.write_rows(world / "choices.jsonl", rows)
    task = {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "choices.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "brier_score"}],
    }
    (world / "own").mkdir()
    (world / "own" / "choice.yaml").write_text(yaml.safe_dump(task))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        compare(load_recipe(values(world)))
    return world


def values(world):
    return tiny_runs.recipe_values(world, seeds=[0], methods=["peft", "imsm"]) | {"output": "run"}


@pytest.fixture
def trained(finished, tmp_path, monkeypatch):
    """A copy of the run to change; its base and rows stay where they are."""
    shutil.copytree(finished, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    without_defaults = partial(TaskManager, include_defaults=False)  # reading thousands of tasks takes a while
    monkeypatch.setattr("twinweave.evaluation.lm_eval.TaskManager", lambda **given: without_defaults(**given))
    return tmp_path / "world"


@pytest.fixture
def call(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["twinweave", "evaluate", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return run


TASK = ("--lm-eval", "tiny_choice", "--lm-eval-path", "own")


def entries():
    with open("run/results.json") as file:
        return json.load(file)["lm_eval"]


def test_a_run_beside_its_base(trained, call):
    before = json.loads((trained / "run" / "results.json").read_text())
    code, out, err = call("run", *TASK, "--json", "scores.json")
    assert code == 0, err
    assert all(part in out for part in ("tiny_choice", "brier_score", "forgetting", "results.json"))
    accuracy, brier = entries()
    assert (accuracy["metric"], accuracy["model"], accuracy["memory"]) == (
        "acc,none",
        "cells/imsm-seed0/best",
        "interwoven",
    )
    assert (accuracy["retention"], accuracy["limit"], accuracy["count"]) == (0.0, None, 8)
    assert accuracy["forgetting"] == accuracy["base"] - accuracy["score"]
    assert brier["score"] != brier["base"]
    assert brier["forgetting"] == brier["score"] - brier["base"]  # lower is better
    assert json.loads((trained / "scores.json").read_text()) == {"lm_eval": [accuracy, brier]}
    after = json.loads((trained / "run" / "results.json").read_text())
    assert {k: v for k, v in after.items() if k != "lm_eval"} == before


def test_measured_again_it_is_replaced_and_otherwise_added(trained, call):
    assert call("run", *TASK)[0] == 0
    first = entries()
    assert call("run/cells/imsm-seed0", *TASK)[0] == 0
    assert entries() == first
    assert call("run", *TASK, "--memory", "original", "--limit", 4)[0] == 0
    original = entries()[2:]
    assert [(e["memory"], e["limit"], e["count"], e["forgetting"]) for e in original] == [("original", 4, 4, 0.0)] * 2
    assert call("run", *TASK, "--retention", "inf")[0] == 0
    assert [(e["retention"], e["forgetting"]) for e in entries()[4:]] == [("inf", 0.0)] * 2
    assert call("run/cells/peft-seed0", *TASK)[0] == 0
    plain = entries()[6:]
    assert [(e["model"], e["memory"], e["retention"]) for e in plain] == [("cells/peft-seed0/best", None, None)] * 2
    assert [e["base"] for e in plain] == [e["base"] for e in first]


def test_it_outlives_a_comparison_that_goes_on(finished, trained, call):
    assert call("run", *TASK)[0] == 0
    kept = entries()
    compare(load_recipe(values(finished)))
    assert entries() == kept


def test_own_tasks_beside(trained, call):
    (trained / "own.yaml").write_text(yaml.safe_dump({"name": "own", "kind": "text_loss", "data": "text.jsonl"}))
    code, _, err = call("run", *TASK, "--task", "own.yaml", "--json", "scores.json")
    assert code == 0, err
    scores = json.loads((trained / "scores.json").read_text())
    assert (set(scores), scores["own"]["count"]) == ({"lm_eval", "own"}, 5)


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["run", "--lm-eval", "tiny_chioce", "--lm-eval-path", "own"], 2, ["'tiny_chioce'", "'tiny_choice'"]),
        (["run", "--lm-eval", " , "], 2, ["--lm-eval", "at least one"]),
        (["run", "--lm-eval", "tiny_choice", "--lm-eval-path", "nowhere"], 2, ["nowhere"]),
        (["nowhere", *TASK], 1, ["nowhere"]),
    ],
)
def test_bad_requests(trained, call, arguments, code, named):
    before = (trained / "run" / "results.json").read_bytes()
    found, out, err = call(*arguments)
    message = tiny_runs.error_of(err)
    assert (found, out) == (code, "")
    assert all(part in message for part in named), message
    assert (trained / "run" / "results.json").read_bytes() == before


def test_missing_rows(trained, call):
    (trained / "choices.jsonl").unlink()
    code, _, err = call("run", *TASK)
    assert code == 1
    assert "choices.jsonl" in tiny_runs.error_of(err)


def test_a_missing_harness(finished, call, monkeypatch):
    real = builtins.__import__

    def no_harness(name, *args, **kwargs):
        if name.startswith("lm_eval"):
            raise ImportError(f"No module named '{name}'")
        return real(name, *args, **kwargs)

    monkeypatch.chdir(finished)
    monkeypatch.delitem(sys.modules, "twinweave.evaluation.lm_eval", raising=False)
    monkeypatch.setattr(builtins, "__import__", no_harness)
    code, _, err = call("run", *TASK)
    assert code == 2
    assert "pip install 'twinweave[eval]'" in tiny_runs.error_of(err)
