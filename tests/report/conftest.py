"""A made-up but realistic `results.json`: several methods, seeds and sweeps, near and far tasks, curves, a lens."""

from collections.abc import Callable
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest

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


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means and t intervals over seeds, one entry per method and setting."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["method"], *run["setting"].items()), []).append(run)
    labels = {name: entry[0] for name, entry in (METHODS | SWEEPS).items()}
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
