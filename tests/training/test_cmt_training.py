"""A memory model is trained, stopped, gone on with, loaded and scored as any other method is."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny_runs
from twinweave.cli.evaluate import evaluate
from twinweave.cli.generate import generate
from twinweave.cli.shared import open_run
from twinweave.cmt import CMTConfig, MemoryModel
from twinweave.compare import check_recipe, compare, train
from twinweave.data import ContextCollator
from twinweave.errors import RecipeError, UnsupportedModelError, UsageError
from twinweave.evaluation import evaluate_tasks
from twinweave.methods import Settings, get_method
from twinweave.training import (
    FrozenStore,
    TwinweaveTrainer,
    fit,
    load_base,
    load_recipe,
    load_tokenizer,
    load_training_data,
)
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


def test_with_a_store_the_losses_are_the_same_and_the_base_is_not_run_alone(world, tmp_path, monkeypatch):
    step, predict, calls = TwinweaveTrainer.training_step, TwinweaveTrainer.prediction_step, []

    def counting(original):
        def run(self, model, inputs, *args, **kwargs):
            counted = []
            handle = self.model.compressor.decoder.register_forward_pre_hook(lambda *_: counted.append(1))
            found = original(self, model, inputs, *args, **kwargs)
            handle.remove()
            calls.append(len(counted))
            return found

        return run

    monkeypatch.setattr(TwinweaveTrainer, "training_step", counting(step))
    monkeypatch.setattr(TwinweaveTrainer, "prediction_step", counting(predict))
    curves, passes = {}, {}
    for kept in ("off", "auto", str(tmp_path / "kept")):
        values = values_of(world, cmt=SETTINGS | {"gradient_share": 1.0}, training={"frozen_store": kept})
        calls.clear()
        trained = run(load_recipe(values), tmp_path / f"run-{Path(kept).name}")
        curves[kept], passes[kept] = trained.curve, set(calls)
    # the documents, the questions, the answers; without a store also the base alone
    assert list(passes.values()) == [{4}, {3}, {3}]
    plain, *stored = curves.values()
    for curve in stored:
        for kind in ("train", "validation"):
            assert [s for s, _ in curve[kind]] == [s for s, _ in plain[kind]]
            assert [loss for _, loss in curve[kind]] == pytest.approx([loss for _, loss in plain[kind]], abs=2e-5)
    assert not list(tmp_path.glob("run-auto/frozen*"))
    store = FrozenStore(tmp_path / "kept_questions")  # beside that of rows with their contexts in the prompt
    rows = [json.loads(line) for line in (world / "contexts.jsonl").read_text().splitlines()]
    assert len(store) == len({(row["prompt"], row["completion"]) for row in rows}) < len(rows)


def test_compared_with_a_method_that_has_it_in_the_prompt(world, tmp_path):
    documents = str(tiny_runs.write_rows(tmp_path / "read.jsonl", [{"text": "a b c d e f"}]))
    values = values_of(world, methods=["peft", "cmt"], output=str(tmp_path / "run"), evaluation={"read": documents})
    results = compare(load_recipe(values))
    plain, remembered = results["runs"]
    assert (plain["method"], remembered["method"]) == ("peft", "cmt")
    assert remembered["target_score"] != results["base"]["target_score"]
    # with the documents in memory, and the base itself where nothing is
    assert remembered["retained"]["text"]["loss"] != results["base"]["scores"]["text"]["loss"]
    cell = tmp_path / "run" / "cells" / "cmt-seed0"
    model, tokenizer, recipe = open_run(cell)
    assert isinstance(model, MemoryModel)
    assert model.settings == CMTConfig(**SETTINGS)
    bare = evaluate_tasks(model, tokenizer, recipe.retained, progress=False)
    assert {name: score.metrics for name, score in bare.items()} == {
        name: results["base"]["scores"][name] for name in bare
    }


def test_a_memory_model_learns_on(world, tmp_path):
    run(load_recipe(values_of(world, training={"max_steps": 1})), tmp_path / "first")
    path = str(tmp_path / "first" / "best")
    on = load_recipe(values_of(world, cmt={"path": path}, training={"learning_rate": 1e-8, "max_steps": 1}))
    assert reading_size(on, get_method("cmt")) == 4
    found = dict(check_recipe(on))
    run(on, tmp_path / "second")
    before, after = weights(tmp_path / "first"), weights(tmp_path / "second")
    trained = sum(tensor.numel() for (part, _), tensor in after.items() if part == "best")
    assert found["method cmt"] == f"{trained:,} parameters to train"
    assert all(torch.allclose(tensor, after[name], atol=1e-6) for name, tensor in before.items())
    with pytest.raises(RecipeError, match=r"beside cmt\.path there is nothing to set"):
        load_recipe(values_of(world, cmt={"path": path, "memory_tokens": 2}))


def test_another_start_is_another_run(world, tmp_path):
    run(load_recipe(values_of(world, training={"max_steps": 1})), tmp_path / "first")
    path = tmp_path / "first" / "best"
    on = load_recipe(values_of(world, cmt={"path": str(path)}, training={"max_steps": 1}, output=str(tmp_path / "run")))
    train(on)
    train(on)
    (path / "cmt.safetensors").write_bytes((tmp_path / "run" / "best" / "cmt.safetensors").read_bytes())
    with pytest.raises(RecipeError, match="holds another run: memory differ"):
        train(on)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"data": "x.jsonl"}}, r"cmt learns to read.*\(the column with what each question is about\)\.$"),
        ({"train": {"data": "x", "text": "{t}"}}, "cmt learns from prompts.*for generative_adapter"),
        ({"cmt": {"memory_token": 3}}, "Did you mean 'memory_tokens'"),
        ({"cmt": {"distractor_warmup": 0.6}}, "distractor_warmup is 0.6"),
        ({"cmt": {"path": 3}}, r"cmt\.path is 3"),
        ({"peft": {"path": "somewhere"}}, "cmt has an adapter of its own"),
        ({"target": {"kind": "text_loss"}}, "for generation and completion_loss"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(world, changes, message):
    with pytest.raises(UsageError, match=message):
        load_recipe(values_of(world, **changes))


def test_adapters_that_a_compressor_cannot_have(world):
    settings = Settings(memory=CMTConfig(memory_tokens=2))
    for peft in (
        {"type": "adalora", "target_modules": ["q_proj"]},
        {"type": "prompt_tuning", "num_virtual_tokens": 2},
        {"type": "lora", "target_modules": ["nothing"]},
    ):
        recipe = load_recipe(values_of(world, peft=peft))
        with pytest.raises(UnsupportedModelError):
            get_method("cmt").build(load_base(recipe.base), recipe.adapter(), settings)


def test_gradient_checkpointing_changes_no_number(world, tmp_path):
    for on in (True, False):
        values = values_of(world, training={"gradient_checkpointing": on, "max_steps": 2})
        run(load_recipe(values), tmp_path / str(on))
    with_it, without = (weights(tmp_path / str(on)) for on in (True, False))
    for name, tensor in with_it.items():
        torch.testing.assert_close(tensor, without[name], atol=1e-4, rtol=1e-3)


def test_a_run_is_asked_and_scored_from_the_command_line(world, tmp_path, capsys):
    train(load_recipe(values_of(world, training={"max_steps": 1}, output=str(tmp_path / "run"))))
    capsys.readouterr()
    evaluate(tmp_path / "run", json=tmp_path / "scores.json")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    scored = json.loads((tmp_path / "scores.json").read_text())
    assert scored["asked"]["metrics"] == pytest.approx(results["runs"][0]["target"]["asked"])
    generate(tmp_path / "run", "a copy ?", max_new_tokens=3)
    assert "no bank is open here, so the base answers" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(UsageError, match="is a memory model"):
        generate(tmp_path / "run", "a copy ?", max_new_tokens=3, memory="original")
