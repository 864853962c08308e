"""results.json: its contract, its arithmetic, and what is kept, added or refused when a command is given again."""

import json
import math
from statistics import mean

import pytest
from scipy import stats

import tiny_runs
from twinweave.compare import compare, train
from twinweave.errors import RecipeError, UnsupportedModelError
from twinweave.training import load_recipe

NUMBER = (int, float)


def run(world, *overrides, command=compare):
    return command(load_recipe(tiny_runs.recipe_values(world), overrides))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """One comparison of two seeds, as its file says, and the folder it is in. Not to be changed."""
    world = tiny_runs.make_world(tmp_path_factory.mktemp("done"))
    run(world)
    return json.loads((world / "run" / "results.json").read_text()), world


def cell_files(world):
    return {p: p.stat().st_mtime_ns for p in (world / "run").rglob("*") if p.is_file() and p.name != "results.json"}


def check(value, shape, where="results"):
    """`value` has exactly the keys and types of `shape`: types, (several), [of each], {name: of each value}."""
    if isinstance(shape, dict) and list(shape) == [str]:
        assert isinstance(value, dict), where
        for key, part in value.items():
            check(part, shape[str], f"{where}.{key}")
    elif isinstance(shape, dict):
        assert isinstance(value, dict), where
        assert set(value) == set(shape), (where, set(value) ^ set(shape))
        for key in shape:
            check(value[key], shape[key], f"{where}.{key}")
    elif isinstance(shape, list):
        assert isinstance(value, list), where
        if len(shape) == 2:  # a pair
            assert len(value) == 2, where
        for i, part in enumerate(value):
            check(part, shape[min(i, len(shape) - 1)], f"{where}[{i}]")
    elif isinstance(shape, tuple) and None in shape and value is None:
        pass
    elif isinstance(shape, tuple) and any(isinstance(s, list | dict) for s in shape):
        check(value, next(s for s in shape if isinstance(s, list | dict)), where)
    else:
        kinds = tuple(s for s in shape if s is not None) if isinstance(shape, tuple) else (shape,)
        assert type(value) in kinds, (where, value)
        assert not isinstance(value, float) or math.isfinite(value), where


SCORES = {str: {str: NUMBER}}
INTERVAL = ([NUMBER, NUMBER], None)
DIFFERENCE = {"mean": NUMBER, "ci95": INTERVAL, "n": int}
AGAINST = {"difference": DIFFERENCE, "ratio": ({"value": NUMBER, "ci95": INTERVAL}, None)}
STATISTICS = (
    {
        "mean": NUMBER,
        "ci95": INTERVAL,
        "n": int,
        "against_reference": (AGAINST, None),
        "against_best": (AGAINST, None),
    },
    None,
)
AT_A_TARGET = ({"seeds": int, "reached": float, "all": STATISTICS, "near": STATISTICS, "far": STATISTICS}, None)
FRONTIER = {
    "reference": ({"method": str, "setting": {str: float}}, None),
    "best_baseline": (str, None),
    "tolerance": (float, None),
    "level": (float, None),
    "target": (float, None),
    "methods": [
        {
            "method": str,
            "label": str,
            "points": [
                {
                    "method": str,
                    "setting": {str: float},
                    "seeds": int,
                    "target_mean": NUMBER,
                    "gain_mean": NUMBER,
                    "gain_ci95": INTERVAL,
                    "forgetting_mean": NUMBER,
                    "forgetting_ci95": INTERVAL,
                    "forgetting_by_family": {"near": (float, None), "far": (float, None)},
                }
            ],
            "equal_target": AT_A_TARGET,
            "area": AT_A_TARGET,
        }
    ],
}
CONTRACT = {
    "schema": int,
    "name": str,
    "base": {"name": str, "fingerprint": str, "scores": SCORES, "target_score": NUMBER, "retained_score": NUMBER},
    "tasks": {
        str: {
            "role": str,
            "family": (str, None),
            "kind": str,
            "metric": str,
            "higher_is_better": bool,
            "unit": str,
            "count": int,
            "description": str,
        }
    },
    "runs": [
        {
            "method": str,
            "peft": str,
            "seed": int,
            "setting": {str: float},
            "target": SCORES,
            "retained": SCORES,
            "target_score": float,
            "retained_score": float,
            "forgetting": float,
            "forgetting_by_family": {"near": (float, None), "far": (float, None)},
            "train_seconds": float,
            "tokens_per_second": float,
            "peak_memory_bytes": int,
            "trainable_parameters": int,
            "curve": {"train": [[int, float]], "validation": [[int, float]]},
        }
    ],
    "summary": [
        {
            "method": str,
            "setting": {str: float},
            "label": str,
            "seeds": int,
            "target_mean": float,
            "target_ci95": INTERVAL,
            "forgetting_mean": float,
            "forgetting_ci95": INTERVAL,
        }
    ],
    "comparisons": [
        {
            "method": str,
            "setting": {str: float},
            "against": str,
            "seeds": int,
            "target_difference": DIFFERENCE,
            "forgetting_difference": DIFFERENCE,
        }
    ],
    "frontier": FRONTIER,
    "lens": [
        {
            "method": str,
            "seed": int,
            "task": str,
            "prompt": str,
            "reference": str,
            "tokens": [{"text": str, "original_share": float}],
        }
    ],
    "provenance": {"command": str, "versions": {str: str}, "device": str, "date": str},
}
TRAINED_ONLY = {"best_step", "best_validation_loss", "last_validation_loss"}


