"""What training changes and what it leaves, and that its settings mean what they say."""

import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import tiny_runs
from twinweave.data import CompletionCollator
from twinweave.errors import TrainingError
from twinweave.fingerprint import fingerprint
from twinweave.methods import get_method, load_plain
from twinweave.training import TwinweaveTrainer, load_base, load_recipe, load_tokenizer, load_training_data
from twinweave.training import fit as fit_function
from twinweave.training import trainer as trainer_module

CONSTANT = ["training.scheduler=constant", "training.warmup=0"]
NO_DROPOUT = ["peft.lora_dropout=0", "imsm.gate_dropout=0"]


def run(world, method="imsm", folder="run", overrides=(), **options):
    """One fit; returns what it measured. The model is in `folder`."""
    recipe = load_recipe(tiny_runs.recipe_values(world), overrides)
    tokenizer = load_tokenizer(recipe.base)
    data = load_training_data(recipe, tokenizer, 0)
    return fit_function(recipe, get_method(method), 0, data, tokenizer, world / folder, **options)


@pytest.fixture
def made(monkeypatch):
    """Every trainer that a fit makes."""
    trainers = []
    own = trainer_module.TwinweaveTrainer.__init__

    def remember(self, *args, **kwargs):
        own(self, *args, **kwargs)
        trainers.append(self)

    monkeypatch.setattr(trainer_module.TwinweaveTrainer, "__init__", remember)
    return trainers


def losses(training, kind="train"):
    return torch.tensor([loss for _, loss in training.curve[kind]])


def steps(training, kind):
    return [step for step, _ in training.curve[kind]]


def test_only_adapter_and_gate_change_and_the_gate_has_its_own_rate(world, made, monkeypatch):
    before = {}

    def remember_weights(self):
        before.update({name: p.detach().clone() for name, p in self.model.named_parameters()})
        own_rates = [(g["lr"], [id(p) for p in g["params"]]) for g in self.create_optimizer().param_groups]
        before["rates"] = {i: rate for rate, ids in own_rates for i in ids}
        train(self)

    train = TwinweaveTrainer.train_or_resume
    monkeypatch.setattr(TwinweaveTrainer, "train_or_resume", remember_weights)
    training = run(world)
    model = made[0].model
    named = dict(model.named_parameters())
    rates = before.pop("rates")
    changed = {name for name, p in named.items() if not torch.equal(p, before[name])}
    trained = {name for name, p in named.items() if p.requires_grad}
    assert changed == trained
    assert all(name.startswith("gate.") or "lora_" in name for name in trained)
    assert {rates[id(named[name])] for name in trained if name.startswith("gate.")} == {2e-2}
    assert {rates[id(named[name])] for name in trained if "lora_" in name} == {1e-2}
    assert len(rates) == len(trained)  # each parameter once, no other at all
    base = load_base(load_recipe(tiny_runs.recipe_values(world)).base)
    assert fingerprint(model.unload()) == fingerprint(base)
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, dict(model.get_base_model().named_parameters())[name]), name
    assert losses(training)[-1] < losses(training)[0]
    assert training.trainable_parameters == sum(named[name].numel() for name in trained)


def test_rates_follow_the_schedule_together(world, made):
    run(world, overrides=CONSTANT)
    groups = [g["lr"] for g in made[0].optimizer.param_groups if g["params"]]
    assert sorted(groups) == [1e-2, 2e-2]
    made.clear()
    run(world, folder="cosine", overrides=["training.scheduler=linear", "training.warmup=0"])
    assert all(g["lr"] == 0 for g in made[0].optimizer.param_groups)


def test_validation_each_epoch_and_each_n_steps(world):
    epochs = run(world)
    assert (epochs.steps, steps(epochs, "validation")) == (12, [4, 8, 12])
    assert steps(epochs, "train") == [3, 4, 6, 8, 9, 12]  # every third, and with each checkpoint
    each = run(world, folder="each", overrides=["training.evaluate_every=5"])
    assert steps(each, "validation") == [5, 10, 12]  # the end counts too
    rare = run(world, folder="rare", overrides=["training.evaluate_every=100", "training.max_steps=3"])
    assert (rare.steps, steps(rare, "validation"), rare.best_step) == (3, [3], 3)


