"""SLIM in runs of the package's own trainer, in TRL's, and in the recipe."""

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import tiny_runs
from twinweave.compare import compare
from twinweave.compare.check import check_recipe
from twinweave.errors import RecipeError, TwinweaveError, UsageError
from twinweave.imsm import IMSMModel
from twinweave.methods import METHODS, Settings, get_method
from twinweave.slim import SlimConfig, get_slim_model
from twinweave.slim.router import Router
from twinweave.training import fit, load_base, load_recipe, load_rehearsal, load_tokenizer, load_training_data
from twinweave.training.trainer import TwinweaveTrainer

PEFT = {"type": "slim", "r": 2, "num_experts": 3, "num_clusters": 2, "cluster_rate": 0.2}
SLIM = {name: value for name, value in PEFT.items() if name != "type"}
TRAINED = [name for name, method in METHODS.items() if "slim" in name and method.build]


def recipe_of(world, *overrides, **changes):
    rehearsal = {"sequences": 20, "length": 16, "batch_size": 2}
    return load_recipe(tiny_runs.recipe_values(world, **{"slim": SLIM, "rehearsal": rehearsal} | changes), overrides)


def run(world, method, folder="run", *overrides, **changes):
    recipe = recipe_of(world, *overrides, **changes)
    tokenizer = load_tokenizer(recipe.base)
    data = load_training_data(recipe, tokenizer, 0)
    rehearses = get_method(method).rehearses != "never"
    rows = load_rehearsal(recipe, tokenizer, world / "written") if rehearses else None
    return fit(recipe, get_method(method), 0, data, tokenizer, world / folder, rehearsal=rows)


def weights(folder):
    return {f"{p.name}/{n}": t for p in sorted(folder.glob("*.safetensors")) for n, t in load_file(p).items()}


def test_an_interrupted_run_ends_with_the_same_weights_and_clusters(world, monkeypatch):
    short = ("training.epochs=2", "training.evaluate_every=3", "training.gradient_accumulation=1")
    settings = {"peft": PEFT, "slim": {}}
    whole = run(world, "peft", "whole", *short, **settings)
    training_step = TwinweaveTrainer.training_step

    def step_or_stop(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TwinweaveTrainer, "training_step", step_or_stop)
        with pytest.raises(KeyboardInterrupt):
            run(world, "peft", "resumed", *short, **settings)
    assert list((world / "resumed").glob("checkpoint-*"))
    resumed = run(world, "peft", "resumed", *short, **settings)
    assert resumed.curve == whole.curve
    for kind in ("best", "last"):
        expected, found = weights(world / "whole" / kind), weights(world / "resumed" / kind)
        assert found.keys() == expected.keys()
        assert sum("clusters" in name for name in found) == 12
        batches = {int(t) for n, t in expected.items() if n.endswith("batches")}
        assert batches == {whole.steps if kind == "last" else whole.best_step}
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", TRAINED)
def test_every_method_trains_and_loads(name, world):
    training = run(world, name, "run", "training.epochs=2", "training.learning_rate=0.1", slim=SLIM | {"l1_weight": 0})
    first, *_, last = (loss for _, loss in training.curve["train"])
    if name != "slim_published":  # by the maximum over channels nearly every token is far, and few learn anything
        assert last < first
    base = load_base(recipe_of(world).base)
    model = get_method(name).load(str(world / "run" / "last"), base)
    saved = weights(world / "run" / "last")
    assert any("slim_B" in n and t.any() for n, t in saved.items())
    yields = name not in ("slim_mixture", "slim_identity")
    assert {int(t) for n, t in saved.items() if n.endswith("batches")} == ({training.steps} if yields else set())
    assert isinstance(model, IMSMModel) is (name == "imsm_slim")
    config = model.peft_config["default"]
    assert config.r == 2
    assert (config.num_identity_experts == 0) is (name == "slim_mixture")
    assert (config.masking_ratio == 0) is (name in ("slim_mixture", "slim_identity", "slim_unmerged", "slim_unmasked"))
    assert config.yields is yields
    assert config.distance == ("max" if name == "slim_published" else "rms")


def test_they_are_compared_with_the_dial(world):
    results = compare(
        recipe_of(
            world, "methods=[slim, slim_yielding, imsm_slim]", "seeds=[0]", "training.epochs=1",
            sweeps={"yielding": [0.0, 50.0]},
        )
    )  # fmt: skip
    runs = {(r["method"], r["setting"]["yielding"] if r.get("setting") else None): r for r in results["runs"]}
    assert len(runs) == 4
    scores = {key: r["target_score"] for key, r in runs.items()}
    assert len(set(scores.values())) == 4


def test_the_dial_multiplies_what_was_trained(make_base, tokens, perturb):
    model = get_slim_model(make_base(), SlimConfig(**SLIM | {"yielding_strength": 2.0})).train()
    perturb(model)
    for seed in range(3):
        model(input_ids=tokens(2, 7, seed=seed))
    model.eval()
    apply = get_method("slim_yielding").dial.apply

    def output():
        with torch.no_grad():
            return model(input_ids=tokens(2, 7, seed=9)).logits

    before = output()
    with apply(model, 1.0):
        assert torch.equal(output(), before)
    with apply(model, 1e6):
        assert {m.strength for m in model.modules() if isinstance(m, Router)} == {2e6}
        assert not torch.equal(output(), before)
    with pytest.raises(ZeroDivisionError), apply(model, 0.0):
        raise ZeroDivisionError
    assert torch.equal(output(), before)


