"""The commands as a user meets them: results on stdout, progress on stderr, and for bad input one sentence with the
value and the fix, an exit code, and nothing in the way of the corrected command.

`main()` is called in this process: what it prints and how it exits is the same, and it is a hundred times faster.
"""

import json
import os
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import tiny_runs
from twinweave.cli import app, main

COMMANDS = ["demo", "train", "compare", "evaluate", "generate", "read", "forget", "report", "validate", "tasks"]
COMMANDS += ["methods", "env"]


@pytest.fixture
def call(monkeypatch, capsys):
    """Run `twinweave ARGUMENTS`; returns (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["twinweave", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return run


@pytest.fixture
def recipe(world):
    """A recipe of one quick training, and a way to write it again with changes."""

    def write(**changes):
        values = tiny_runs.recipe_values(world, seeds=[0], methods=["peft", "imsm"], output="run")
        values["training"] |= {"max_steps": 4, "epochs": 1}
        for key, value in changes.items():
            values[key] = (
                values[key] | value if isinstance(values.get(key), dict) and isinstance(value, dict) else value
            )
        return tiny_runs.write_recipe(world / "recipe.yaml", values)

    return write


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished comparison. Not to be changed."""
    world = tiny_runs.make_world(tmp_path_factory.mktemp("trained"))
    from twinweave.compare import compare
    from twinweave.training import load_recipe

    compare(load_recipe(tiny_runs.recipe_values(world, seeds=[0], methods=["peft", "imsm"])))
    return world


def files_of(world):
    return {p: p.read_bytes() for p in world.rglob("*") if p.is_file()}


# --- the ordinary way -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"Example: twinweave {command}" in re.sub(r"[\s│]+", " ", result.output)


def test_a_run_from_end_to_end(world, recipe, call):
    code, out, err = call("validate", recipe())
    assert (code, "can be run" in out) == (0, True)
    assert not (world / "run").exists()

    code, out, err = call("compare", recipe())
    assert code == 0
    assert f"report:  {os.path.join('run', 'report.html')}" in out
    assert "results: " in out
    assert "scoring" in err
    assert "scoring" not in out
    assert "LoRA" in out
    assert "warn" not in err.lower()
    results = json.loads((world / "run" / "results.json").read_text())
    assert results["provenance"]["command"] == f"twinweave compare {world / 'recipe.yaml'}"

    code, out, err = call("evaluate", "run", "--json", "scores.json", "--limit", "3")
    assert code == 0
    scores = json.loads((world / "scores.json").read_text())
    assert {name: score["count"] for name, score in scores.items()} == {"reverse": 3, "text": 3, "pairs": 3}

    code, out, err = call("evaluate", "run/cells/imsm-seed0", "--memory", "original", "--json", "original.json")
    assert code == 0
    originals = json.loads((world / "original.json").read_text())
    for name, metrics in results["base"]["scores"].items():
        assert originals[name]["metrics"] == pytest.approx(metrics, abs=1e-9)

    code, out, err = call("evaluate", "run/cells/peft-seed0/best", "--json", "peft.json")
    assert code == 0
    run = next(r for r in results["runs"] if r["method"] == "peft")
    found = json.loads((world / "peft.json").read_text())
    assert {n: s["metrics"] for n, s in found.items()} == run["target"] | run["retained"]

    (world / "run" / "report.html").unlink()
    code, out, err = call("report", "run")
    assert code == 0
    assert (world / "run" / "report.html").is_file()