def test_best_is_the_checkpoint_with_the_lowest_validation_loss(world, made):
    """A rate that wrecks the model after a good start makes the best one an early one."""
    training = run(
        world,
        "peft",
        overrides=[
            "training.learning_rate=0.4",
            "training.evaluate_every=1",
            "training.scheduler=constant",
            "training.warmup=0",
        ],
    )
    curve = dict(training.curve["validation"])
    assert training.best_validation_loss == min(curve.values()) == curve[training.best_step]
    assert training.best_step != training.steps
    assert training.last_validation_loss == curve[training.steps]
    best, last = (load_file(world / "run" / name / "adapter_model.safetensors") for name in ("best", "last"))
    assert any(not torch.equal(best[name], last[name]) for name in best)
    # the folder called best gives the loss that the curve promises
    recipe = load_recipe(tiny_runs.recipe_values(world))
    model = load_plain(str(world / "run" / "best"), load_base(recipe.base)).eval()
    made[0].model = made[0].model_wrapped = model
    assert made[0].evaluate()["eval_loss"] == pytest.approx(training.best_validation_loss, abs=1e-6)


def test_accumulated_batches_give_the_curve_of_the_bigger_batch(world):
    data = tiny_runs.write_rows(
        world / "uneven.jsonl",  # completions of different lengths: a mean of means would differ
        [{"prompt": "copy a :", "completion": " ".join(tiny_runs.letters(i, 1 + i % 6))} for i in range(32)],
    )
    common = [*NO_DROPOUT, f"train.data={data}", "training.log_every=1", "training.max_steps=6"]
    for method in ("peft", "imsm"):
        big = run(world, method, f"{method}-big", [*common, "training.batch_size=8"])
        small = run(
            world, method, f"{method}-small", [*common, "training.batch_size=2", "training.gradient_accumulation=4"]
        )
        assert steps(big, "train") == steps(small, "train")
        assert torch.allclose(losses(big), losses(small), atol=2e-5)


@pytest.mark.parametrize("method", ["peft", "imsm"])
def test_gradient_checkpointing_changes_no_number(world, method):
    plain = run(world, method, "plain", ["training.log_every=1", *NO_DROPOUT])
    lean = run(world, method, "lean", ["training.log_every=1", "training.gradient_checkpointing=true", *NO_DROPOUT])
    assert torch.allclose(losses(plain), losses(lean), atol=1e-6)
    assert torch.allclose(losses(plain, "validation"), losses(lean, "validation"), atol=1e-6)


@pytest.mark.parametrize("overrides", [["training.precision=bf16"], ["base.dtype=bfloat16"]])
def test_bf16_runs(world, overrides):
    training = run(world, overrides=overrides)
    exact = run(world, folder="fp32")
    assert torch.allclose(losses(training), losses(exact), atol=0.1)
    assert not torch.equal(losses(training), losses(exact))


def test_adalora_prunes_its_ranks_and_what_is_saved_is_what_was_trained(world, made):
    adalora = "peft={type: adalora, init_r: 6, target_r: 2, target_modules: [q_proj, v_proj], lora_dropout: 0.1}"
    for method in ("peft", "imsm"):
        run(world, method, method, [adalora, "training.epochs=8"])
        kept = load_file(world / method / "last" / "adapter_model.safetensors")
        ranks = [t.shape[0] for name, t in kept.items() if name.endswith("lora_A")]
        assert len(ranks) == 4
        assert sum(ranks) == 2 * len(ranks)
        recipe = load_recipe(tiny_runs.recipe_values(world))
        loaded = get_method(method).load(str(world / method / "last"), load_base(recipe.base)).eval()
        ids = torch.randint(4, 20, (2, 9), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            trained = made[-1].model.eval()(input_ids=ids).logits
            assert torch.allclose(loaded(input_ids=ids).logits, trained, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "setting", "same"),
    [
        ("imsm_published_rate", {"gate_rate": 0.5}, ("imsm_published", "training.gate_learning_rate=1e-2")),
        ("peft_rate", {"rate": 0.5}, ("peft", "training.learning_rate=5e-3")),
        ("peft_steps", {"steps": 0.5}, ("peft", "training.max_steps=6")),
    ],
)
def test_a_knob_multiplies_what_the_recipe_says(world, method, setting, same):
    run(world, method, "knob", setting=setting)
    run(world, same[0], "said", [same[1]])
    for file in (world / "said" / "last").glob("*.safetensors"):
        said, found = load_file(file), load_file(world / "knob" / "last" / file.name)
        assert said.keys() == found.keys()
        assert all(torch.equal(said[name], found[name]) for name in said)


def test_the_gates_rate_falls_with_the_square_root_of_the_width(world, made):
    run(world, overrides=["training.gate_learning_rate=null"])
    gate = made[0].model.gate
    assert made[0]._own_learning_rates == {"gate.": pytest.approx(1e-3 * (4096 / gate.hidden_size) ** 0.5)}