def test_the_contract_key_by_key(done):
    results, world = done
    recipe = results["recipe"]
    trimmed = {k: v for k, v in results.items() if k != "recipe"}
    trimmed["runs"] = [{k: v for k, v in r.items() if k not in TRAINED_ONLY} for r in results["runs"]]
    # pairs in curves are [int, float]: the shape of a list of lists of two
    check(trimmed, CONTRACT)
    assert results["schema"] == 1
    assert set(results["tasks"]) == {"reverse", "text", "pairs"}
    assert results["tasks"]["reverse"] | {"description": ""} == {
        "role": "target",
        "family": None,
        "kind": "completion_loss",
        "metric": "loss",
        "higher_is_better": False,
        "unit": "nats",
        "count": 6,
        "description": "",
    }
    assert [
        results["tasks"]["pairs"][k] for k in ("role", "family", "metric", "higher_is_better", "unit", "count")
    ] == [
        "retained",
        "near",
        "accuracy",
        True,
        "fraction",
        5,
    ]
    assert load_recipe(recipe) == load_recipe(tiny_runs.recipe_values(world))
    for entry in results["lens"]:
        assert entry["tokens"]
        assert all(0 <= token["original_share"] <= 1 for token in entry["tokens"])
        assert entry["method"] == "imsm"
        assert entry["seed"] == 0


def test_there_is_a_run_for_each_method_seed_and_setting(done):
    found = sorted((r["method"], r["seed"], tuple(r["setting"].items())) for r in done[0]["runs"])
    sweeps = {"peft_scaled": ("scale", (0.5, 1.0)), "imsm_retention": ("retention", (0.0, 2.0))}
    assert found == sorted(
        [(m, s, ()) for m in ("peft", "imsm") for s in (0, 1)]
        + [(m, s, ((knob, v),)) for m, (knob, values) in sweeps.items() for v in values for s in (0, 1)]
    )
    for run_ in done[0]["runs"]:
        trained = not run_["setting"]
        assert (run_["trainable_parameters"] > 0) is trained
        assert bool(run_["curve"]["train"]) is bool(run_["curve"]["validation"]) is trained
    gate = 5 * 32 * 2
    parameters = {r["method"]: r["trainable_parameters"] for r in done[0]["runs"] if not r["setting"]}
    assert parameters["imsm"] == parameters["peft"] + gate


