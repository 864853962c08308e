"""Recipes: every key is checked before anything starts, and what is wrong is named with what would be right."""

from pathlib import Path

import pytest
import yaml

import tiny_runs
from twinweave.errors import UsageError
from twinweave.training import load_recipe

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def values():
    return tiny_runs.recipe_values(Path("w"))


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("trainin", "training"),
        ("base.revison", "base.revision"),
        ("train.promt", "train.prompt"),
        ("training.lerning_rate", "training.learning_rate"),
        ("training.gate_learning_rat", "training.gate_learning_rate"),
        ("evaluation.batchsize", "evaluation.batch_size"),
        ("target.metric", "metrics"),
        ("peft.lora_alpa", "lora_alpha"),
        ("imsm.gate_rnk", "gate_rank"),
    ],
)
def test_unknown_keys_are_errors_with_the_nearest_name(values, key, near):
    with pytest.raises(UsageError) as error:
        load_recipe(values, [f"{key}=1"])
    assert key.rsplit(".", 1)[-1] in str(error.value)
    assert f"Did you mean '{near}'" in str(error.value)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("method=ismm", ["'ismm'", "'imsm'"]),
        ("methods=[peft, imsn]", ["'imsn'", "'imsm'"]),
        ("target=gsm9k", ["'gsm9k'", "'gsm8k'"]),
        ("retained=[{task: wikitxt}]", ["'wikitxt'", "'wikitext'"]),
        ("peft.type=lorra", ["'lorra'", "'lora'"]),
        ("training.optimizer=adamw_torc", ["'adamw_torc'", "'adamw_torch'"]),
        ("training.scheduler=cosin", ["'cosin'", "'cosine'"]),
        ("methods=[imsm, peft_scaled]", ["peft_scaled", "add 'peft'"]),
        ("methods=[peft, imsm_retention]", ["imsm_retention", "add 'imsm'"]),
        ("method=peft_scaled", ["peft_scaled", "trains nothing"]),
        ("methods=[]", ["methods", "at least one"]),
        ("methods=[peft, peft]", ["methods", "different"]),
        ("seeds=[]", ["seeds", "at least one"]),
        ("seeds=[0, 1, 0]", ["seeds", "different"]),
        ("seeds=[-1]", ["seeds", "-1"]),
        ("seeds=3", ["seeds", "3"]),
        ("sweeps={scal: [1]}", ["sweeps.scal"]),
        ("sweeps.retention=[1, .inf]", ["sweeps.retention", "inf"]),
        ("sweeps.gate_rate=[-1]", ["sweeps.gate_rate", "-1"]),
        ("sweeps.scale=[0.5, 0.5]", ["sweeps.scale", "different"]),
        ("retained=[{task: wikitext, name: reverse, data: x}]", ["'reverse'", "another `name`"]),
        ("training.learning_rate=-1", ["training.learning_rate", "-1"]),
        ("training.learning_rate=fast", ["training.learning_rate", "fast"]),
        ("training.evaluate_every=0", ["training.evaluate_every", "0", "'epoch'"]),
        ("training.evaluate_every=often", ["training.evaluate_every", "often", "'epoch'"]),
        ("training.epochs=0", ["training.epochs"]),
        ("training.precision=fp8", ["training.precision", "fp8"]),
        ("base.dtype=int8", ["base.dtype", "int8"]),
        ("imsm.gate_rank=0", ["gate_rank", "0"]),
        ("peft={type: adalora, init_r: 4, total_step: 0}", ["peft", "total_step"]),
        ("training=", ["training"]),
        ("epochs", ["'epochs'", "key=value"]),
        ("=1", ["'=1'", "key=value"]),
        ("seeds.first=1", ["seeds", "no keys"]),
        ("name=[a", ["'name=[a'", "YAML"]),
    ],
)
def test_bad_values_are_named_with_the_fix(values, override, named):
    with pytest.raises(UsageError) as error:
        load_recipe(values, [override])
    assert all(part in str(error.value) for part in named), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["base", "train", "target"])
def test_a_missing_section_is_named(values, missing):
    del values[missing]
    with pytest.raises(UsageError, match=f"'{missing}' is missing"):
        load_recipe(values)


