"""One training step: forward, backward, AdamW; no store's reading from disk, whose states are given here.

plain_full: PEFT alone with logits at every position, as transformers computes them. plain_labels: PEFT's arithmetic
with logits at label positions only, so that this saving does not flatter IMSM. imsm: the frozen pass in every step.
imsm_frozen: its states given, as from the frozen-memory store.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from .measure import Pairs, Samples, base_parser, interleaved, measure_all, parse, random_ids, seconds
from .systems import Systems, build_for

TRAINING = ("plain_full", "plain_labels", "imsm", "imsm_frozen")
PAIRS: Pairs = (
    ("plain_labels", "plain_full"),
    ("imsm", "plain_full"),
    ("imsm_frozen", "plain_full"),
    ("imsm", "plain_labels"),
    ("imsm_frozen", "plain_labels"),
)


def parser() -> Any:
    found = base_parser("training", __doc__, repeats=7)
    found.add_argument("--batch", type=int, nargs="+", default=[4])
    found.add_argument("--length", type=int, nargs="+", default=[256])
    found.add_argument("--labelled", type=float, nargs="+", default=[0.5], help="share of the tokens, at the end")
    found.add_argument("--adapters", choices=["all", "upper"], nargs="+", default=["all"])
    return found


def batch_of(args: Any, rows: int, length: int, labelled: float) -> dict[str, torch.Tensor]:
    """Random tokens; the last share of them is labelled."""
    ids = random_ids(args, rows, length)
    labels = ids.clone()
    labels[:, : length - max(round(length * labelled), 1)] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def loss_of(systems: Systems, system: str, batch: dict[str, torch.Tensor], frozen: Any = None) -> torch.Tensor:
    """The loss as `system` computes it, without caches as in transformers' Trainer."""
    if system == "plain_full":
        return systems.plain(**batch, use_cache=False).loss
    imsm = systems.imsm
    if system == "plain_labels":
        with imsm.use_memory("enhanced"):
            return imsm(**batch, logits_at_labels=True, use_cache=False).loss
    return imsm(**batch, logits_at_labels=True, frozen=frozen, use_cache=False).loss


def training_step(systems: Systems, system: str, batch: dict[str, torch.Tensor]) -> Callable[[], Any]:
    """A step that can be repeated, with the optimizer of the model it trains."""
    model: Any = systems.plain if system == "plain_full" else systems.imsm
    model.train()
    frozen = systems.imsm.frozen_states(**batch) if system == "imsm_frozen" else None
    # no learning: every step has the same work, and the systems keep the same weights
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.0)

    def step() -> None:
        loss_of(systems, system, batch, frozen).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_case(args: Any, case: dict[str, Any]) -> dict[str, Samples]:
    systems = build_for(args, case["adapters"])
    batch = batch_of(args, case["batch"], case["length"], case["labelled"])
    steps = {name: training_step(systems, name, batch) for name in TRAINING}
    return {"step": interleaved({name: partial(seconds, args.device, steps[name]) for name in TRAINING}, args.repeats)}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(parser(), argv)
    names = ("adapters", "batch", "length", "labelled")
    values = itertools.product(args.adapters, args.batch, args.length, args.labelled)
    return measure_all(args, [dict(zip(names, v, strict=True)) for v in values], partial(measure_case, args), PAIRS)


if __name__ == "__main__":
    main()
