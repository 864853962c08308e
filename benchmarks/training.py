"""One training step: forward, backward, AdamW; no store's reading from disk, whose states are given here.

plain_full: PEFT alone with logits at every position, as transformers computes them. plain_labels: PEFT's arithmetic
with logits at label positions only, so that this saving does not flatter IMSM. imsm: the frozen pass in every step.
imsm_frozen: its states given, as from the frozen-memory store. NAME_rehearsal_gate and NAME_rehearsal_both: the same
step with the rehearsal of general text as recipes have it, its frozen side given, teaching the gate alone or both.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from twinweave.data import CompletionCollator
from twinweave.rehearsal import Materials, RehearsalRows, RehearsalSettings, Term, Written, gate_rehearsal, make_rows
from twinweave.rehearsal.terms import on_device_of

from .measure import Pairs, Samples, base_parser, interleaved, measure_all, parse, random_ids, seconds
from .systems import Systems, build_for

TASK_ALONE = ("plain_full", "plain_labels", "imsm", "imsm_frozen")
REHEARSING = tuple(f"{name}_rehearsal_{trains}" for name in ("imsm", "imsm_frozen") for trains in ("gate", "both"))
TRAINING = (*TASK_ALONE, *REHEARSING)
PAIRS: Pairs = (
    ("plain_labels", "plain_full"),
    ("imsm", "plain_full"),
    ("imsm_frozen", "plain_full"),
    ("imsm", "plain_labels"),
    ("imsm_frozen", "plain_labels"),
    *((name, name.partition("_rehearsal_")[0]) for name in REHEARSING),
)


def parser() -> Any:
    found = base_parser("training", __doc__, repeats=7)
    found.add_argument("--batch", type=int, nargs="+", default=[4])
    found.add_argument("--length", type=int, nargs="+", default=[256])
    found.add_argument("--labelled", type=float, nargs="+", default=[0.5], help="share of the tokens, at the end")
    found.add_argument("--adapters", choices=["all", "upper"], nargs="+", default=["all"])
    found.add_argument("--rehearsal-share", type=float, default=0.25, help="rehearsed rows, as a share of the batch's")
    found.add_argument("--systems", nargs="+", choices=TRAINING, default=TRAINING, help="only these")
    return found


def batch_of(args: Any, rows: int, length: int, labelled: float) -> dict[str, torch.Tensor]:
    """Random tokens; the last share of them is labelled."""
    ids = random_ids(args, rows, length)
    labels = ids.clone()
    labels[:, : length - max(round(length * labelled), 1)] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def output_of(
    systems: Systems, system: str, batch: dict[str, torch.Tensor], frozen: Any = None, gate: bool = False
) -> Any:
    """Loss and logits as `system` computes them, without caches as in transformers' Trainer; `gate`: with the gate."""
    if system == "plain_full":
        return systems.plain(**batch, use_cache=False)
    imsm = systems.imsm
    if system == "plain_labels":
        with imsm.use_memory("enhanced"):
            return imsm(**batch, logits_at_labels=True, use_cache=False)
    return imsm(**batch, logits_at_labels=True, frozen=frozen, use_cache=False, output_gate=gate)


def rehearsal_term(args: Any, imsm: Any, batch: dict[str, torch.Tensor], trains: Any) -> Term:
    """The package's own term over random text, whose original memory is computed here, once."""
    settings = RehearsalSettings(adapter_weight=1.0 if trains == "both" else 0.0)
    rows = max(math.ceil(len(batch["input_ids"]) * args.rehearsal_share), 1)
    written = [Written(ids) for ids in random_ids(args, rows, settings.length).tolist()]
    tokenizer: Any = SimpleNamespace(pad_token_id=0)  # of which collating needs no more
    general = RehearsalRows(make_rows(written, settings), CompletionCollator(tokenizer), settings, rows)
    rehearsed = on_device_of(batch, general.batch(0, args.seed))
    assert rehearsed is not None
    frozen = imsm.frozen_states(**rehearsed)
    term = gate_rehearsal(imsm, Materials(args.seed, 1, rehearsal=general, frozen=lambda _: frozen))
    assert term is not None
    return term


def training_step(args: Any, systems: Systems, system: str, batch: dict[str, torch.Tensor]) -> Callable[[], Any]:
    """A step that can be repeated, with the optimizer of the model it trains."""
    model: Any = systems.plain if system == "plain_full" else systems.imsm
    model.train()
    task, _, trains = system.partition("_rehearsal_")
    frozen = systems.imsm.frozen_states(**batch) if task == "imsm_frozen" else None
    term = rehearsal_term(args, model, batch, trains) if trains else None
    # no learning: every step has the same work, and the systems keep the same weights
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.0)

    def step() -> None:
        output = output_of(systems, task, batch, frozen, gate=term is not None)
        loss = output.loss
        if term is not None:
            inputs: Any = {**batch, "logits_at_labels": True}
            added = term(model, inputs, output, 0)  # always the first step's: the same rows, β at its full weight
            assert added is not None
            loss = loss + added
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_case(args: Any, case: dict[str, Any]) -> dict[str, Samples]:
    systems = build_for(args, case["adapters"])
    batch = batch_of(args, case["batch"], case["length"], case["labelled"])
    steps = {name: training_step(args, systems, name, batch) for name in args.systems}
    runs = {name: partial(seconds, args.device, step) for name, step in steps.items()}
    return {"step": interleaved(runs, args.repeats)}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(parser(), argv)
    names = ("adapters", "batch", "length", "labelled")
    values = itertools.product(args.adapters, args.batch, args.length, args.labelled)
    cases = [dict(zip(names, v, strict=True)) for v in values]
    return measure_all(args, cases, partial(measure_case, args), PAIRS, rehearsal_share=args.rehearsal_share)


if __name__ == "__main__":
    main()
