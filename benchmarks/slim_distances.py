"""How far SLIM's clusters find the tokens of each task, in the pocket world: what yielding can go by.

    python -m benchmarks.slim_distances --out benchmarks/distances/slim-pocket.json

The clusters see the training rows of the target once, over the unchanged base; then each task's prompts are read, and
d at their last token is averaged, for each router in turn (behind the norm of a block, then inside its feed-forward).
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from twinweave import SlimConfig, get_slim_model
from twinweave.compare.provenance import provenance
from twinweave.data import CompletionCollator, attention_mask_of, encode_prompt, pad_rows
from twinweave.evaluation.rows import read_examples
from twinweave.files import write_json_atomic
from twinweave.slim.clustering import SlidingClusters
from twinweave.training import load_base, load_recipe, load_tokenizer, load_training_data

RECIPE = "recipes/slim/pocket-reverse.yaml"
PROMPTS, BATCH, RATE = 60, 32, 0.1


@torch.no_grad()
def distances(distance: str) -> dict[str, list[list[float]]]:
    """Task -> for each router mean and standard deviation of d over its prompts."""
    recipe = load_recipe(RECIPE)
    tokenizer = load_tokenizer(recipe.base)
    rows, collate = load_training_data(recipe, tokenizer, 0).train, CompletionCollator(tokenizer)
    torch.manual_seed(0)
    config = SlimConfig(r=1, distance=distance, cluster_rate=RATE)  # type: ignore[arg-type]
    model = get_slim_model(load_base(recipe.base), config).train()
    for start in range(0, len(rows), BATCH):
        batch = collate([rows[i] for i in range(start, min(start + BATCH, len(rows)))])
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    model.eval()
    seen: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, SlidingClusters):
            module.register_forward_hook(lambda clusters, x, d: seen.append(d))
    found = {}
    for task in (recipe.target, *recipe.retained):
        ids = [encode_prompt(e.prompt, tokenizer, max_length=200)[0] for e in read_examples(task)[:PROMPTS]]
        mask = attention_mask_of(ids, side="left")
        seen.clear()
        model(input_ids=pad_rows(ids, 0, side="left"), attention_mask=mask)
        last = [d.view(mask.shape)[:, -1] for d in seen]
        found[task.name] = [[round(float(d.mean()), 3), round(float(d.std()), 3)] for d in last]
    return found


def main() -> dict[str, Any]:
    """Print a table for each distance, and keep the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.slim_distances", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    found: dict[str, Any] = {name: distances(name) for name in ("rms", "max")}
    for name, tasks in found.items():
        table = Table("task", *(f"{i // 2}.{'norm' if i % 2 == 0 else 'inner'}" for i in range(8)), title=name)
        for task, values in tasks.items():
            table.add_row(task, *(f"{mean:.2f}" for mean, _ in values))
        Console().print(table)
    write_json_atomic(args.out, found | {"provenance": provenance()})
    return found


if __name__ == "__main__":
    main()