@pytest.mark.parametrize("text", ["base: [unclosed", "just a text", "- a\n- list", "", "a: b: c", "\ttab: 1"])
def test_a_broken_recipe_file_is_one_sentence(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"recipe\.yaml") as error:
        load_recipe(file)
    assert "\n" not in str(error.value)


def test_a_missing_recipe_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "no.yaml", tmp_path):
        with pytest.raises(UsageError, match=str(path)):
            load_recipe(path)


def test_overrides_have_the_types_of_yaml_and_reach_every_level(values):
    overrides = [
        "training.epochs=1.5",
        "training.learning_rate=1e-3",
        "peft.lora_dropout=1e-1",
        "seeds=[4, 5]",
        "base.revision=abc",
        "train.limit=7",
        "target.limit=3",
        "output=some=where",
        "training.gradient_checkpointing=true",
        "sweeps.scale=[0.1]",
    ]
    recipe = load_recipe(values | {"train": "rows.jsonl", "base": "org/name"}, overrides)
    assert (recipe.training.epochs, recipe.training.learning_rate, recipe.seeds) == (1.5, 1e-3, [4, 5])
    assert (recipe.base.name, recipe.base.revision) == ("org/name", "abc")
    assert (recipe.train.data, recipe.train.limit, recipe.target.limit) == ("rows.jsonl", 7, 3)
    assert recipe.output_dir == Path("some=where")
    assert recipe.training.gradient_checkpointing is True
    assert recipe.peft_config().lora_dropout == 0.1
    assert recipe.sweeps == {"scale": [0.1], "retention": [0.0, 2.0]}


def test_a_task_by_name_can_be_changed_by_an_override(values):
    recipe = load_recipe(values | {"target": "gsm8k"}, ["target.limit=5"])
    assert (recipe.target.name, recipe.target.limit) == ("gsm8k", 5)


def test_overrides_leave_the_mapping_they_change_alone(values):
    before = yaml.safe_dump(values)
    load_recipe(values, ["training.epochs=9", "peft.r=2", "base.revision=x"])
    assert yaml.safe_dump(values) == before


def test_every_peft_config_is_fresh(values):
    recipe = load_recipe(values)
    first = recipe.peft_config()
    first.target_modules.add("k_proj")
    first.r = 99
    assert recipe.peft_config().target_modules == {"q_proj", "v_proj"}
    assert recipe.peft_config().r == 4


def test_adalora_gets_its_schedule_from_the_steps_unless_the_recipe_says_otherwise(values):
    plain = load_recipe(values | {"peft": {"type": "adalora", "target_modules": ["q_proj"]}}).peft_config(200)
    assert (plain.total_step, plain.tinit, plain.tfinal) == (200, 20, 60)
    own = {"type": "adalora", "target_modules": ["q_proj"], "tinit": 5, "total_step": 100}
    config = load_recipe(values | {"peft": own}).peft_config(100)
    assert (config.total_step, config.tinit, config.tfinal) == (100, 5, 30)
    with pytest.raises(UsageError, match="total_step"):  # a prescribed start of pruning behind the end of training
        load_recipe(values | {"peft": own | {"tinit": 90}})


def test_a_recipe_survives_the_way_through_results_json(values):
    recipe = load_recipe(values)
    assert load_recipe(recipe.to_dict()) == recipe


@pytest.mark.parametrize("file", sorted(REPOSITORY.glob("recipes/**/*.y*ml")), ids=lambda p: p.stem)
def test_the_recipes_of_the_repository_are_valid(file, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    recipe = load_recipe(file)
    for task in (recipe.target, *recipe.retained):
        assert task.data, f"{file}: {task.name} has no data"


def test_a_key_that_is_given_twice_is_an_error(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("base: pocket\nslim: {r: 2}\nslim: {r: 4}\n")
    with pytest.raises(UsageError, match="'slim' is given twice"):
        load_recipe(file)


def test_a_section_may_be_merged_into_another(tmp_path):
    file = tmp_path / "recipe.yaml"
    task = "{name: one, kind: generation, data: rows.jsonl, max_new_tokens: 4}"
    file.write_text(f"base: pocket\ntrain: rows.jsonl\ntarget: &task {task}\nretained:\n  - <<: *task\n    name: two\n")
    recipe = load_recipe(file)
    assert [(t.name, t.max_new_tokens) for t in (recipe.target, *recipe.retained)] == [("one", 4), ("two", 4)]
