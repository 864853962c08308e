"""Training with rehearsal: what it changes, what it leaves alone, that it can be switched off and gone on with."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

import tiny_runs
from twinweave.compare import compare
from twinweave.data import CompletionCollator
from twinweave.errors import DataError, TwinweaveError
from twinweave.methods import get_method
from twinweave.rehearsal import RehearsalRows
from twinweave.training import (
    TwinweaveTrainer,
    fit,
    load_base,
    load_recipe,
    load_rehearsal,
    load_tokenizer,
    load_training_data,
)

REHEARSAL = {"sequences": 24, "length": 16, "batch_size": 3, "positions": 6}
STILL = ["peft.lora_dropout=0", "imsm.gate_dropout=0"]


def recipe_of(world, *overrides, **rehearsal):
    return load_recipe(tiny_runs.recipe_values(world, rehearsal=REHEARSAL | rehearsal), overrides)


def run(world, folder, method="imsm", overrides=(), general=True, setting=None, **rehearsal):
    """One fit; the measures and the trained weights."""
    recipe = recipe_of(world, *overrides, **rehearsal)
    tokenizer = load_tokenizer(recipe.base)
    data = load_training_data(recipe, tokenizer, 0)
    rows = load_rehearsal(recipe, tokenizer, world / f"written-{folder}") if general else None
    training = fit(recipe, get_method(method), 0, data, tokenizer, world / folder, rehearsal=rows, setting=setting)
    return training, weights_of(world / folder / "last")


def weights_of(path):
    return {k: v for file in sorted(path.glob("*.safetensors")) for k, v in load_file(file).items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_it_is_learned_and_can_be_left_out(world):
    published, plain = run(world, "plain", "imsm_published", general=False)
    _, off = run(world, "off", general=False)
    training, rehearsed = run(world, "rehearsed")
    assert equal(plain, off)
    assert published.steps == training.steps
    gate = [name for name in plain if name.startswith("w_")]
    assert len(gate) == 2
    assert all(not torch.equal(plain[name], rehearsed[name]) for name in gate)


def divergence(world, folder):
    from twinweave.imsm import IMSMModel

    recipe = recipe_of(world)
    general = load_rehearsal(recipe, load_tokenizer(recipe.base), world / "written-judge")
    model = IMSMModel.from_pretrained(str(world / folder / "last"), load_base(recipe.base))
    with torch.no_grad():
        return torch.stack([model(**general.batch(step, 7), rehearse="gate").loss for step in range(8)]).mean()


def test_the_divergence_becomes_smaller(world):
    """On rows of the same base, by either way to rehearse."""
    long = ["training.epochs=12", *STILL]
    run(world, "plain", general=False, overrides=long)
    run(world, "gate", overrides=long, adapter_weight=0.0)
    run(world, "both", overrides=long, adapter_weight=1.0)
    plain, gate, both = (divergence(world, name) for name in ("plain", "gate", "both"))
    assert gate < 0.8 * plain
    assert both < 0.8 * plain


def test_a_stopped_training_goes_on_to_the_same_weights(world, monkeypatch):
    _, whole = run(world, "whole")
    save = TwinweaveTrainer._save_checkpoint
    stopped = []

    def stop(self, *args, **kwargs):
        save(self, *args, **kwargs)
        if not stopped:
            stopped.append(1)
            raise KeyboardInterrupt

    monkeypatch.setattr(TwinweaveTrainer, "_save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        run(world, "stopped")
    monkeypatch.undo()
    _, resumed = run(world, "stopped")
    assert equal(whole, resumed)


def test_a_store_of_the_rehearsed_rows_changes_nothing_but_rounding(world):
    constant = ["training.scheduler=constant", "training.warmup=0", *STILL]
    _, without = run(world, "without", overrides=["training.frozen_store=off", *constant])
    _, stored = run(world, "stored", overrides=[f"training.frozen_store={world / 'kept'}", *constant])
    assert (world / "kept_rehearsal" / "manifest.json").is_file()
    for name, weights in without.items():
        torch.testing.assert_close(stored[name], weights, rtol=1e-3, atol=1e-5)
    run(world, "auto", overrides=[*constant, "training.epochs=20"])
    assert not any(path.name.startswith("frozen") for path in (world / "auto").iterdir())


def rehearsing_steps(monkeypatch):
    asked = []
    own = RehearsalRows.batch

    def remember(self, step, seed):
        batch = own(self, step, seed)
        asked.append((step, batch is not None))
        return batch

    monkeypatch.setattr(RehearsalRows, "batch", remember)
    return asked


def test_every_so_many_steps(world, monkeypatch):
    asked = rehearsing_steps(monkeypatch)
    run(world, "run", every=3)
    assert asked == [(step, step % 3 == 0) for step in range(12)]


def test_once_for_an_optimizer_step_whatever_the_accumulation(world, monkeypatch):
    asked = rehearsing_steps(monkeypatch)
    training, _ = run(world, "run", overrides=["training.gradient_accumulation=2", "training.batch_size=3"])
    assert asked == [(step, True) for step in range(training.steps)]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_term_has_its_weight_whatever_the_accumulation(world, accumulation):
    """The gradient of a step is that of the task's mean loss plus the term's, each with its own weight."""
    from twinweave.imsm import IMSMConfig
    from twinweave.methods import Settings

    recipe = recipe_of(world)
    tokenizer = load_tokenizer(recipe.base)
    data = load_training_data(recipe, tokenizer, 0)

    def gradients(term):
        torch.manual_seed(0)
        model = get_method("imsm").build(
            load_base(recipe.base), recipe.peft_config(), Settings(IMSMConfig(gate_rank=2))
        )
        arguments = TrainingArguments(
            output_dir=str(world / "trainer"), max_steps=1, per_device_train_batch_size=2, learning_rate=0.0,
            gradient_accumulation_steps=accumulation, use_cpu=True, report_to="none", save_strategy="no",
            remove_unused_columns=False, max_grad_norm=0.0,
        )  # fmt: skip
        kept = {}
        trainer = TwinweaveTrainer(
            model=model,
            args=arguments,
            train_dataset=data.train,
            data_collator=CompletionCollator(tokenizer),
            term=term,
        )

        class Keep(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                kept.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

        trainer.add_callback(Keep())
        trainer.train()
        return kept

    without = gradients(None)
    name = "gate.w_b"
    doubled = gradients(lambda model, inputs, outputs, step: 2.0 * dict(trainer_parameters(model))[name].sum())
    torch.testing.assert_close(doubled[name] - without[name], torch.full_like(without[name], 2.0), rtol=1e-4, atol=1e-5)


def trainer_parameters(model):
    return getattr(model, "module", model).named_parameters()


def test_the_log_tells_the_term_apart_and_validation_is_of_the_task_alone(world, monkeypatch):
    trainers = []
    train = TwinweaveTrainer.train_or_resume

    def remember(self):
        trainers.append(self)
        train(self)
        self._frozen_store, self._term = None, lambda *args: pytest.fail("asked in validation")
        self.evaluate()

    monkeypatch.setattr(TwinweaveTrainer, "train_or_resume", remember)
    run(world, "rehearsed")
    logs = trainers[0].state.log_history
    terms = [entry["term"] for entry in logs if "loss" in entry]
    assert len(terms) > 2
    assert terms[-1] > 0
    assert all("term" not in entry for entry in logs if "eval_loss" in entry)


def test_a_recipe_that_leaves_nothing_to_rehearse_is_refused(world):
    with pytest.raises(DataError, match="nothing to rehearse"):
        run(world, "run", sequences=0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"text": "nowhere.jsonl"}, "nowhere"),
        ({"sequences": 0}, "nothing to rehearse"),
        ({"chat": "on"}, "chat template"),
    ],
)
def test_a_rehearsal_that_cannot_be_is_said_before_anything_is_done(world, change, named):
    with pytest.raises(TwinweaveError, match=named):
        compare(recipe_of(world, "methods=[peft, imsm]", **change))
    assert not (world / "run").exists()