def test_plain_trainer_trains_an_imsm_model_to_the_same_losses(world, tmp_path):
    overrides = [*NO_DROPOUT, "training.gate_learning_rate=0.01", "training.log_every=1", "training.weight_decay=0"]
    ours = run(world, overrides=overrides)
    recipe = load_recipe(tiny_runs.recipe_values(world), overrides)
    tokenizer = load_tokenizer(recipe.base)
    data = load_training_data(recipe, tokenizer, 0)
    torch.manual_seed(0)
    from transformers import set_seed

    set_seed(0)
    model = get_method("imsm").build(load_base(recipe.base), recipe.peft_config(), recipe.settings())
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "plain"),
        seed=0,
        num_train_epochs=3,
        per_device_train_batch_size=5,
        learning_rate=0.01,
        warmup_steps=1,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        weight_decay=0.0,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        remove_unused_columns=False,
    )
    plain = Trainer(model=model, args=arguments, train_dataset=data.train, data_collator=CompletionCollator(tokenizer))
    plain.train()
    found = torch.tensor([entry["loss"] for entry in plain.state.log_history if "loss" in entry])
    assert torch.allclose(found, losses(ours), atol=1e-4)


@pytest.mark.parametrize("method", ["peft", "imsm"])
def test_a_loss_that_is_no_number_stops_training_and_keeps_the_last_good_checkpoint(world, method, monkeypatch):
    """The loss of step 6 is poisoned; epochs end after steps 4, 8 and 12."""
    compute = TwinweaveTrainer.compute_loss

    def poisoned(self, *args, **kwargs):
        loss = compute(self, *args, **kwargs)
        return loss * math.nan if self.model.training and self.state.global_step == 5 else loss

    monkeypatch.setattr(TwinweaveTrainer, "compute_loss", poisoned)
    with pytest.raises(TrainingError, match=r"nan at step 6.*checkpoint-4.*learning_rate"):
        run(world, method)
    assert (world / "run" / "checkpoint-4" / "complete.json").is_file()
    assert not (world / "run" / "training.json").exists()
    monkeypatch.setattr(TwinweaveTrainer, "compute_loss", compute)
    resumed = run(world, method)  # the checkpoint is good: from it everything goes as if nothing had been
    untouched = run(world, method, "untouched")
    assert resumed.curve == untouched.curve


def test_weights_that_are_no_numbers_are_never_kept_as_a_checkpoint(world, monkeypatch):
    """Finite losses, but a gradient that is not: the weights are gone after step 8, which ends an epoch."""
    step = TwinweaveTrainer.training_step

    def poisoned(self, model, *args, **kwargs):
        loss = step(self, model, *args, **kwargs)
        if self.state.global_step == 7:
            next(p for p in model.parameters() if p.requires_grad).grad.fill_(math.nan)
        return loss

    monkeypatch.setattr(TwinweaveTrainer, "training_step", poisoned)
    with pytest.raises(TrainingError, match=r"validation loss is nan after step 8.*checkpoint-4"):
        run(world, "peft")
    assert [p.name for p in sorted((world / "run").glob("checkpoint-*"))] == ["checkpoint-4"]


def test_a_rate_that_is_far_too_high_is_an_error_and_not_a_result(world):
    with pytest.raises(TrainingError, match=r"(loss is (nan|inf)).*learning_rate"):
        run(
            world, "peft", overrides=["training.learning_rate=1e30", "training.warmup=0", "training.max_grad_norm=1e30"]
        )
    assert not (world / "run" / "training.json").exists()


def test_rows_longer_than_the_base_can_read_are_cut(world):
    """Learned positions end at the window: a longer row would be an index error far below."""
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tiny_runs.VOCABULARY), n_positions=16, n_embd=32, n_layer=1, n_head=2)
    ).save_pretrained(world / "gpt2")
    tiny_runs.word_tokenizer().save_pretrained(world / "gpt2")
    rows = [{"prompt": "copy " * 30 + " ".join(tiny_runs.letters(i)), "completion": "a b"} for i in range(6)]
    data = tiny_runs.write_rows(world / "long.jsonl", rows)
    overrides = [
        f"base={world / 'gpt2'}",
        f"train.data={data}",
        "peft.target_modules=all-linear",
        "train.max_length=512",
    ]
    assert run(world, "imsm", overrides=overrides).steps == 3
    recipe = load_recipe(tiny_runs.recipe_values(world), overrides)
    report = load_training_data(recipe, load_tokenizer(recipe.base), 0).report
    assert report.cut_rows == 6
    assert "longer than 16 tokens" in report.warnings[0]


def test_fit_of_a_finished_folder_reads_it(world):
    first = run(world)
    weights = world / "run" / "best" / "adapter_model.safetensors"
    before = weights.stat().st_mtime_ns
    assert run(world) == first
    assert weights.stat().st_mtime_ns == before
    assert sorted(p.name for p in (world / "run").iterdir()) == ["best", "last", "training.json"]