def test_the_recipes_section(world):
    recipe = recipe_of(world, slim={"num_experts": 2, "distance": "max"})
    settings = recipe.settings()
    assert dict(settings.slim) == {"num_experts": 2, "distance": "max"}
    model = get_method("slim").build(load_base(recipe.base), recipe.peft_config(), settings)
    config = model.peft_config["default"]
    assert (config.num_experts, config.distance, config.r) == (2, "max", 2)  # the adapter's rank of 4, divided
    assert recipe_of(world, "slim.top_k=1").settings().slim["top_k"] == 1
    large = get_method("slim").build(load_base(recipe.base), recipe.peft_config(), Settings())
    assert large.peft_config["default"].r == 1  # at least


@pytest.mark.parametrize(
    ("slim", "message"),
    [
        ({"expertz": 3}, r"slim\.expertz"),
        ({"num_expert": 3}, r"'slim.num_experts'"),
        ({"masking_ratio": 2}, r"masking_ratio is 2"),
        ({"top_k": 99}, r"top_k is 99"),
        ({"distance": "maxx"}, r"'max'"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_trained(world, slim, message):
    with pytest.raises(UsageError, match=message):
        recipe_of(world, slim=slim).settings()
    with pytest.raises(TwinweaveError, match=message):
        compare(recipe_of(world, "methods=[slim]", slim=slim))
    assert not (world / "run").exists()


def test_a_saved_adapter_is_no_start_for_it(world):
    get_slim_model(load_base(recipe_of(world).base), SlimConfig(**SLIM)).save_pretrained(world / "saved")
    saved = {"path": str(world / "saved")}
    with pytest.raises(RecipeError, match=r"peft\.path.*slim"):
        recipe_of(world, "methods=[slim]", peft=saved)
    training = run(world, "peft", "more", "training.epochs=1", "method=peft", "methods=[peft]", peft=saved)
    assert training.steps == 4


class KeepTerm(TrainerCallback):
    """The L1 term before each step."""

    def __init__(self):
        self.terms = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.terms.append(float(model.base_model.l1_loss().detach()))


def losses_of_trl(world, folder, **changes):
    trl = pytest.importorskip("trl")
    rows = [
        {"prompt": f"reverse {' '.join(words)} :", "completion": " " + " ".join(reversed(words))}
        for words in (tiny_runs.letters(i, 2 + i % 3) for i in range(12))
    ]
    arguments = trl.SFTConfig(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, learning_rate=0.02, logging_steps=1,
        gradient_accumulation_steps=2, gradient_checkpointing=False, report_to="none", save_strategy="no",
        use_cpu=True, bf16=False, seed=0, disable_tqdm=True,
    )  # fmt: skip
    torch.manual_seed(0)
    config = SlimConfig(**SLIM | {"masking_ratio": 0.0} | changes)
    keep = KeepTerm()
    trainer = trl.SFTTrainer(
        model=get_slim_model(load_base(recipe_of(world).base), config),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny_runs.word_tokenizer(),
        callbacks=[keep],
    )
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log], keep.terms, trainer


def test_trls_trainer_trains_it_and_its_loss_has_the_term(world, tmp_path):
    plain, _, _ = losses_of_trl(world, tmp_path / "plain", l1_weight=0.0)
    losses, terms, trainer = losses_of_trl(world, tmp_path / "term", l1_weight=1.0)
    assert len(losses) == len(plain) == 4
    assert plain[-1] < plain[0]
    assert terms[0] > 0.1
    assert losses[0] == pytest.approx(plain[0] + terms[0], abs=2e-3)  # of accumulated batches, once
    assert terms[-1] < terms[0]
    batches = {int(b) for n, b in trainer.model.state_dict().items() if n.endswith("batches")}
    assert batches == {8}


@pytest.mark.parametrize("asked", [("log_probs", "entropy"), ("log_probs", "entropy", "mean_logits", "is_top1")])
def test_log_probabilities_of_a_policy_are_left_as_they_are(asked, make_base, tokens):
    """As TRL's GRPO and DPO ask for them; there the term is the caller's, from `l1_loss`."""
    utils = pytest.importorskip("trl.trainer.utils")
    model, ids = get_slim_model(make_base(), SlimConfig(**SLIM)), tokens(2, 7)
    expected = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    utils.add_fused_lm_head(model.get_base_model(), outputs=asked)
    found = model.train()(input_ids=ids, labels=ids, fused_lm_head=True).log_probs  # B is zero: no masks
    torch.testing.assert_close(found, expected)


def test_rehearsal_settings_are_for_those_who_rehearse(world):
    assert get_method("slim_rehearsal").rehearses == "always"
    with pytest.raises(RecipeError, match="slim_rehearsal needs general text"):
        compare(recipe_of(world, "methods=[slim_rehearsal]", rehearsal=None))


def test_what_peft_writes_down_is_no_setting_of_slim(world):
    with pytest.raises(RecipeError, match="inference_mode"):
        recipe_of(world, slim={"inference_mode": True})


def test_slim_changes_an_adapter_that_is_slim_itself(world):
    recipe = recipe_of(world, peft=PEFT, slim={"top_k": 1, "num_identity_experts": 1})
    model = get_method("slim_mixture").build(load_base(recipe.base), recipe.adapter(), recipe.settings())
    config = model.peft_config["default"]
    assert (config.r, config.top_k, config.num_identity_experts) == (PEFT["r"], 1, 0)


def test_a_dial_that_does_not_fit_is_found_before_anything_is_trained(world):
    with pytest.raises(UsageError, match="peft_scaled"):
        check_recipe(recipe_of(world, "methods=[peft,peft_scaled]", peft=PEFT))
