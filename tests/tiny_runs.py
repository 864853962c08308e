"""Everything a run needs, in a folder: a tiny base with random weights, a word tokenizer, rows, and a recipe.

Imported by the conftest of the folders that train; knows nothing about what they test.
"""

import gc
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import twinweave.cli  # noqa: F401

# Runs collect garbage after each model. What the libraries have loaded by now is none, and takes longer than a run.
gc.freeze()

SPECIAL = ["<unk>", "<pad>", "<s>", "</s>"]
LETTERS = list("abcdefghij")
VOCABULARY = [*SPECIAL, *LETTERS, "copy", "reverse", "yes", "no", ":", "?"]
WINDOW = 48


def word_tokenizer(**changes: Any) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"} | changes
    return PreTrainedTokenizerFast(tokenizer_object=made, **{k: v for k, v in names.items() if v is not None})


def save_base(folder: Path, seed: int = 0, tokenizer: PreTrainedTokenizerFast | None = None, **config: Any) -> Path:
    """A causal LM of about 20,000 weights and its tokenizer, as `from_pretrained` finds them."""
    settings = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": WINDOW,
        "initializer_range": 0.2,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "tie_word_embeddings": False,
    } | config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder)
    (tokenizer or word_tokenizer()).save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def letters(seed: int, count: int = 3) -> list[str]:
    chosen = torch.randint(len(LETTERS), (count,), generator=torch.Generator().manual_seed(seed))
    return [LETTERS[i] for i in chosen]


def make_world(folder: Path) -> Path:
    """`base`, `train.jsonl`, `test.jsonl`, `text.jsonl` and `pairs.jsonl` in `folder`."""
    save_base(folder / "base")
    rows = [
        {"prompt": f"reverse {' '.join(words)} :", "completion": " ".join(reversed(words))}
        for words in (letters(i) for i in range(30))
    ]
    write_rows(folder / "train.jsonl", rows[:24])
    write_rows(folder / "test.jsonl", rows[24:])
    write_rows(folder / "text.jsonl", [{"text": " ".join(letters(100 + i, 8))} for i in range(5)])
    pairs = [{"good": f"copy {letters(200 + i)[0]} ?", "bad": f"{letters(300 + i)[0]} copy ?"} for i in range(5)]
    write_rows(folder / "pairs.jsonl", pairs)
    return folder


def recipe_values(world: Path, **changes: Any) -> dict[str, Any]:
    """A recipe of 12 steps (3 epochs of 4) with a target loss, a retained loss and a retained accuracy."""
    return {
        "name": "tiny",
        "base": str(world / "base"),
        "train": {"data": str(world / "train.jsonl"), "max_length": 24, "validation_fraction": 0.25},
        "target": {
            "task": "completion_loss",
            "name": "reverse",
            "data": str(world / "test.jsonl"),
            "max_new_tokens": 6,
        },
        "retained": [
            {"task": "wikitext", "name": "text", "data": str(world / "text.jsonl"), "family": "far"},
            {"task": "minimal_pairs", "name": "pairs", "data": str(world / "pairs.jsonl"), "family": "near"},
        ],
        "methods": ["peft", "peft_scaled", "imsm", "imsm_retention"],
        "seeds": [0, 1],
        "peft": {"type": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.2, "target_modules": ["q_proj", "v_proj"]},
        "imsm": {"gate_rank": 2, "gate_dropout": 0.1},
        "rehearsal": None,  # takes longer than the training
        "training": {"epochs": 3, "batch_size": 5, "learning_rate": 1e-2, "gate_learning_rate": 2e-2, "log_every": 3},
        "evaluation": {"lens_prompts": 2},
        "sweeps": {"scale": [0.5, 1.0], "retention": [0.0, 2.0]},
        "output": str(world / "run"),
    } | changes


def write_recipe(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def error_of(stderr: str) -> str:
    """The one sentence of an error, or a failed assertion where there is more or less than that."""
    assert "Traceback" not in stderr, stderr
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert sum(line.startswith("error:") for line in lines) == 1, stderr
    assert lines[-1].startswith("error:"), stderr
    return lines[-1]


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    """A results.json without what two equal runs may differ in."""
    timed = ("train_seconds", "tokens_per_second", "peak_memory_bytes")
    runs = [{k: v for k, v in run.items() if k not in timed} for run in results["runs"]]
    return {k: v for k, v in results.items() if k != "provenance"} | {"runs": runs}


def die() -> None:
    """As `kill -9` does it: no handler, no clean-up."""
    os.kill(os.getpid(), signal.SIGKILL)


def call(file: str, path: list[str], world: Path, *args: Any) -> None:
    """Run `run_and_die` of a test module, which has no name that another process could import it by."""
    import runpy
    import sys

    sys.path[:] = path
    runpy.run_path(file)["run_and_die"](world, *args)