def test_train_and_generate(world, recipe, call):
    assert call("train", recipe(), "method=imsm", "output=one")[0] == 0
    code, out, _ = call("generate", "one", "reverse a b c :", "--max-new-tokens", 5)
    assert code == 0
    assert len(out.split()) <= 5
    assert set(out.split()) <= set(tiny_runs.VOCABULARY)
    assert call("generate", "one", "reverse a b c :", "--max-new-tokens", 5)[1] == out
    code, coloured, _ = call("generate", "one", "reverse a b c :", "--max-new-tokens", 5, "--lens")
    assert code == 0
    shown = [token for token in re.findall(r"([^\s·%]+)·\d+%", coloured) if token not in tiny_runs.SPECIAL]
    assert shown == out.split()
    sampled = [call("generate", "one", "reverse a b c :", "--temperature", 5, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    code, out, _err = call("generate", "one", "reverse a b c :", "--memory", "original", "--retention", "2")
    assert code == 0


def test_requests_without_what_they_need(call):
    for arguments in (["train"], ["no-such-command"], ["generate", "run"], ["evaluate", "run", "--limit", "0"]):
        code, out, err = call(*arguments)
        assert (code, out) == (2, "")
        assert "Traceback" not in err


def test_lists(call):
    for command, expected in (
        ("tasks", "gsm8k"),
        ("methods", "imsm_retention"),
        ("methods", "lwf_weight: "),
        ("env", "torch"),
    ):
        code, out, err = call(command)
        assert (code, err) == (0, "")
        assert expected in out


def test_brackets_in_names_are_only_brackets(world, recipe, call):
    """Rich reads [/b] as markup, and an unmatched one as an error."""
    (world / "x [").mkdir()
    (world / "base").rename(world / "x [" / "b] [red]")
    named = {"base": "x [/b] [red]", "name": "[/i] name"}
    code, out, err = call("compare", recipe(**named), "output=runs [/b] [red]", "methods=[peft]")
    assert code == 0, err
    assert "runs [/b] [red]/report.html" in out
    assert "x [/b] [red]" in err
    assert call("validate", recipe(**named))[0] == 0
    code, out, err = call("validate", recipe(base="./x [/c] [red]"))
    assert code == 1
    assert "x [/c] [red]" in tiny_runs.error_of(err)


def test_exit_codes_of_the_real_program(world, recipe):
    """As a process: `python -m twinweave` is the program too."""
    path = recipe()
    for arguments, code in ((["methods"], 0), (["train", "no.yaml"], 2)):
        done = subprocess.run(
            [sys.executable, "-m", "twinweave", *arguments], capture_output=True, text=True, cwd=world
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert bool(done.stdout) is (code == 0)
        if arguments == ["train", "no.yaml"]:
            assert "no.yaml" in tiny_runs.error_of(done.stderr)
    assert path.is_file()


# --- bad recipes and data: say it, leave nothing, let the corrected command run ---------------------------------------

BAD_DATA = {
    "missing file": (None, ["rows.jsonl", "does not exist"]),
    "broken JSON": (['{"prompt": "copy a :", "completion": "a"}', '{"prompt": "copy'], ["rows.jsonl", "line 2"]),
    "not an object": (["[1, 2]"], ["rows.jsonl", "line 1"]),
    "no prompt": ([{"text": "a b"}, {"text": "c"}], ["rows.jsonl row 1", "text", "prompt"]),
    "no completion": ([{"prompt": "copy a :"}] * 3, ["rows.jsonl row 1", "completion"]),
    "empty completion": ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": " "}], ["row 2", "empty"]),
    "empty file": ([], ["rows.jsonl", "no rows"]),
    "one row": ([{"prompt": "a", "completion": "b"}], ["One row", "validation"]),
    "answer too long": ([{"prompt": "a", "completion": "b " * 60}] * 3, ["row 1", "24"]),
}


@pytest.mark.parametrize("fault", BAD_DATA)
@pytest.mark.parametrize("command", ["train", "compare"])
def test_bad_rows(world, recipe, call, fault, command):
    rows, named = BAD_DATA[fault]
    if rows is not None:
        tiny_runs.write_rows(world / "rows.jsonl", rows)
    path = recipe(train={"data": "rows.jsonl"})
    before = files_of(world)
    code, out, err = call(command, path)
    message = tiny_runs.error_of(err)
    assert code == 1
    assert out == ""
    assert all(part in message for part in named), message
    assert files_of(world) == before
    if (fault, command) == ("broken JSON", "train"):  # the corrected command runs in the same folder
        (world / "rows.jsonl").unlink()
        code, out, err = call(command, recipe())
        assert code == 0, err


@pytest.mark.parametrize(
    ("overrides", "code", "named"),
    [
        (["training.lerning_rate=1"], 2, ["'training.lerning_rate'", "'training.learning_rate'"]),
        (["method=imms"], 2, ["'imms'", "'imsm'"]),
        (["methods=[pefd]"], 2, ["'pefd'", "'peft'"]),
        (["target=gsm8"], 2, ["'gsm8'", "'gsm8k'"]),
        (["retained=[missing_task.yaml]"], 2, ["missing_task.yaml"]),
        (["target={task: completion_loss, data: nowhere.jsonl}"], 1, ["nowhere.jsonl"]),
        (["retained=[{task: minimal_pairs, data: test.jsonl}]"], 1, ["test.jsonl row 1", "good"]),
        (["retained=[{task: minimal_pairs}]"], 2, ["minimal_pairs", "no data"]),
        (["peft.target_modules=[no_such_layer]"], 1, ["no_such_layer"]),
        (["training.optimizer=adam_torch"], 2, ["'adam_torch'"]),
        (["base=/no/such/base"], 1, ["/no/such/base"]),
        (["base=no_such/base"], 1, ["no_such/base"]),
        (["base=train.jsonl"], 1, ["train.jsonl"]),
        (["base.pad_token=<nope>"], 1, ["<nope>"]),
        (["training.report_to=[wandb_typo]"], 2, ["wandb_typo"]),
    ],
)
def test_bad_settings(world, recipe, call, overrides, code, named):
    path = recipe()
    before = files_of(world)
    for command in ("compare", "validate"):
        found, out, err = call(command, path, *overrides)
        message = tiny_runs.error_of(err)
        assert found == code, message
        assert out == ""
        assert all(part in message for part in named), message
        assert files_of(world) == before


def test_the_corrected_command_runs_where_the_wrong_one_was_given(world, recipe, call):
    for wrong in (
        "peft.target_modules=[no_such_layer]",
        "train.data=nowhere.jsonl",
        "base=/no/such",
        "training.optimizer=x",
    ):
        assert call("train", recipe(), wrong)[0] in (1, 2)
    code, _out, err = call("train", recipe())
    assert code == 0, err


def bert(world):
    from transformers import BertConfig, BertForMaskedLM

    BertForMaskedLM(
        BertConfig(
            vocab_size=len(tiny_runs.VOCABULARY),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    ).save_pretrained(world / "other")


def t5(world):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=len(tiny_runs.VOCABULARY), d_model=32, d_ff=32, d_kv=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(world / "other")


def truncated(world):
    tiny_runs.save_base(world / "other")
    weights = world / "other" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def half_a_config(world):
    tiny_runs.save_base(world / "other")
    (world / "other" / "config.json").write_text('{"model_type": "lla')


def without_weights(world):
    tiny_runs.save_base(world / "other")
    (world / "other" / "model.safetensors").unlink()


def without_eos(world):
    tiny_runs.save_base(world / "other", tokenizer=tiny_runs.word_tokenizer(eos_token=None))


def without_pad(world):
    tiny_runs.save_base(world / "other", tokenizer=tiny_runs.word_tokenizer(pad_token=None))


def without_tokenizer(world):
    tiny_runs.save_base(world / "other")
    for path in (world / "other").glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (bert, ["other", "not a causal language model"]),
        (t5, ["other", "causal"]),
        (truncated, ["other", "damaged"]),
        (half_a_config, ["other"]),
        (without_weights, ["other"]),
        (without_eos, ["other", "end-of-text", "eos_token"]),
        (without_pad, ["other", "padding", "base.pad_token"]),
        (without_tokenizer, ["other", "tokenizer"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bases_that_cannot_be_used(world, recipe, call, make, named):
    make(world)
    if not (world / "other" / "tokenizer.json").is_file() and make is not without_tokenizer:
        tiny_runs.word_tokenizer().save_pretrained(world / "other")
    path = recipe(base="other")
    before = files_of(world)
    code, out, err = call("compare", path)
    message = tiny_runs.error_of(err)
    assert code == 1
    assert out == ""
    assert all(part in message for part in named), message
    assert files_of(world) == before
    if make is without_pad:  # the message's own advice
        code, out, err = call("validate", path, "base.pad_token=</s>")
        assert code == 0, err


def test_an_output_folder_with_something_else_or_another_run(trained, call, monkeypatch):
    monkeypatch.chdir(trained)
    values = tiny_runs.recipe_values(trained, seeds=[0], methods=["peft", "imsm"])
    path = tiny_runs.write_recipe(trained / "recipe.yaml", values)
    (trained / "notes").mkdir(exist_ok=True)
    (trained / "notes" / "a.txt").write_text("mine")
    before = files_of(trained)
    for override, named in (("training.learning_rate=1", "another run"), ("output=notes", "not a run")):
        code, _out, err = call("compare", path, override)
        assert code == 2
        assert named in (message := tiny_runs.error_of(err))
        assert "output=" in message
    assert files_of(trained) == before


def test_an_output_folder_that_cannot_be_written_is_no_traceback(world, recipe, call):
    (world / "file").write_text("not a folder")
    code, _out, err = call("train", recipe(), "output=file/run")
    assert code in (1, 2)
    assert "file" in tiny_runs.error_of(err)


# --- saved models: damaged, foreign, pickled --------------------------------------------------------------------------


@pytest.fixture
def copy(trained, tmp_path, monkeypatch):
    """A copy of the finished comparison, to be damaged."""
    import shutil

    shutil.copytree(trained, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def pickle_it(folder, name):
    import torch
    from safetensors.torch import load_file

    tensors = {key: tensor.clone() for key, tensor in load_file(folder / name).items()}
    torch.save(tensors, folder / name)


def pickle_as_bin(folder, name):
    pickle_it(folder, name)
    (folder / name).rename(folder / "adapter_model.bin")


def cut(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:-50])


def drop_one_tensor(folder, name):
    from safetensors.torch import load_file, save_file

    tensors = {key: tensor.clone() for key, tensor in load_file(folder / name).items()}
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, folder / name)


def remove(folder, name):
    (folder / name).unlink()


def scramble(folder, name):
    (folder / "adapter_config.json").write_text('{"peft_type": ')


@pytest.mark.parametrize("cell", ["peft-seed0", "imsm-seed0"])
@pytest.mark.parametrize("damage", [cut, pickle_it, pickle_as_bin, drop_one_tensor, remove, scramble])
def test_damaged_models_are_refused(copy, call, cell, damage):
    folder = copy / "run" / "cells" / cell / "best"
    damage(folder, "adapter_model.safetensors")
    code, out, err = call("generate", folder, "reverse a b c :")
    message = tiny_runs.error_of(err)
    assert (code, out) == (1, "")
    assert "adapter_model" in message or "adapter_config" in message
    assert ("pickle" in message) is (damage in (pickle_it, pickle_as_bin))


@pytest.mark.parametrize("cell", ["peft-seed0", "imsm-seed0"])
def test_an_adapter_for_another_base_is_refused(copy, call, cell):
    """One of other sizes, and one that differs in nothing but its weights."""
    for name, changes in (("wide", {"hidden_size": 48}), ("twin", {"seed": 5})):
        tiny_runs.save_base(copy / name, **changes)
        code, out, err = call("generate", copy / "run" / "cells" / cell, "a", "--base", name)
        assert (code, out) == (1, ""), err
        assert "another base" in tiny_runs.error_of(err)
    (copy / "base").rename(copy / "moved")
    code, _, err = call("generate", copy / "run" / "cells" / cell, "a", "--base", "moved", "--max-new-tokens", 2)
    assert code == 0, err


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["generate", "run", "a " * 60], 2, ["48", "Shorten"]),
        (["generate", "run", "a", "--max-new-tokens", "48"], 2, ["48", "no room"]),
        (["generate", "run", ""], 1, ["prompt"]),
        (["generate", "run", "a", "--memory", "orignal"], 2, ["'orignal'", "'original'"]),
        (["generate", "run/cells/peft-seed0", "a", "--lens"], 2, ["--lens"]),
        (["generate", "run/cells/peft-seed0", "a", "--retention", "1"], 2, ["--retention"]),
        (["generate", "run", "a", "--chat"], 1, ["chat template"]),
        (["generate", "nowhere", "a"], 1, ["nowhere"]),
        (["generate", "base", "a"], 1, ["base"]),
        (["evaluate", "nowhere"], 1, ["nowhere"]),
        (["evaluate", "run", "--task", "gsm8l"], 2, ["'gsm8l'", "'gsm8k'"]),
        (["evaluate", "run", "--task", "completion_loss"], 2, ["completion_loss", "data"]),
        (["report", "nowhere"], 1, ["nowhere", "results.json"]),
        (["report", "base"], 1, ["base", "results.json"]),
    ],
)
def test_bad_requests_to_a_finished_run(trained, call, monkeypatch, arguments, code, named):
    monkeypatch.chdir(trained)
    before = files_of(trained)
    found, out, err = call(*arguments)
    message = tiny_runs.error_of(err)
    assert (found, out) == (code, "")
    assert all(part in message for part in named), message
    assert files_of(trained) == before


def test_broken_results_are_one_sentence(copy, call):
    results = copy / "run" / "results.json"
    results.write_text(results.read_text()[:200])
    for arguments in (["report", "run"], ["evaluate", "run"], ["generate", "run", "a"]):
        code, _, err = call(*arguments)
        assert code == 1
        assert "results.json" in tiny_runs.error_of(err)
    results.write_text('{"schema": 2}')
    code, _out, err = call("report", "run")
    assert code == 1
    assert "schema 2" in tiny_runs.error_of(err)


def test_a_comparison_of_plain_adapters_can_be_asked_too(copy, call):
    import shutil

    shutil.rmtree(copy / "run" / "cells" / "imsm-seed0")
    code, _out, err = call("generate", "run", "reverse a b c :", "--max-new-tokens", 3)
    assert code == 0, err


def test_a_full_disk_is_one_sentence(world, recipe, call, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("twinweave.compare.run.write_json_atomic", full)
        code, _out, err = call("train", recipe())
    assert code == 1
    assert "No space left" in tiny_runs.error_of(err)
    assert call("train", recipe())[0] == 0
