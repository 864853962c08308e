"""A made-up but realistic `results.json`: several methods, seeds and sweeps, near and far tasks, curves, a lens."""

import json
from collections.abc import Callable
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from twinweave.compare.frontier import forgetting_by_family, frontier
from twinweave.evaluation import Task
from twinweave.methods import label_of

METRIC = "exact_match"
TASKS = {
    "reverse_words": ("target", None, "Write three words in reverse order."),
    "copy_words": ("retained", "near", "Write three words as they are."),
    "letter_after": ("retained", "near", "Name the letter after a letter."),
    "born_in": ("retained", "far", "Where was this person born?"),
    "works_as": ("retained", "far", "What does this person do?"),
    "lives_in": ("retained", "far", "Where does this person live?"),
    "friend_of": ("retained", "far", "Who is a friend of this person?"),
}
# method: label, target score, share kept of near and of far tasks
METHODS = {
    "peft": ("LoRA", 0.985, 0.07, 0.71),
    "imsm": ("IMSM", 0.987, 0.42, 0.93),
    "imsm_gate": ("IMSM, gate without query", 0.979, 0.30, 0.88),
    "imsm_average": ("IMSM, 1:1 average", 0.94, 0.21, 0.80),
}
SWEEPS = {
    "peft_scaled": ("LoRA × λ", "scale", [0.25, 0.5, 0.75, 1.0]),
    "imsm_retention": ("IMSM, dial", "retention", [-1.0, 0.0, 1.0, 2.0, 4.0]),
}
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


