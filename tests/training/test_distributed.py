"""Two processes on the CPU, started as users start them, train what one process trains."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny_runs
from twinweave.compare import train
from twinweave.training import load_recipe

LAUNCHED = Path(__file__).with_name("launched.py")
DDP = ["--multi_gpu"]
FSDP2 = [
    "--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP",
    "--fsdp_state_dict_type", "FULL_STATE_DICT",
]  # fmt: skip


# accelerate's loading on the first process alone wants every tensor of a model to be sharded, and buffers never are
FSDP2_BUFFERS = [*FSDP2, "--fsdp_cpu_ram_efficient_loading", "false"]
LORA = {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
# masks are drawn by each process for itself
SLIM = {"type": "slim", "r": 2, "num_experts": 3, "num_clusters": 3, "masking_ratio": 0.0, "cluster_rate": 0.2}


def values(world: Path, name: str, processes: int, peft: dict) -> dict:
    """A recipe of 8 steps (two epochs) that rehearses and fits a guard; each step reads 4 rows of the task in all."""
    return tiny_runs.recipe_values(
        world,
        output=str(world / name),
        train={"data": str(world / "train.jsonl"), "max_length": 24, "validation_fraction": 0.33},
        peft=peft,
        imsm={"gate_rank": 2},
        rehearsal={"sequences": 24, "length": 16, "batch_size": 4 // processes, "positions": 6},
        guard={"affected": 0.2},
        training={
            "epochs": 2,
            "batch_size": 4 // processes,
            "learning_rate": 1e-2,
            "gate_learning_rate": 2e-2,
            "log_every": 1,
        },
    )


def launch(world: Path, recipe: Path, options: list[str]) -> subprocess.CompletedProcess[str]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1",
        "--main_process_port", str(port), *options, str(LAUNCHED), "train", str(recipe),
    ]  # fmt: skip
    env = os.environ | {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=world, env=env, capture_output=True, text=True, timeout=500)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {"report.html"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "peft"),
    [(DDP, LORA), (FSDP2, LORA), (DDP, SLIM), (FSDP2_BUFFERS, SLIM)],
    ids=["ddp", "fsdp2", "ddp, slim", "fsdp2, slim"],
)
def test_two_processes_train_what_one_does(world, options, peft):
    train(load_recipe(values(world, "one", 1, peft)))
    recipe = tiny_runs.write_recipe(world / "two.yaml", values(world, "two", 2, peft))
    done = launch(world, recipe, options)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("DTensor") == (0 if options == DDP else 2)
    assert done.stdout.count("results:") == 1
    assert done.stderr.count("IMSM, seed 0: training") == 1
    (one,), (two,) = (json.loads((world / name / "results.json").read_text())["runs"] for name in ("one", "two"))
    assert len(one["curve"]["train"]) == 8
    for kind in ("train", "validation"):
        torch.testing.assert_close(
            torch.tensor(two["curve"][kind]), torch.tensor(one["curve"][kind]), rtol=0, atol=1e-4
        )
    assert two["trainable_parameters"] == one["trainable_parameters"]
    assert files(world / "two") == files(world / "one")
    for path in (world / "one").rglob("*.safetensors"):
        expected, found = load_file(path), load_file(world / "two" / path.relative_to(world / "one"))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)
