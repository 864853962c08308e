"""How much of the original memory the gate lets through, place by place: target against near and far.

    python -m benchmarks.gate_positions runs/NAME/cells/imsm-seed0/best runs/NAME/recipe.json

For tasks with answers: the mean share over channels at the 1st, 2nd, … token of the greedy answer, with the standard
deviation over prompts. For texts: at their 1st to 8th token, the next 24, and the rest.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch

from twinweave import IMSMModel
from twinweave.data import encode_prompt
from twinweave.data.encode import text_ids
from twinweave.evaluation import Task
from twinweave.evaluation.lens import original_shares
from twinweave.evaluation.rows import read_examples, read_texts
from twinweave.progress import track
from twinweave.training import load_base, load_recipe, load_tokenizer

SHOWN, TEXT_BANDS = 4, ((0, 8), (8, 32), (32, 256))


def shares(model: IMSMModel, tokenizer: Any, task: Task, prompts: int) -> Iterator[list[float]]:
    """The gate's mean over channels at each place of an answer or a text, for so many rows of a task."""
    if task.kind == "text_loss":
        for _, text in read_texts(task)[:prompts]:
            ids = text_ids(tokenizer, text)[: TEXT_BANDS[-1][1]]
            with torch.inference_mode():
                gate = model(input_ids=torch.tensor([ids]), output_gate=True).gate
            yield gate[0].mean(-1).tolist()
    elif task.kind in ("generation", "completion_loss"):
        for example in read_examples(task)[:prompts]:
            ids, _ = encode_prompt(example.prompt, tokenizer, max_length=256, where=example.where)
            yield original_shares(model, tokenizer, ids, max_new_tokens=SHOWN)[1]


def row(task: Task, found: Sequence[Sequence[float]]) -> str:
    """One line of the table."""
    bands = TEXT_BANDS if task.kind == "text_loss" else [(place, place + 1) for place in range(SHOWN)]
    cells = []
    for first, end in bands:
        values = [fmean(places[first:end]) for places in found if len(places) > first]
        cells.append(f"{fmean(values):.3f} ± {pstdev(values):.3f}" if values else "")
    return f"| {task.name} | {task.family or 'target'} | {' | '.join([*cells, '', ''][:SHOWN])} |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate_positions", description=__doc__)
    parser.add_argument("model", type=Path, help="a saved IMSM model")
    parser.add_argument("recipe", type=Path, help="the recipe.json of its run")
    parser.add_argument("--prompts", type=int, default=30)
    args = parser.parse_args(argv)
    values = json.loads(args.recipe.read_text(encoding="utf-8"))
    recipe = load_recipe({key: value for key, value in values.items() if key != "command"})
    tokenizer = load_tokenizer(recipe.base)
    model = IMSMModel.from_pretrained(args.model, load_base(recipe.base))
    tasks = [recipe.target, *recipe.retained]
    lines = [
        row(task, found)
        for task in track(tasks, "tasks")
        if (found := list(shares(model, tokenizer, task, args.prompts)))
    ]
    print(
        "\n".join(
            [
                "| task | family | answer 1 or text 1-8 | 2 or 9-32 | 3 or 33-256 | 4 |",
                "|---|---|---|---|---|---|",
                *lines,
            ]
        )
    )


if __name__ == "__main__":
    main()
