"""Prefill: seconds to read a prompt into an empty cache, and to the first token out of `generate`.

`--adapters upper` puts LoRA on the upper half of the layers, below which both memories are the same.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from .measure import Samples, base_parser, interleaved, measure_all, parse, random_ids, seconds
from .systems import PAIRS, WITH_GUARD, Systems, build_for, generate, new_cache, prefill


def parser() -> Any:
    found = base_parser("prefill", __doc__)
    found.add_argument("--batch", type=int, nargs="+", default=[1])
    found.add_argument("--context", type=int, nargs="+", default=[32, 256, 1024])
    found.add_argument("--adapters", choices=["all", "upper"], nargs="+", default=["all", "upper"])
    return found


def prefill_seconds(systems: Systems, system: str, ids: Tensor, device: str) -> float:
    model = systems.model(system)
    return seconds(device, partial(prefill, model, ids, new_cache(model, ids.shape[1], static=False)))


def first_token_seconds(systems: Systems, system: str, ids: Tensor, device: str) -> float:
    return seconds(device, partial(generate, systems.model(system), ids, 1))


def measure_case(args: Any, case: dict[str, Any]) -> dict[str, Samples]:
    systems = build_for(args, case["adapters"], guarded=True)
    ids = random_ids(args, case["batch"], case["context"])
    measures = {"prefill": prefill_seconds, "first_token": first_token_seconds}
    return {
        measured: interleaved(
            {name: partial(run, systems, name, ids, args.device) for name in WITH_GUARD}, args.repeats
        )
        for measured, run in measures.items()
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(parser(), argv)
    names = ("adapters", "batch", "context")
    cases = [dict(zip(names, v, strict=True)) for v in itertools.product(args.adapters, args.batch, args.context)]
    return measure_all(args, cases, partial(measure_case, args), PAIRS)


if __name__ == "__main__":
    main()
