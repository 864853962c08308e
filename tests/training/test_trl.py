"""TRL's SFTTrainer applies the head itself, in chunks, and never sees a whole model's logits: the weave is below it."""

import datasets
import pytest
import torch

import tiny_runs
from twinweave.methods import get_method
from twinweave.rehearsal import RehearsalSettings, self_rehearsal
from twinweave.training import TermTrainer, load_base, load_recipe

trl = pytest.importorskip("trl")


@pytest.fixture
def trainer(world, tmp_path):
    recipe = load_recipe(
        tiny_runs.recipe_values(world), ["peft.lora_dropout=0", "imsm.gate_dropout=0", "methods=[imsm]"]
    )
    model = get_method("imsm").build(load_base(recipe.base), recipe.peft_config(), recipe.settings())
    rows = [
        {"prompt": f"reverse {' '.join(words)} :", "completion": " " + " ".join(reversed(words))}
        for words in (tiny_runs.letters(i, 2 + i % 3) for i in range(12))
    ]
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "trl"), max_steps=6, per_device_train_batch_size=4, learning_rate=0.02,
        gradient_checkpointing=False, logging_steps=1, report_to="none", save_strategy="no", use_cpu=True, bf16=False,
        seed=0,
    )  # fmt: skip
    return trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny_runs.word_tokenizer(),
    )


def test_its_default_loss_trains_both_memories_to_the_loss_of_our_forward(trainer):
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    model = trainer.model
    assert model.gate.w_b.abs().max() > 0
    batch = next(iter(trainer.get_train_dataloader()))
    model.train()
    model.zero_grad()
    found = trainer.compute_loss(model, dict(batch))
    found.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    for options in ({}, {"logits_at_labels": True}):
        model.zero_grad()
        expected = model(**inputs, **options).loss
        expected.backward()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        for name, grad in grads.items():
            torch.testing.assert_close(dict(model.named_parameters())[name].grad, grad, rtol=1e-4, atol=1e-6)
    with model.use_memory("enhanced"):
        assert abs(model(**inputs).loss - found) > 1e-3


def test_rehearsal_goes_into_its_training(trainer, world):
    """`TermTrainer` before TRL's own; the term's gradient reaches the gate through TRL's way of computing its loss."""

    class RehearsingTrainer(TermTrainer, trl.SFTTrainer):
        pass

    settings = RehearsalSettings(sequences=8, length=12, positions=4)
    term = self_rehearsal(trainer.model, tiny_runs.word_tokenizer(), settings, steps=6, batch_size=2)
    rehearsing = RehearsingTrainer(
        model=trainer.model,
        args=trainer.args,
        train_dataset=trainer.train_dataset,
        processing_class=tiny_runs.word_tokenizer(),
        term=term,
    )
    before = [parameter.detach().clone() for parameter in trainer.model.gate.parameters()]
    rehearsing.train()
    logs = [entry for entry in rehearsing.state.log_history if "loss" in entry]
    assert len(logs) == 6
    assert all(entry["term"] > 0 for entry in logs)
    for old, new in zip(before, trainer.model.gate.parameters(), strict=True):
        assert new.isfinite().all()
        assert not torch.equal(old, new)