def test_forgetting_recomputed_from_the_scores(done):
    results, _ = done
    base = results["base"]
    assert base["target_score"] == base["scores"]["reverse"]["loss"]
    assert base["retained_score"] == pytest.approx(
        (base["scores"]["pairs"]["accuracy"] - base["scores"]["text"]["loss"]) / 2
    )
    for r in results["runs"]:
        assert list(r["target"]) == ["reverse"]
        assert sorted(r["retained"]) == ["pairs", "text"]
        lost = base["scores"]["pairs"]["accuracy"] - r["retained"]["pairs"]["accuracy"]
        rise = r["retained"]["text"]["loss"] - base["scores"]["text"]["loss"]
        assert r["forgetting"] == pytest.approx((lost + rise) / 2, abs=1e-12)
        assert r["target_score"] == r["target"]["reverse"]["loss"]
    assert any(abs(r["forgetting"]) > 1e-3 for r in results["runs"])  # the numbers above are not all zero


def interval(values):
    half = stats.t.ppf(0.975, len(values) - 1) * (
        math.sqrt(sum((v - mean(values)) ** 2 for v in values) / (len(values) - 1)) / math.sqrt(len(values))
    )
    return [mean(values) - half, mean(values) + half]


def test_means_intervals_and_paired_differences_recomputed(done):
    results, _ = done

    def values(method, setting, key):
        chosen = [r for r in results["runs"] if r["method"] == method and r["setting"] == setting]
        return [r[key] for r in sorted(chosen, key=lambda r: r["seed"])]

    assert len(results["summary"]) == 6
    for line in results["summary"]:
        for key, name in (("target", "target_score"), ("forgetting", "forgetting")):
            of_seeds = values(line["method"], line["setting"], name)
            assert line[f"{key}_mean"] == pytest.approx(mean(of_seeds))
            assert line[f"{key}_ci95"] == pytest.approx(interval(of_seeds))
        assert line["seeds"] == 2
    assert {line["label"] for line in results["summary"]} == {"LoRA", "LoRA × λ", "IMSM", "IMSM, retention dial"}
    assert len(results["comparisons"]) == 5  # each but plain PEFT itself
    for line in results["comparisons"]:
        assert line["against"] == "peft"
        for key, name in (("target_difference", "target_score"), ("forgetting_difference", "forgetting")):
            pairs = zip(values(line["method"], line["setting"], name), values("peft", {}, name), strict=True)
            differences = [a - b for a, b in pairs]
            assert line[key]["mean"] == pytest.approx(mean(differences))
            assert line[key]["ci95"] == pytest.approx(interval(differences))


def test_a_dial_at_its_zero_is_the_undialled_method(done):
    by = {(r["method"], r["seed"], *r["setting"].values()): r for r in done[0]["runs"]}
    for seed in (0, 1):
        for dialled, plain in ((("peft_scaled", seed, 1.0), "peft"), (("imsm_retention", seed, 0.0), "imsm")):
            same, of = by[dialled], by[plain, seed]
            assert (same["target"], same["retained"]) == (of["target"], of["retained"])
        moved = by["peft_scaled", seed, 0.5]
        assert moved["target"] != by["peft", seed]["target"]
        assert by["imsm_retention", seed, 2.0]["target"] != by["imsm", seed]["target"]


def test_the_same_recipe_gives_the_same_results(done, world):
    again = tiny_runs.without_times(json.loads(json.dumps(run(world, "seeds=[1]", "methods=[peft, imsm]"))))
    first = tiny_runs.without_times(done[0])
    of_seed_1 = [r for r in first["runs"] if r["seed"] == 1 and not r["setting"]]
    assert again["runs"] == of_seed_1
    assert again["base"]["scores"] == first["base"]["scores"]
    assert [line["target_ci95"] for line in again["summary"]] == [None, None]
    assert again["comparisons"][0]["target_difference"]["ci95"] is None


