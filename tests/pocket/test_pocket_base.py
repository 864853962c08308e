"""The shipped base model knows what it should, and the command that rebuilds it works."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from twinweave.pocket import TASKS, base_dir, rows
from twinweave.pocket.build import main

SUBSET = 60


@pytest.fixture(scope="module")
def base():
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(base_dir(), dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(base_dir())


def greedy_accuracy(base, name: str, max_new_tokens: int) -> float:
    model, tokenizer = base
    data = rows(f"{name}/test")[:SUBSET]
    batch = tokenizer([row["prompt"] for row in data], padding=True, padding_side="left", return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
    answers = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(answer == row["completion"] for answer, row in zip(answers, data, strict=True)) / len(data)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task["name"])
def test_the_base_knows_what_is_to_be_kept_and_not_the_targets(base, task):
    accuracy = greedy_accuracy(base, task["name"], task["max_new_tokens"])
    if task["role"] == "target":
        assert accuracy <= 0.2
    else:
        assert accuracy >= (0.9 if task["name"] == "reading" else 0.95)


def test_the_shipped_folder_is_small_and_has_no_pickles():
    files = [path for path in base_dir().rglob("*") if path.is_file()]
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json"} <= {p.name for p in files}
    assert sum(path.stat().st_size for path in files) <= 4_000_000
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pth", ".pkl"}]


def test_every_generation_of_a_test_answer_fits_into_max_new_tokens(base):
    _, tokenizer = base
    for task in TASKS:
        longest = max(len(tokenizer(row["completion"])["input_ids"]) for row in rows(f"{task['name']}/test"))
        assert longest <= task["max_new_tokens"]  # BOS counted here stands for the EOS to be generated


def test_the_build_command_writes_a_loadable_and_reproducible_base(tmp_path: Path):
    torch.set_num_threads(1)
    for name in ("one", "two"):
        main(["--out", str(tmp_path / name), "--steps", "2"])
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("one", "two"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(tmp_path / "one").eos_token == "<eos>"
    with pytest.raises(SystemExit) as refused:
        main(["--steps", "many"])
    assert refused.value.code == 2
