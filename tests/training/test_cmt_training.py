"""A memory model is trained, stopped, gone on with, loaded and scored as any other method is."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny_runs
from twinweave.data import ContextCollator
from twinweave.methods import get_method
from twinweave.training import TwinweaveTrainer, fit, load_base, load_recipe, load_tokenizer, load_training_data
from twinweave.training.distractors import share_of_distractors
from twinweave.training.rows import reading_size

SETTINGS = {
    "memory_tokens": 3,
    "document_tokens": 4,
    "aggregator_layers": 1,
    "aggregator_heads": 2,
    "aggregator_head_size": 8,
    "prefix_rank": 8,
    "init_text": "a b ?",
    "distractor_warmup": 0.25,
    "gradient_share": 0.7,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Contexts of one or two documents with one to three questions each, so that batches are filled up."""
    folder = tiny_runs.make_world(tmp_path_factory.mktemp("world"))
    rows = []
    for i in range(12):
        documents = [" ".join(tiny_runs.letters(10 * i + d, 6)) for d in range(1 + i % 2)]
        rows += [
            {"context": documents, "prompt": f"{documents[0][:1]} {word} ?", "completion": documents[-1][2 * at]}
            for at, word in enumerate(["copy", "yes", "no"][: 1 + i % 3])
        ]
    tiny_runs.write_rows(folder / "contexts.jsonl", rows[:18])
    tiny_runs.write_rows(folder / "asked.jsonl", rows[18:])
    return folder


def values_of(world: Path, **changes):
    rows = {"data": str(world / "contexts.jsonl"), "context": "context", "max_length": 24, "validation_fraction": 0.25}
    target = {"task": "completion_loss", "name": "asked", "data": str(world / "asked.jsonl"), "context": "context"}
    training = {"epochs": 4, "batch_size": 3, "learning_rate": 1e-2, "log_every": 1, "warmup": 0, "frozen_store": "off"}
    return tiny_runs.recipe_values(
        world,
        train=changes.pop("train", rows),
        target=target | changes.pop("target", {}),
        method=changes.pop("method", "cmt"),
        methods=changes.pop("methods", ["cmt"]),
        cmt=changes.pop("cmt", SETTINGS),
        training=training | changes.pop("training", {}),
        seeds=[0],
        sweeps={},
        **changes,
    )


def run(recipe, folder):
    method, tokenizer = get_method(recipe.method), load_tokenizer(recipe.base)
    data = load_training_data(recipe, tokenizer, 0, reads=reading_size(recipe, method))
    return fit(recipe, method, 0, data, tokenizer, folder)


def weights(folder):
    names = ("adapter_model.safetensors", "cmt.safetensors")
    return {
        (part, name): tensor
        for part in ("best", "last")
        for file in names
        for name, tensor in load_file(folder / part / file).items()
    }


def measured(training):
    timed = ("train_seconds", "tokens_per_second", "peak_memory_bytes")
    return {k: v for k, v in asdict(training).items() if k not in timed}


def test_a_stopped_training_ends_as_if_it_had_not_been(world, tmp_path, monkeypatch):
    recipe = load_recipe(values_of(world, training={"evaluate_every": 2, "max_steps": 6, "gradient_accumulation": 2}))
    whole = run(recipe, tmp_path / "whole")
    step = TwinweaveTrainer.training_step

    def stopping(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(TwinweaveTrainer, "training_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / "stopped")
    (checkpoint,) = (tmp_path / "stopped").glob("checkpoint-*")
    files = {path.name for path in checkpoint.iterdir()}
    own = {"adapter_config.json", "adapter_model.safetensors", "cmt.safetensors", "cmt_config.json"}
    assert checkpoint.name == "checkpoint-2"
    assert own | {"trained.safetensors"} <= files
    assert "model.safetensors" not in files  # the base stays where it is
    resumed = run(recipe, tmp_path / "stopped")
    assert measured(resumed) == measured(whole)
    assert whole.curve["train"][-1][1] < whole.curve["train"][0][1]
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert {path.name for path in (tmp_path / "stopped" / "best").iterdir()} == own


def test_distractors_come_in_by_the_number_of_steps(world, tmp_path, monkeypatch):
    assert [share_of_distractors(p, 0.2) for p in (0.0, 0.1, 0.2, 0.3, 0.4, 1.0)] == pytest.approx([0, 0, 0, 0.5, 1, 1])
    assert [share_of_distractors(p, 0.0) for p in (0.0, 0.5)] == [1, 1]
    seen, step = [], TwinweaveTrainer.training_step

    def watching(self, model, *args, **kwargs):
        seen.append((self.state.global_step, self.model.distractors))
        return step(self, model, *args, **kwargs)

    monkeypatch.setattr(TwinweaveTrainer, "training_step", watching)
    run(load_recipe(values_of(world, training={"max_steps": 8, "gradient_accumulation": 2})), tmp_path / "run")
    assert seen == [(n, share_of_distractors(n / 8, 0.25)) for n in range(8) for _ in range(2)]


def test_what_is_counted_and_what_the_ablations_change(world, tmp_path, monkeypatch):
    tokens, losses = [], {}
    for name in ("cmt", "cmt_plain_loss", "cmt_unmatched"):
        recipe = load_recipe(values_of(world, method=name, methods=[name], training={"max_steps": 1, "batch_size": 99}))
        tokenizer, method = load_tokenizer(recipe.base), get_method(name)
        data = load_training_data(recipe, tokenizer, 0, reads=reading_size(recipe, method))
        train_or_resume = TwinweaveTrainer.train_or_resume

        def watching(self, original=train_or_resume):
            original(self)
            tokens.append(self.tokens)

        with monkeypatch.context() as patched:
            patched.setattr(TwinweaveTrainer, "train_or_resume", watching)
            trained = fit(recipe, method, 0, data, tokenizer, tmp_path / name)
        losses[name] = trained.curve["train"][0][1]
        model = method.load(str(tmp_path / name / "best"), load_base(recipe.base))
        assert trained.trainable_parameters == sum(
            p.numel() for n, p in model.named_parameters() if "base_" not in n or "lora" in n
        )
    batch = ContextCollator(tokenizer)(list(data.train))
    assert tokens == [int(batch["attention_mask"].sum() + batch["context_mask"].sum())] * 3
    assert len(set(losses.values())) == 3