def build_results(
    seeds: int = 3, sweeps: bool = True, lens: bool = True, small: bool = False, noise: float = 0.012
) -> dict[str, Any]:
    """The contents of a `results.json`, the same for the same arguments; `small` has the first two methods only."""
    random = np.random.default_rng(7)
    methods = list(METHODS)[: 2 if small else None]
    runs = [_run(m, s, {}, *METHODS[m][1:], random, noise) for m in methods for s in range(seeds)]
    for method, (_, key, values) in SWEEPS.items() if sweeps else ():
        for value in values:
            point = _sweep_point(key, value)
            runs += [_run(method, s, {key: value}, *point, random, noise) for s in range(seeds)]
    results = {
        "schema": 1,
        "name": "pocket-reverse",
        "base": {
            "name": "twinweave/pocket",
            "fingerprint": "5d1f0e7c9a3b",
            "scores": {name: {METRIC: 0.0 if role == "target" else 0.995} for name, (role, _, _) in TASKS.items()},
            "target_score": 0.0,
            "retained_score": 0.995,
        },
        "tasks": {
            name: {
                "role": role,
                "family": family,
                "kind": "generation",
                "metric": METRIC,
                "higher_is_better": True,
                "unit": "fraction",
                "count": 200,
                "description": description,
            }
            for name, (role, family, description) in TASKS.items()
        },
        "runs": runs,
        "summary": summarise(runs),
        "comparisons": [compare(runs, m, "peft") for m in methods if m != "peft"],
        "lens": _lens() if lens else [],
        "recipe": {
            "name": "pocket-reverse",
            "base": "pocket",
            "target": "reverse_words",
            "retained": [name for name, (role, _, _) in TASKS.items() if role == "retained"],
            "methods": [*methods, *SWEEPS],
            "seeds": list(range(seeds)),
            "peft": {"type": "lora", "r": 16, "alpha": 16, "target_modules": "all-linear"},
            "training": {"steps": 800, "batch_size": 32, "learning_rate": 0.002, "gate_learning_rate": 0.01},
        },
        "provenance": {
            "command": "twinweave compare recipes/pocket/reverse.yaml seeds=3",
            "versions": {"twinweave": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
            "device": "cpu, 2 threads",
            "date": "2026-11-21T10:47:00+00:00",
        },
    }
    return _without_tasks(results, ["letter_after", "works_as", "lives_in", "friend_of"]) if small else results


def _without_tasks(results: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The same results with some retained tasks never measured."""
    for name in names:
        del results["tasks"][name]
        for run in results["runs"]:
            del run["retained"][name]
    return results


def summarise(runs: list[dict[str, Any]], labels: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """Means and t intervals over seeds, one entry per method and setting."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["method"], *run["setting"].items()), []).append(run)
    labels = labels or {name: entry[0] for name, entry in (METHODS | SWEEPS).items()}
    summary = []
    for (method, *setting), group in groups.items():
        entry = {"method": method, "setting": dict(setting), "label": labels[method], "seeds": len(group)}
        for name, score in (("target", "target_score"), ("forgetting", "forgetting")):
            mean, ci = mean_and_ci([run[score] for run in group])
            entry |= {f"{name}_mean": mean, f"{name}_ci95": ci}
        summary.append(entry)
    return summary


def compare(runs: list[dict[str, Any]], method: str, against: str) -> dict[str, Any]:
    """The paired differences of two methods over their seeds."""
    mine, theirs = ([r for r in runs if r["method"] == name and not r["setting"]] for name in (method, against))
    entry: dict[str, Any] = {"method": method, "against": against, "seeds": len(mine)}
    for name, score in (("target", "target_score"), ("forgetting", "forgetting")):
        mean, ci = mean_and_ci([a[score] - b[score] for a, b in zip(mine, theirs, strict=True)])
        entry[f"{name}_difference"] = {"mean": mean, "ci95": ci}
    return entry


def mean_and_ci(values: list[float]) -> tuple[float, list[float] | None]:
    mean = fmean(values)
    if len(values) < 2:
        return mean, None
    reach = T_95[len(values)] * stdev(values) / len(values) ** 0.5
    return mean, [mean - reach, mean + reach]


def _sweep_point(key: str, value: float) -> tuple[float, float, float]:
    """Target, near and far share along a sweep."""
    if key == "scale":
        return 0.985 * value**0.4, 1 - 0.93 * value**1.6, 1 - 0.29 * value**2
    return 0.99 - 0.012 * max(value, 0) ** 1.9, min(0.42 + 0.13 * value, 0.97), min(0.93 + 0.03 * value, 0.995)


def _run(
    method: str,
    seed: int,
    setting: dict[str, float],
    target: float,
    near: float,
    far: float,
    random: np.random.Generator,
    noise: float,
) -> dict[str, Any]:
    def jitter(mean: float) -> float:
        return float(np.clip(mean + noise * random.standard_normal(), 0, 1))

    scores = {n: jitter(near if f == "near" else far) for n, (role, f, _) in TASKS.items() if role == "retained"}
    reached = jitter(target)
    retained = fmean(scores.values())
    trained = not setting
    return {
        "method": method,
        "peft": "lora",
        "seed": seed,
        "setting": setting,
        "target": {"reverse_words": {METRIC: reached, "token_f1": min(reached + 0.004, 1.0)}},
        "retained": {name: {METRIC: score} for name, score in scores.items()},
        "target_score": reached,
        "retained_score": retained,
        "forgetting": 0.995 - retained,
        "train_seconds": 41.3 * (1.4 if "imsm" in method else 1.0) if trained else 0.0,
        "tokens_per_second": 15321.0 / (1.4 if "imsm" in method else 1.0) if trained else 0.0,
        "peak_memory_bytes": 412 * 2**20,
        "trainable_parameters": 167_936 + (10_240 if "imsm" in method else 0),
        "curve": _curve(random) if trained else {"train": [], "validation": []},
    }


def _curve(random: np.random.Generator) -> dict[str, list[list[float]]]:
    train = [[s, 3.1 * 0.5 ** (s / 90) + 0.05 + 0.03 * abs(random.standard_normal())] for s in range(0, 801, 20)]
    validation = [[s, 3.0 * 0.5 ** (s / 100) + 0.08 + 0.01 * random.standard_normal()] for s in range(0, 801, 100)]
    return {"train": train, "validation": validation}


def _lens() -> list[dict[str, Any]]:
    def example(task: str, prompt: str, words: str, shares: list[float]) -> dict[str, Any]:
        tokens = [{"text": f" {w}", "original_share": s} for w, s in zip(words.split(), shares, strict=True)]
        return {"method": "imsm", "seed": 0, "task": task, "prompt": prompt, "reference": words, "tokens": tokens}

    return [
        example(
            "born_in", "Where was Mira Solberg born ?", "Mira was born in Teldahl .", [0.8, 0.93, 0.97, 1, 0.88, 0.7]
        ),
        example("reverse_words", "reverse : lamp river stone", "stone river lamp", [0.04, 0.11, 0.27]),
        example("copy_words", "copy : lamp river stone", "lamp river stone", [0.55, 0.46, 0.38]),
    ]


@pytest.fixture
def make_results() -> Callable[..., dict[str, Any]]:
    """The builder, as a fixture, since tests folders are no packages."""
    return build_results


# method: knob, its values, then per value: target, near and far forgetting
WIDE: dict[str, tuple[str | None, list[tuple[float | None, float, float, float]]]] = {
    "peft": (None, [(None, 0.985, 0.31, 0.052)]),
    "imsm": (None, [(None, 0.991, 0.012, 0.002)]),
    "peft_scaled": ("scale", [(0.25, 0.32, 0.04, 0.004), (0.5, 0.71, 0.12, 0.011), (0.75, 0.93, 0.21, 0.029)]),
    "peft_rate": ("rate", [(0.1, 0.66, 0.12, 0.01), (0.3, 0.93, 0.2, 0.02)]),
    "peft_steps": ("steps", [(0.1, 0.52, 0.17, 0.02), (0.3, 0.9, 0.24, 0.03)]),
    "peft_rehearsal": ("rehearsal_weight", [(1.0, 0.984, 0.045, 0.006), (4.0, 0.95, 0.021, 0.003)]),
    "peft_replay": ("replay_weight", [(0.3, 0.98, 0.11, 0.02), (1.0, 0.96, 0.08, 0.012)]),
    "imsm_published": (None, [(None, 0.987, 0.24, 0.041)]),
    "imsm_gate": (None, [(None, 0.984, 0.26, 0.045)]),
    "imsm_average": (None, [(None, 0.91, 0.2, 0.033)]),
    "imsm_retention": ("retention", [(1.0, 0.989, 0.009, 0.001), (2.0, 0.982, 0.006, 0.0), (3.0, 0.96, 0.002, 0.0)]),
    "imsm_published_retention": ("retention", [(1.0, 0.98, 0.18, 0.02), (2.0, 0.95, 0.12, 0.012)]),
}


def build_wide(seeds: int = 5, methods: int = 12, losses: bool = False) -> dict[str, Any]:
    """Results with a frontier: up to twelve methods, their knobs swept, the frontier put together as a run does it."""
    results = build_results(seeds=1, sweeps=False, lens=False)
    random = np.random.default_rng(3)
    chosen = list(WIDE.items())[:methods]
    if losses:
        results = json.loads(json.dumps(results).replace(f'"{METRIC}"', '"loss"'))
        for task in results["tasks"].values():
            task.update(unit="nats", higher_is_better=False, kind="text_loss", metric="loss")
        results["base"] |= {"target_score": 4.6, "retained_score": -0.995}
    metric, sign = ("loss", -1) if losses else (METRIC, 1)
    tasks = [_task(name, entry) for name, entry in results["tasks"].items()]
    recipe = SimpleNamespace(target=tasks[0], retained=tasks[1:], peft_type="lora")
    runs = []
    for name, (knob, points) in chosen:
        for value, target, near, far in points:
            for seed in range(seeds):
                grown = 1 + 0.12 * random.standard_normal()
                lost = {task.name: grown * (near if task.family == "near" else far) for task in tasks[1:]}
                reached = target + 0.003 * random.standard_normal()
                runs.append(
                    {
                        "method": name,
                        "peft": "lora",
                        "seed": seed,
                        "setting": {} if value is None else {knob: value},
                        "target_score": 4.6 - reached if losses else reached,
                        "retained": {name: {metric: 0.995 - sign * amount} for name, amount in lost.items()},
                        "forgetting": fmean(lost.values()),
                    }
                )
    for run in runs:
        run["target"] = {tasks[0].name: {metric: run["target_score"]}}
        run["forgetting_by_family"] = forgetting_by_family(recipe, results["base"], run)  # type: ignore[arg-type]
    found = frontier(recipe, results["base"], runs)  # type: ignore[arg-type]
    assert found is not None
    names = {name: label_of(name, "lora") for name in WIDE}
    return results | {"runs": runs, "summary": summarise(runs, names), "comparisons": [], "frontier": found}


def _task(name: str, entry: dict[str, Any]) -> Task:
    return Task(name=name, kind=entry["kind"], metrics=[entry["metric"]], data="none.jsonl", family=entry["family"])


@pytest.fixture
def make_wide() -> Callable[..., dict[str, Any]]:
    """The builder of results with a frontier."""
    return build_wide
