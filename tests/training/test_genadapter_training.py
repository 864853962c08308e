"""A generator of adapters is trained, stopped, gone on with, loaded and scored as any other method is."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny_runs
from twinweave.cli.shared import open_run
from twinweave.compare import check_recipe, compare, train
from twinweave.data import CompletionCollator, ContextCollator, SegmentCollator
from twinweave.errors import RecipeError, UsageError
from twinweave.genadapter import GenerativeAdapter, GenerativeAdapterConfig
from twinweave.methods import get_method
from twinweave.training import (
    TwinweaveTrainer,
    fit,
    load_base,
    load_recipe,
    load_tokenizer,
    load_training_data,
    reading_size,
)

SETTINGS = {"state_size": 8, "rank": 8, "chunk_size": 4, "scale": 0.5, "token_gate": True, "topic_key": True}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Contexts are lists of one or two documents; each question is after a word of one of them."""
    folder = tiny_runs.make_world(tmp_path_factory.mktemp("world"))
    rows = []
    for i in range(12):
        documents = [" ".join(tiny_runs.letters(10 * i + d, 5)) for d in range(1 + i % 2)]
        rows += [
            {"context": documents, "prompt": f"{documents[0][:1]} ?", "completion": documents[-1][at]} for at in (2, 4)
        ]
    tiny_runs.write_rows(folder / "contexts.jsonl", rows[:18])
    tiny_runs.write_rows(folder / "asked.jsonl", rows[18:])
    texts = [{"text": " ".join(tiny_runs.letters(500 + i, 4 + 3 * i))} for i in range(8)]
    tiny_runs.write_rows(folder / "texts.jsonl", texts)
    return folder