def test_more_seeds_methods_and_settings_reuse_what_is_finished(world):
    run(world, "seeds=[0]", "methods=[peft]")
    before = cell_files(world)
    (world / "run" / "report.html").write_text("the user's own report stays too")
    more = ["methods=[peft, peft_scaled, imsm_average]", "sweeps={scale: [0.25]}"]
    results = run(world, "seeds=[2, 0]", *more)
    after = cell_files(world)
    assert {path: after[path] for path in before} == before
    assert sorted((r["method"], r["seed"]) for r in results["runs"]) == [
        (method, seed) for method in ("imsm_average", "peft", "peft_scaled") for seed in (0, 2)
    ]
    again = run(world, "seeds=[2, 0]", *more)
    assert {k: v for k, v in again.items() if k != "provenance"} == {
        k: v for k, v in results.items() if k != "provenance"
    }
    assert cell_files(world) == after | {}


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("training.learning_rate=0.5", "training"),
        ("peft.r=2", "peft"),
        ("train.limit=10", "train"),
        ("retained=[]", "retained"),
    ],
)
def test_another_recipe_in_the_same_folder_is_refused(done, override, named):
    _, world = done
    before = cell_files(world) | {world: (world / "run" / "results.json").read_bytes()}
    with pytest.raises(RecipeError, match=rf"holds another run: {named} differ.*output="):
        run(world, override)
    with pytest.raises(RecipeError, match=r"holds another run: command.* differ"):
        run(world, command=train)
    assert cell_files(world) | {world: (world / "run" / "results.json").read_bytes()} == before


def test_a_folder_with_something_else_in_it_is_refused(world):
    (world / "run").mkdir()
    (world / "run" / "thesis.tex").write_text("years of work")
    (world / "file").write_text("a file")
    for overrides in ([], [f"output={world / 'file'}"]):
        with pytest.raises(RecipeError, match=r"not a run of twinweave.*output="):
            run(world, *overrides)
    assert [p.name for p in (world / "run").iterdir()] == ["thesis.tex"]


def test_train_keeps_seeds_and_methods_apart(world):
    results = run(world, "seeds=[3]", "method=peft", command=train)
    assert [(r["method"], r["seed"]) for r in results["runs"]] == [("peft", 3)]
    assert results["comparisons"] == []
    for override in ("seeds=[4]", "method=imsm"):
        with pytest.raises(RecipeError, match="holds another run: command"):
            run(world, "seeds=[3]", "method=peft", override, command=train)


@pytest.mark.parametrize("command", [compare, train])
def test_without_retained_tasks_nothing_is_forgotten(world, command):
    results = run(world, "retained=[]", "seeds=[0]", "methods=[peft]", "method=peft", command=command)
    assert results["runs"][0]["forgetting"] == 0.0
    assert results["runs"][0]["retained"] == {}


@pytest.mark.parametrize(
    "overrides",
    [
        ["peft.target_modules=[no_such_layer]"],
        ["peft.r=0"],
        ["peft.r=four"],
        ["peft={type: prompt_tuning, num_virtual_tokens: 4}"],
        ["methods=[peft, imsm]", "peft.target_modules=[q_proj, lm_head]"],
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_before_anything_is_written(world, overrides):
    with pytest.raises(UnsupportedModelError):
        run(world, *overrides)
    assert not (world / "run").exists()


def test_scaling_an_adapter_without_a_scale_keeps_what_is_trained(world):
    ia3 = "peft={type: ia3, target_modules: [q_proj, down_proj], feedforward_modules: [down_proj]}"
    with pytest.raises(Exception, match="peft_scaled needs an adapter that adds a scaled delta"):
        run(world, ia3, "methods=[peft, peft_scaled]", "seeds=[0]")
    results = run(world, ia3, "methods=[peft]", "seeds=[0]")
    assert results["summary"][0]["label"] == "(IA)³"
