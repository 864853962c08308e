"""Carrying out a recipe: score the base, train and score every cell, put the results together.

A cell is one method on one seed (at one setting of its dial). Finished cells are kept and never computed again, so the
same command goes on where a killed one stopped. Knows nothing about how results are shown.
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.markup import escape
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import TrainingData
from ..evaluation import Task, evaluate_tasks, read_lens
from ..files import write_json_atomic
from ..fingerprint import fingerprint
from ..imsm import IMSMModel
from ..methods import Method, get_method
from ..progress import say
from ..training import Recipe, fit, free_memory, load_base, load_tokenizer, load_training_data, remove_store
from .check import check_run
from .results import assemble, average_scores
from .store import RESULTS_NAME, RunFolder


def train(recipe: Recipe) -> dict[str, Any]:
    """Train the recipe's `method` on its first seed into its output folder; returns the results, also written there."""
    method, seed = get_method(recipe.method), recipe.seeds[0]
    run = RunFolder(recipe.output_dir, recipe, f"train {method.name}, seed {seed}")
    session = _Session(recipe, run, [method])
    cell = session.trained_cell(method, seed, run.path, "cell")
    return session.finish([cell])


def compare(recipe: Recipe) -> dict[str, Any]:
    """Train and score methods × seeds into the recipe's output folder; returns the results, also written there."""
    run = RunFolder(recipe.output_dir, recipe, "compare")
    methods = [get_method(name) for name in recipe.methods]
    session = _Session(recipe, run, methods)
    cells = []
    for seed in recipe.seeds:
        for method in (m for m in methods if m.dial is None):
            name = f"{method.name}-seed{seed}"
            cells.append(session.trained_cell(method, seed, run.path / "cells" / name, f"cells/{name}/cell"))
        for method in (m for m in methods if m.dial is not None):
            cells += session.dialled_cells(method, seed)
    return session.finish(cells)


class _Session:
    """What all cells of a run share: the tokenizer, the data, and the base's scores."""

    def __init__(self, recipe: Recipe, run: RunFolder, methods: Sequence[Method]) -> None:
        self.recipe, self.run = recipe, run
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(recipe.base)
        self.tasks: list[Task] = [recipe.target, *recipe.retained]
        self.frozen_folder = run.path / "frozen"  # shared by all IMSM methods and seeds, which have the same rows
        self._data: dict[int, TrainingData] = {}
        if not run.begun:  # what is wrong is said before time is spent and files are written
            check_run(recipe, methods, self._training_data(recipe.seeds[0]))
        self.base = run.part("base", self._score_base)

    def finish(self, cells: list[dict[str, Any]]) -> dict[str, Any]:
        results = assemble(self.recipe, self.base, cells)
        write_json_atomic(self.run.path / RESULTS_NAME, results)
        remove_store(self.frozen_folder)
        return results

    def trained_cell(self, method: Method, seed: int, folder: Path, part: str) -> dict[str, Any]:
        return self.run.part(part, partial(self._train_and_score, method, seed, folder))

    def dialled_cells(self, method: Method, seed: int) -> list[dict[str, Any]]:
        dial = method.dial
        assert dial is not None
        cells = []
        for value in self.recipe.sweeps.get(dial.knob, []):  # type: ignore[call-overload]
            part = f"cells/{method.name}-{dial.knob}={value!r}-seed{seed}"
            cells.append(self.run.part(part, partial(self._dial_and_score, method, seed, value)))
        return cells

    # --- the parts ------------------------------------------------------------------------------------------------

    def _score_base(self) -> dict[str, Any]:
        say(f"scoring the base {escape(self.recipe.base.name)} on {len(self.tasks)} tasks")
        base = load_base(self.recipe.base)
        scores = self._scores(base)
        facts = {"name": self.recipe.base.name, "fingerprint": str(fingerprint(base))}
        free_memory()
        by_task = scores["target"] | scores["retained"]
        counts = scores.pop("counts")
        return {**facts, "scores": by_task, "counts": counts, **average_scores(self.recipe, by_task)}

    def _train_and_score(self, method: Method, seed: int, folder: Path) -> dict[str, Any]:
        say(f"{method.label}, seed {seed}: training")
        data = self._training_data(seed)
        training = fit(self.recipe, method, seed, data, self.tokenizer, folder, self.frozen_folder)
        model = self._load(method, folder / "best")
        say(f"{method.label}, seed {seed}: scoring")
        record = self._record(method, seed, {}, model) | {k: v for k, v in asdict(training).items() if k != "steps"}
        first = seed == self.recipe.seeds[0]
        if isinstance(model, IMSMModel) and first and self.recipe.evaluation.lens_prompts:
            record["lens"] = read_lens(model, self.tokenizer, self.tasks, self.recipe.evaluation.lens_prompts)
        del model
        free_memory()
        return record

    def _dial_and_score(self, method: Method, seed: int, value: float) -> dict[str, Any]:
        dial = method.dial
        assert dial is not None
        say(f"{method.label}, {dial.knob} {value:g}, seed {seed}: scoring")
        model = self._load(method, self.run.path / "cells" / f"{dial.of}-seed{seed}" / "best")
        with dial.apply(model, value):
            record = self._record(method, seed, {dial.knob: value}, model)
        free_memory()
        return record

    def _record(self, method: Method, seed: int, setting: dict[str, float], model: Any) -> dict[str, Any]:
        scores = self._scores(model)
        by_task = scores["target"] | scores["retained"]
        averages = average_scores(self.recipe, by_task)
        return {
            "method": method.name,
            "peft": self.recipe.peft_type,
            "seed": seed,
            "setting": setting,
            "target": scores["target"],
            "retained": scores["retained"],
            **averages,
            "forgetting": self.base["retained_score"] - averages["retained_score"],
        }

    def _scores(self, model: Any) -> dict[str, Any]:
        scores = evaluate_tasks(model, self.tokenizer, self.tasks, batch_size=self.recipe.evaluation.batch_size)
        target = self.recipe.target.name
        return {
            "target": {target: scores[target].metrics},
            "retained": {task.name: scores[task.name].metrics for task in self.recipe.retained},
            "counts": {name: score.count for name, score in scores.items()},
        }

    def _load(self, method: Method, path: Path) -> Any:
        assert method.load is not None
        base: PreTrainedModel = load_base(self.recipe.base)
        return method.load(str(path), base).eval()

    def _training_data(self, seed: int) -> TrainingData:
        """The same rows for every method of a seed; the seed decides which rows are held out for validation."""
        if seed not in self._data:
            data = load_training_data(self.recipe, self.tokenizer, seed)
            self._report(data)
            self._data[seed] = data
        return self._data[seed]

    def _report(self, data: TrainingData) -> None:
        if self._data:  # said once
            return
        report = data.report
        say(
            f"{report.train_rows:,} rows to train on, {report.validation_rows:,} to validate on; "
            f"{report.cut_rows:,} prompts were cut at their start to fit"
        )
        for warning in report.warnings:
            say(f"[yellow]warning:[/yellow] {escape(warning)}")
