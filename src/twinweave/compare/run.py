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
from ..evaluation import Task, evaluate_tasks, has_lens, read_lens
from ..files import write_json_atomic
from ..fingerprint import fingerprint
from ..methods import Method, get_method
from ..processes import is_first
from ..progress import say
from ..rehearsal import RehearsalRows
from ..training import (
    Recipe,
    Training,
    fit,
    free_memory,
    load_base,
    load_rehearsal,
    load_tokenizer,
    load_training_data,
    reading_size,
    remove_store,
)
from .check import check_run
from .results import assemble, average_scores
from .store import RESULTS_NAME, RunFolder, read_results


def train(recipe: Recipe) -> dict[str, Any]:
    """Train the recipe's `method` on its first seed into its output folder; returns the results, also written there."""
    method, seed = get_method(recipe.method), recipe.seeds[0]
    run = RunFolder(recipe.output_dir, recipe, f"train {method.name}, seed {seed}")
    session = _Session(recipe, run, [method])
    cell = session.trained_cell(method, seed, {}, run.path, "cell")
    return session.finish([cell])


def compare(recipe: Recipe) -> dict[str, Any]:
    """Train and score methods × seeds into the recipe's output folder; returns the results, also written there."""
    run = RunFolder(recipe.output_dir, recipe, "compare")
    methods = [get_method(name) for name in recipe.methods]
    session = _Session(recipe, run, methods)
    cells = []
    for seed in recipe.seeds:
        for method in sorted(methods, key=lambda method: method.dial is not None):  # what is dialled is trained before
            for setting in recipe.sweep(method):
                cells.append(session.cell(method, seed, setting))
    return session.finish(cells)


class _Session:
    """What all cells of a run share: the tokenizer, the data, and the base's scores."""

    def __init__(self, recipe: Recipe, run: RunFolder, methods: Sequence[Method]) -> None:
        self.recipe, self.run = recipe, run
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(recipe.base)
        self.tasks: list[Task] = [recipe.target, *recipe.retained]
        self.frozen_folder = run.path / "frozen"  # shared by all IMSM methods and seeds, which have the same rows
        self._data: dict[tuple[int, int | None], TrainingData] = {}
        self._rehearsal: RehearsalRows | None = None
        new = methods if not run.begun else [m for m in methods if m.build is not None and run.lacks(m.name)]
        if new:  # what is wrong is said before time is spent and files are written
            kinds = dict.fromkeys(reading_size(recipe, method) for method in new if method.build is not None)
            check_run(recipe, new, {reads: self._training_data(recipe.seeds[0], reads) for reads in kinds})
        self.base = run.part("base", self._score_base)

    def finish(self, cells: list[dict[str, Any]]) -> dict[str, Any]:
        results = assemble(self.recipe, self.base, cells)
        if (self.run.path / RESULTS_NAME).is_file():  # what was added since is not computed again
            results |= {k: v for k, v in read_results(self.run.path).items() if k == "lm_eval"}
        if is_first():
            write_json_atomic(self.run.path / RESULTS_NAME, results)
            remove_store(self.frozen_folder)
        return results

    def trained_cell(
        self, method: Method, seed: int, setting: dict[str, float], folder: Path, part: str
    ) -> dict[str, Any]:
        if not self.run.has(part):
            say(f"{_shown(method, setting)}, seed {seed}: training")
            training = self._train(method, seed, setting, folder)  # in all processes of the run; scored in the first
        return self.run.part(part, lambda: self._score_trained(method, seed, setting, folder, training))

    def cell(self, method: Method, seed: int, setting: dict[str, float]) -> dict[str, Any]:
        name = "-".join([method.name, *(f"{knob}={value!r}" for knob, value in setting.items()), f"seed{seed}"])
        if method.dial is not None:
            return self.run.part(f"cells/{name}", partial(self._dial_and_score, method, seed, setting))
        return self.trained_cell(method, seed, setting, self.run.path / "cells" / name, f"cells/{name}/cell")

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

    def _train(self, method: Method, seed: int, setting: dict[str, float], folder: Path) -> Training:
        return fit(
            self.recipe,
            method,
            seed,
            self._training_data(seed, reading_size(self.recipe, method)),
            self.tokenizer,
            folder,
            setting=setting,
            rehearsal=self._rehearsal_rows() if method.rehearses != "never" else None,
            frozen_folder=self.frozen_folder,
        )

    def _score_trained(
        self, method: Method, seed: int, setting: dict[str, float], folder: Path, training: Training
    ) -> dict[str, Any]:
        model = self._load(method, folder / "best")
        say(f"{_shown(method, setting)}, seed {seed}: scoring")
        record = self._record(method, seed, setting, model) | {
            k: v for k, v in asdict(training).items() if k != "steps"
        }
        first = seed == self.recipe.seeds[0]
        if has_lens(model) and first and self.recipe.evaluation.lens_prompts:
            record["lens"] = read_lens(model, self.tokenizer, self.tasks, self.recipe.evaluation.lens_prompts)
        del model
        free_memory()
        return record

    def _dial_and_score(self, method: Method, seed: int, setting: dict[str, float]) -> dict[str, Any]:
        dial, (value,) = method.dial, setting.values()
        assert dial is not None
        say(f"{_shown(method, setting)}, seed {seed}: scoring")
        model = self._load(method, self.run.path / "cells" / f"{dial.of}-seed{seed}" / "best")
        with dial.apply(model, value):
            record = self._record(method, seed, setting, model)
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
        scores = evaluate_tasks(
            model,
            self.tokenizer,
            self.tasks,
            batch_size=self.recipe.evaluation.batch_size,
            read=self.recipe.documents(),
        )
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

    def _training_data(self, seed: int, reads: int | None) -> TrainingData:
        """The same rows for every method of a seed, with their contexts apart or not; the seed decides which rows are
        held out for validation."""
        if (seed, reads) not in self._data:
            data = load_training_data(self.recipe, self.tokenizer, seed, reads=reads)
            self._report(data)
            self._data[seed, reads] = data
        return self._data[seed, reads]

    def _rehearsal_rows(self) -> RehearsalRows | None:
        """The same rows for every method and seed; None where the recipe's rehearsal is off."""
        if self._rehearsal is None and self.recipe.rehearsal is not None:
            self._rehearsal = load_rehearsal(self.recipe, self.tokenizer, self.run.path / "rehearsal")
        return self._rehearsal

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


def _shown(method: Method, setting: dict[str, float]) -> str:
    return ", ".join([method.label, *(f"{knob} {value:g}" for knob, value in setting.items())])