def values_of(world: Path, kind: str, **changes):
    rows = {"data": str(world / "contexts.jsonl"), "context": "context", "max_length": 24, "validation_fraction": 0.25}
    if kind == "text":
        rows = {"data": str(world / "texts.jsonl"), "text": "{text}", "segment_chunks": 3, "validation_fraction": 0.25}
    target = {"task": "completion_loss", "name": "asked", "data": str(world / "asked.jsonl"), "context": "context"}
    training = {"epochs": 3, "batch_size": 3, "learning_rate": 1e-2, "log_every": 1, "warmup": 0}
    return tiny_runs.recipe_values(
        world,
        train=rows,
        target=target,
        method="generative_adapter",
        methods=["generative_adapter"],
        generative_adapter=SETTINGS,
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
    return {name: load_file(folder / name / "generator.safetensors") for name in ("best", "last")}


def measured(training):
    return {
        k: v
        for k, v in asdict(training).items()
        if k not in ("train_seconds", "tokens_per_second", "peak_memory_bytes")
    }


@pytest.mark.parametrize("kind", ["contexts", "text"])
def test_a_stopped_training_ends_as_if_it_had_not_been(world, tmp_path, monkeypatch, kind):
    recipe = load_recipe(values_of(world, kind, training={"evaluate_every": 2, "gradient_accumulation": 2}))
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
    assert [p.name for p in (tmp_path / "stopped").glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / "stopped" / "training.json").exists()
    resumed = run(recipe, tmp_path / "stopped")
    assert measured(resumed) == measured(whole)
    assert whole.curve["train"][-1][1] < whole.curve["train"][0][1]
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert all(torch.equal(t, found[part][name]) for part, of_part in expected.items() for name, t in of_part.items())
    assert sorted(p.name for p in (tmp_path / "stopped" / "best").iterdir()) == [
        "generator.safetensors",
        "generator_config.json",
    ]


def test_what_is_rehearsed_reaches_the_generator(world, tmp_path):
    on = {"sequences": 6, "length": 8, "batch_size": 3, "weight": 10.0}
    for name, rehearsal in (("on", on), ("off", None)):
        values = values_of(world, "contexts", training={"max_steps": 3})
        train(load_recipe(values | {"rehearsal": rehearsal, "output": str(tmp_path / name)}))
    on, off = (weights(tmp_path / name)["last"] for name in ("on", "off"))
    assert not any(torch.equal(tensor, off[name]) for name, tensor in on.items() if name.endswith("output"))


def test_what_a_checkpoint_weighs_and_what_is_counted(world, tmp_path, monkeypatch):
    recipe = load_recipe(values_of(world, "contexts", training={"max_steps": 1, "batch_size": 100}))
    tokenizer = load_tokenizer(recipe.base)
    data = load_training_data(recipe, tokenizer, 0, reads=4)
    seen = []

    save = TwinweaveTrainer._save_checkpoint

    def watching(self, *args, **kwargs):
        save(self, *args, **kwargs)
        seen.append(({p.name for p in self.best_checkpoint().iterdir()}, self.tokens))

    monkeypatch.setattr(TwinweaveTrainer, "_save_checkpoint", watching)
    training = fit(recipe, get_method("generative_adapter"), 0, data, tokenizer, tmp_path / "run")
    [(files, tokens)] = seen
    assert {"generator.safetensors", "generator_config.json", "trained.safetensors"} <= files
    assert "model.safetensors" not in files  # the base stays where it is
    batch = ContextCollator(tokenizer)(list(data.train))
    assert tokens == int(batch["attention_mask"].sum() + batch["context_mask"].sum())
    per_layer = 32 + 4 * 8 * 32 + 32 * 8 + 33
    assert training.trainable_parameters == 2 * per_layer


def test_gradient_checkpointing_changes_no_number(world, tmp_path, monkeypatch):
    step, calls, again = TwinweaveTrainer.training_step, [], []

    def counting(self, model, *args, **kwargs):
        attention = self.accelerator.unwrap_model(model).base.model.layers[0].self_attn
        handle = attention.register_forward_pre_hook(lambda module, args: calls.append(module))
        calls.clear()
        loss = step(self, model, *args, **kwargs)
        handle.remove()
        again.append(len(calls))
        return loss

    monkeypatch.setattr(TwinweaveTrainer, "training_step", counting)
    rehearsal = {"sequences": 6, "length": 8, "batch_size": 3, "weight": 10.0}
    for on in (True, False):
        values = values_of(world, "text", training={"gradient_checkpointing": on, "max_steps": 4})
        train(load_recipe(values | {"rehearsal": rehearsal, "output": str(tmp_path / str(on))}))
    with_it, without = (weights(tmp_path / str(on))["last"] for on in (True, False))
    for name, tensor in with_it.items():
        torch.testing.assert_close(tensor, without[name], atol=1e-4, rtol=1e-3)
    half = len(again) // 2
    # one call more for the loss, and one for what is rehearsed
    assert [a - b for a, b in zip(again[:half], again[half:], strict=True)] == [2] * half


def test_prefixes_read_together_are_those_read_apart(world):
    recipe = load_recipe(values_of(world, "text"))
    tokenizer = load_tokenizer(recipe.base)
    data = load_training_data(recipe, tokenizer, 0, reads=4)
    torch.manual_seed(0)
    exact = GenerativeAdapterConfig(**SETTINGS | {"normalization": "frobenius"})  # the iteration grows rounding
    model = GenerativeAdapter(load_base(recipe.base), exact, tokenizer).eval()
    for generator in model.generators:
        torch.nn.init.normal_(generator.output, std=0.3)
    batch = SegmentCollator(tokenizer)(sorted(data.train, key=lambda row: -len(row["chunks"]))[:2])
    together = model(**batch).logits
    assert len(batch["reads"]) > 2
    moved = 0.0
    for state, read in enumerate(batch["reads"].bool()):
        rows = slice(2 * state, 2 * state + 2)
        own = {name: batch[name][rows] for name in ("input_ids", "attention_mask", "labels")}
        chunks = {name: batch[name][read] for name in ("context_ids", "context_mask")}
        apart = model(**own, **chunks, reads=torch.ones(1, int(read.sum()))).logits
        real = own["attention_mask"].bool()
        torch.testing.assert_close(together[rows][real], apart[real], rtol=1e-4, atol=1e-4)
        moved = max(moved, (model(**own).logits - apart)[real].abs().max().item())
    assert moved > 0.1


def test_a_generator_learns_on(world, tmp_path):
    first = load_recipe(values_of(world, "text"))
    run(first, tmp_path / "first")
    path = str(tmp_path / "first" / "best")
    on = load_recipe(values_of(world, "contexts", training={"learning_rate": 1e-8, "max_steps": 1}) | {
        "generative_adapter": {"path": path}
    })  # fmt: skip
    assert reading_size(on, get_method("generative_adapter")) == 4
    assert ("method generative_adapter", "2,690 parameters to train") in check_recipe(on)
    run(on, tmp_path / "second")
    before, after = (load_file(tmp_path / f / "best" / "generator.safetensors") for f in ("first", "second"))
    assert all(torch.allclose(tensor, after[name], atol=1e-6) for name, tensor in before.items())
    with pytest.raises(RecipeError, match=r"beside generative_adapter\.path there is nothing to set"):
        load_recipe(values_of(world, "text") | {"generative_adapter": {"path": path, "rank": 2}})


def test_a_target_that_nothing_is_read_for_is_warned_of(world, tmp_path):
    documents = str(tiny_runs.write_rows(tmp_path / "read.jsonl", [{"text": "a b"}]))
    values = values_of(world, "contexts")
    bare = {key: value for key, value in values["target"].items() if key != "context"}

    def warnings(**changes):
        found = check_recipe(load_recipe(values | changes))
        return [text for part, text in found if part == "warning" and "Nothing is read" in text]

    assert warnings() == warnings(target=bare, evaluation={"read": documents}) == []
    (warning,) = warnings(target=bare)
    assert "for task asked, so the score of generative_adapter is the base's. Give the task a `context`" in warning


def test_compared_with_a_method_that_has_it_in_the_prompt(world, tmp_path):
    documents = str(tiny_runs.write_rows(tmp_path / "read.jsonl", [{"text": "a b c d e f"}]))
    values = values_of(world, "contexts", output=str(tmp_path / "run")) | {
        "methods": ["peft", "generative_adapter"],
        "evaluation": {"read": documents},
    }
    results = compare(load_recipe(values))
    plain, generated = results["runs"]
    assert (plain["method"], generated["method"]) == ("peft", "generative_adapter")
    assert generated["target_score"] != results["base"]["target_score"]
    # scored with the adapter on for what was read, and without any if nothing was
    assert generated["retained"]["text"]["loss"] != results["base"]["scores"]["text"]["loss"]
    cell = tmp_path / "run" / "cells" / "generative_adapter-seed0"
    model, tokenizer, recipe = open_run(cell)
    assert isinstance(model, GenerativeAdapter)
    tiny = load_training_data(recipe, tokenizer, 0)
    assert set(CompletionCollator(tokenizer)([tiny.train[0]])) == {"input_ids", "attention_mask", "labels"}


def test_retained_tasks_are_the_base_where_nothing_was_read(world, tmp_path):
    results = train(load_recipe(values_of(world, "text", output=str(tmp_path / "run"))))
    assert results["runs"][0]["retained"] == {
        name: results["base"]["scores"][name] for name in results["runs"][0]["retained"]
    }
    model, _, _ = open_run(tmp_path / "run")
    assert isinstance(model, GenerativeAdapter)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"data": "x.jsonl"}}, "generative_adapter learns to read.*Give train.context"),
        ({"methods": ["peft", "generative_adapter"]}, "peft learns from prompts.*Set method: generative_adapter"),
        ({"method": "imsm"}, "imsm learns from prompts"),
        ({"train": {"data": "x", "text": "{t}", "context": "c"}}, "leave out context, prompt and completion, or text"),
        ({"generative_adapter": {"rnak": 3}}, "Did you mean 'rank'"),
        ({"generative_adapter": {"rank": 0}}, "rank is 0"),
        ({"generative_adapter": {"path": 3}}, "generative_adapter.path is 3"),
        ({"train": {"data": "x", "text": "{t}", "segment_chunks": 1}}, "segment_chunks.* is 1"),
        ({"target": {"name": "x", "kind": "text_loss", "context": "c"}}, "for generation and completion_loss"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(world, changes, message):
    with pytest.raises(UsageError, match=message):
        load_recipe(values_of(world, "text") | changes)


def test_text_alone_is_for_nobody_else(world):
    recipe = load_recipe(values_of(world, "text"))
    with pytest.raises(RecipeError, match=r"train\.text is for generative_adapter"):
        load_training_data(recipe, load_tokenizer(recipe.base), 0)
