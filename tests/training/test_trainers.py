"""The tools people have: transformers' Trainer and pipeline, TRL with its defaults, a DeepSpeed configuration."""

import json

import datasets
import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from transformers import Trainer, TrainingArguments, pipeline
from transformers.integrations import deepspeed

import tiny_runs
from twinweave import IMSMModel
from twinweave.data import CompletionCollator
from twinweave.errors import RecipeError, TrainingError
from twinweave.methods import get_method
from twinweave.training import TwinweaveTrainer, fit, load_base, load_recipe, load_tokenizer, load_training_data

STEPS = 6


@pytest.fixture
def make_model(world):
    """The same model every time."""
    recipe = load_recipe(tiny_runs.recipe_values(world), ["peft.lora_dropout=0", "imsm.gate_dropout=0"])

    def make():
        torch.manual_seed(0)
        return get_method("imsm").build(load_base(recipe.base), recipe.peft_config(), recipe.settings())

    return make


@pytest.fixture
def rows(world):
    recipe = load_recipe(tiny_runs.recipe_values(world))
    return load_training_data(recipe, load_tokenizer(recipe.base), 0)


def settings(folder, **changes):
    common = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 0.02,
        "logging_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False, "seed": 0, "disable_tqdm": True,
        "remove_unused_columns": False, "label_names": ["labels"],
    }  # fmt: skip
    return common | changes


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_trains_evaluates_and_brings_back_the_best(make_model, rows, tmp_path):
    arguments = TrainingArguments(
        **settings(tmp_path / "plain", eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True)
    )
    trainer = Trainer(
        model=make_model(),
        args=arguments,
        train_dataset=rows.train,
        eval_dataset=rows.validation,
        data_collator=CompletionCollator(tiny_runs.word_tokenizer()),
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    best = min(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert abs(trainer.evaluate()["eval_loss"] - best) < 1e-5
    logits = trainer.predict(rows.validation).predictions
    assert logits.shape[0] == len(rows.validation)
    assert logits.shape[-1] == len(tiny_runs.VOCABULARY)
    trainer.save_model(tmp_path / "saved")
    again = IMSMModel.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(again.gate.parameters(), trainer.model.gate.parameters(), strict=True))


def test_pipeline_says_what_generate_says(make_model, caplog):
    model, tokenizer = make_model().eval(), tiny_runs.word_tokenizer()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    prompts = ["reverse a b c :", "copy d"]
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    written = writer(prompts, max_new_tokens=5, do_sample=False, return_full_text=False)
    assert "not supported" not in caplog.text
    for prompt, found in zip(prompts, written, strict=True):
        batch = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**batch, max_new_tokens=5, do_sample=False)[0, batch["input_ids"].shape[1] :]
        assert found[0]["generated_text"].split() == tokenizer.decode(ids, skip_special_tokens=True).split()


def test_trl_with_its_defaults_has_the_losses_of_our_own_trainer(make_model, tmp_path):
    trl = pytest.importorskip("trl")
    words = [tiny_runs.letters(i, 2 + i % 3) for i in range(24)]
    examples = [{"prompt": f"reverse {' '.join(w)} :", "completion": " " + " ".join(reversed(w))} for w in words]
    changed = settings(tmp_path / "trl", save_strategy="no")
    for name in ("remove_unused_columns", "label_names"):  # TRL's own defaults, but for what makes the run small
        del changed[name]
    theirs = trl.SFTTrainer(
        model=make_model(),
        args=trl.SFTConfig(**changed),
        train_dataset=datasets.Dataset.from_list(examples),
        processing_class=tiny_runs.word_tokenizer(),
    )
    theirs.train()
    ours = TwinweaveTrainer(
        model=make_model(),
        args=TrainingArguments(**settings(tmp_path / "ours", save_strategy="no")),
        train_dataset=theirs.train_dataset.select_columns(["input_ids", "labels"]),
        data_collator=CompletionCollator(tiny_runs.word_tokenizer()),
    )
    ours.train_or_resume()
    assert len(losses(theirs)) == STEPS
    torch.testing.assert_close(torch.tensor(losses(theirs)), torch.tensor(losses(ours)), rtol=0, atol=1e-4)
    for one, other in zip(theirs.model.gate.parameters(), ours.model.gate.parameters(), strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


ZERO = {
    "zero_optimization": {
        "stage": 3,
        "stage3_prefetch_bucket_size": "auto",
        "reduce_bucket_size": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
}


def test_a_deepspeed_configuration_is_filled_in_from_model_and_arguments(make_model, tmp_path, monkeypatch):
    monkeypatch.setattr(deepspeed, "dep_version_check", lambda package: None)

    class Config(deepspeed.HfTrainerDeepSpeedConfig, HfDeepSpeedConfig):
        """What the class is where deepspeed is installed."""

    model, arguments = make_model(), TrainingArguments(**settings(tmp_path))
    config = Config(ZERO)
    deepspeed.unset_hf_deepspeed_config()  # models made from here on would be sharded at once
    config.trainer_config_process(arguments)
    config.trainer_config_finalize(arguments, model, STEPS)
    assert "auto" not in json.dumps(config.config)
    assert config.config["zero_optimization"]["reduce_bucket_size"] == 32 * 32


def test_a_recipe_with_deepspeed(world, rows):
    (world / "zero.json").write_text(json.dumps(ZERO))
    with pytest.raises(RecipeError, match="no readable JSON"):
        load_recipe(tiny_runs.recipe_values(world), ["training.deepspeed=nowhere.json"])
    recipe = load_recipe(tiny_runs.recipe_values(world), ["training.deepspeed=zero.json"])
    if not deepspeed.is_deepspeed_available():
        with pytest.raises(TrainingError, match="pip install deepspeed"):
            fit(recipe, get_method("imsm"), 0, rows, load_tokenizer(recipe.base), world / "run")
