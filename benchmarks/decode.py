"""Decoding: seconds per token of a greedy loop (prefill left out), and of `generate` from end to end.

Side by side in every round: plain PEFT, IMSM stacked, two_pass and auto, guarded (auto with a domain guard), and with
--published our own writing of the published loop (batch 1, `generate` only: it has no prefill to leave out).
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .measure import Samples, base_parser, interleaved, measure_all, parse, random_ids, seconds
from .published_loop import published_generate
from .systems import PAIRS, WITH_GUARD, Systems, build_for, generate, greedy, new_cache, prefill


def parser() -> Any:
    found = base_parser("decode", __doc__)
    found.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 64])
    found.add_argument("--context", type=int, nargs="+", default=[32, 256])
    found.add_argument("--new-tokens", type=int, default=64)
    found.add_argument("--adapters", choices=["all", "upper"], nargs="+", default=["all"])
    found.add_argument("--published", type=int, default=0, metavar="REPEATS", help="rounds of the published loop")
    found.add_argument("--systems", nargs="+", choices=WITH_GUARD, default=WITH_GUARD, help="only these")
    found.add_argument("--compile", action="store_true", help="static caches and torch.compile for all systems")
    return found


def loop_seconds(systems: Systems, system: str, ids: Tensor, args: Any, step: Any = None, cache: Any = None) -> float:
    """Seconds per token of the greedy loop, after an unmeasured prefill.

    `step`: the compiled model with the static cache it was compiled for, which is emptied and filled again.
    """
    model = systems.model(system)
    if cache is None:
        cache = new_cache(model, ids.shape[1] + args.new_tokens, static=False)
    else:
        cache.reset()
    last = prefill(model, ids, cache)
    run = partial(greedy, model if step is None else step, last, cache, args.new_tokens)
    return seconds(args.device, run) / args.new_tokens


def compiled_loop(systems: Systems, system: str, ids: Tensor, args: Any) -> Callable[[], float]:
    """`loop_seconds` with a compiled step; one static cache for all rounds, as its address is part of a CUDA graph."""
    model = systems.model(system)
    cache = new_cache(model, ids.shape[1] + args.new_tokens, static=True)
    prefill(model, ids[:, :1], cache)
    return partial(loop_seconds, systems, system, ids, args, torch.compile(model, mode="reduce-overhead"), cache)


def generate_seconds(systems: Systems, system: str, ids: Tensor, args: Any) -> float:
    """Seconds per token of a whole `generate`, prefill included."""
    if system == "published":
        assert systems.published is not None
        run = partial(published_generate, systems.published, ids, args.new_tokens)
    else:
        run = partial(generate, systems.model(system), ids, args.new_tokens, args.compile)
    return seconds(args.device, run) / args.new_tokens


def measure_case(args: Any, case: dict[str, Any]) -> dict[str, Samples]:
    systems = build_for(args, case["adapters"], published=args.published > 0, guarded="guarded" in args.systems)
    ids = random_ids(args, case["batch"], case["context"])
    loops: dict[str, Callable[[], float]] = {
        name: partial(loop_seconds, systems, name, ids, args) for name in args.systems
    }
    if args.compile:
        torch.compiler.reset()  # forget what was compiled for other shapes
        loops = {name: compiled_loop(systems, name, ids, args) for name in args.systems}
    warm_up = 3 if args.compile else 1  # the first two compile, the third records CUDA graphs
    names = (*args.systems, "published") if args.published and case["batch"] == 1 else args.systems
    whole = {name: partial(generate_seconds, systems, name, ids, args) for name in names}
    return {
        "per_token": interleaved(loops, args.repeats, warm_up=warm_up),
        "generate": interleaved(whole, args.repeats, fewer={"published": args.published}, warm_up=warm_up),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(parser(), argv)
    names = ("adapters", "batch", "context")
    cases = [dict(zip(names, v, strict=True)) for v in itertools.product(args.adapters, args.batch, args.context)]
    return measure_all(
        args, cases, partial(measure_case, args), PAIRS, new_tokens=args.new_tokens, compile=args.compile
    )


if __name__ == "__main__":
    main()
