"""Everything the README shows is run: Python as it stands, commands with settings that make them short."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import twinweave
from twinweave.cli import main
from twinweave.pocket import base_dir

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Appended to commands that train, so that they take seconds here.
SHORT = [
    "training.max_steps=4",
    "training.evaluate_every=2",
    "train.limit=64",
    "evaluation.lens_prompts=2",
    "rehearsal.sequences=50",
    "seeds=[0]",
]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(text: str = README) -> list[list[str]]:
    lines = [line for block in blocks("bash", text) for line in block.splitlines() if line.strip()]
    return [shlex.split(line, comments=True) for line in lines]


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture
def my_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory, with the adapter that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(base_dir(), dtype=torch.float32)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(base, config).save_pretrained("my-lora")


def test_slim_page() -> None:
    names: dict[str, Any] = {}
    for block in blocks("python", (ROOT / "docs" / "slim.md").read_text(encoding="utf-8")):
        exec(compile(block, "docs/slim.md", "exec"), names)
    assert names["model"].get_nb_trainable_parameters()[0] > 100_000


def test_genadapter_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "genadapter.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in blocks("python", page):
        exec(compile(block, "docs/genadapter.md", "exec"), names)
    assert (tmp_path / "people" / "adapter_model.safetensors").is_file()
    reader, questions, tokenizer = names["reader"], names["questions"], names["tokenizer"]
    asked = questions["input_ids"].shape[1]

    def written(ids: torch.Tensor) -> list[str]:
        return [text.strip() for text in tokenizer.batch_decode(ids[:, asked:], skip_special_tokens=True)]

    assert written(names["ids"])[0] == "swan"  # of the state that has read of Wanda Crane
    assert written(names["answer"]) == ["swan", "swan"]  # by plain PEFT, from what was exported
    assert "swan" not in written(reader.generate(**questions, max_new_tokens=4, do_sample=False))
    other = tokenizer("What is the pet of Mara Jarvis?", return_tensors="pt")
    asked = other["input_ids"].shape[1]
    assert written(names["served"].generate(**other, max_new_tokens=4, do_sample=False)) == ["canary"]
    shown = [command for command in commands(page) if command[0] == "twinweave"]
    assert {command[1] for command in shown} == {"read", "generate", "forget"}
    for command in shown:
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code, shlex.join(command)
        if command[1] == "generate":
            assert capsys.readouterr().out.split()[-1] == "swan"
    assert len(twinweave.AdapterState.load(tmp_path / "wanda").documents) == 1


def test_cmt_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "cmt.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in blocks("python", page):
        exec(compile(block, "docs/cmt.md", "exec"), names)
    assert names["answers"] == ["swan"]
    assert [hit.id for hit in names["hits"][0]] == ["mara"]
    assert [document["id"] for document in names["memory"].bank.documents()] == ["wanda"]
    for line in (line for block in blocks("bash", page) for line in block.splitlines()):
        if not line.startswith("twinweave"):
            subprocess.run(line, shell=True, check=True, cwd=tmp_path)
            continue
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code, line
        if " ask " in line:
            assert capsys.readouterr().out.split()[-1] == "swan"


@pytest.mark.usefixtures("my_lora")
def test_trainers_page() -> None:
    page = (ROOT / "docs" / "trainers.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for block in blocks("python", page):
        if "trl" not in block or importlib.util.find_spec("trl"):
            exec(compile(block, "trainers.md", "exec"), names)
    model: Any = names["model"]
    assert model.gate.w_b.abs().max() > 0
    assert not model.trains_adapter


@pytest.mark.usefixtures("my_lora")
def test_python_snippets_run_one_after_the_other(tmp_path: Path) -> None:
    code = "\n".join(blocks("python"))
    assert "get_imsm_model" in code
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "my-model" / "imsm_gate.safetensors").is_file()


def test_every_command_of_twinweave_runs(tmp_path: Path) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "notes.txt").write_text("Mara Jarvis lives in Valebrook. The pet of Mara Jarvis is a canary.")
    shown = [command for command in commands() if command[0] == "twinweave"]
    assert {command[1] for command in shown} >= {"train", "compare", "evaluate", "generate", "report", "validate"}
    for command in shown:
        if command[1] in ("train", "compare"):
            command = [*command, *SHORT]
        done = run(command, tmp_path)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "runs" / "reverse-compared" / "report.html").is_file()


def test_make_targets_exist_and_the_demo_is_the_command_they_run(tmp_path: Path) -> None:
    for command in (command for command in commands() if command[0] == "make"):
        plan = run([command[0], "-n", *command[1:]], ROOT)
        assert plan.returncode == 0, plan.stderr
        if command[1] == "demo":
            assert "twinweave demo" in plan.stdout
    done = run(["twinweave", "demo", "--output", str(tmp_path / "demo"), "seeds=[0,1]", *SHORT], ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1].endswith("report.html")
