"""SLIM's speed beside LoRA with as many parameters (rank 128 on the same layers) and beside SLIM written literally.

training: forward, backward and AdamW. decode: a greedy loop with a cache, per token, without the prefill. prefill: a
prompt into an empty cache. layers: forward and backward of the first block's feed-forward alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from .literal_slim import literal_l1
from .measure import Pairs, Samples, base_parser, interleaved, measure_all, parse, random_ids, seconds
from .slim_systems import SlimSystems, build_slim, routed, summary
from .systems import greedy, prefill

SYSTEMS = ("base", "lora", "slim", "slim_literal")
WORK = ("training", "decode", "prefill", "layers")
PAIRS: Pairs = (("slim", "lora"), ("slim_literal", "slim"), ("lora", "base"))


def size(text: str) -> tuple[int, int]:
    """Rows and tokens of each, written as 4x128."""
    rows, columns = (int(part) for part in text.split("x"))
    return rows, columns


def parser() -> Any:
    found = base_parser("slim", __doc__)
    found.add_argument("--work", choices=WORK, nargs="+", default=WORK)
    found.add_argument("--size", type=size, nargs="+", default=[(2, 256), (4, 128)], help="for training and layers")
    found.add_argument("--prompt", type=size, nargs="+", default=[(1, 32), (1, 256)], help="for prefill")
    found.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16], help="for decoding")
    found.add_argument("--context", type=int, default=32, help="for decoding")
    found.add_argument("--new-tokens", type=int, default=32)
    found.add_argument("--yielding", type=float, default=0.0, help="γ while measuring; 0: no token yields to identity")
    found.add_argument("--literal", type=int, metavar="REPEATS", help="rounds of the literal writing, which is slow")
    found.add_argument(
        "--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS[1:], help="only these; base: not trained"
    )
    return found


def training_step(systems: SlimSystems, system: str, ids: Tensor) -> Callable[[], Any]:
    """A step over all tokens that can be repeated."""
    model = systems.model(system)
    # no learning: every step has the same work, and the systems keep the same weights
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.0)

    def step() -> None:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        if system == "slim_literal":  # SLIM adds the term by itself
            loss = loss + literal_l1(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def feed_forward(systems: SlimSystems, system: str, ids: Tensor) -> Callable[[], Any]:
    """Forward and backward of the first block's feed-forward, for as many tokens as `ids` has."""
    model = systems.model(system)
    module = next(module for name, module in model.named_modules() if name.endswith("layers.0.mlp"))
    generator = torch.Generator(ids.device).manual_seed(0)
    width = model.config.hidden_size
    x = torch.randn(*ids.shape, width, device=ids.device, dtype=model.dtype, generator=generator, requires_grad=True)

    def run() -> None:
        # a model that runs lets the clusters gather, and this stands for one
        passing = systems.slim.base_model.passing
        passing.entered.append(systems.slim)
        module(x).sum().backward()
        passing.entered.pop()

    return run


def decode(systems: SlimSystems, system: str, ids: Tensor, args: Any) -> float:
    """Seconds per token, after a prefill that is not measured."""
    model = systems.model(system)
    cache = DynamicCache(config=systems.base.config)
    last = prefill(model, ids, cache)
    return seconds(args.device, partial(greedy, model, last, cache, args.new_tokens)) / args.new_tokens


def read_prompt(systems: SlimSystems, system: str, ids: Tensor, args: Any) -> float:
    """Seconds of a prefill."""
    model = systems.model(system)
    return seconds(args.device, partial(prefill, model, ids, DynamicCache(config=systems.base.config)))


def runs_of(args: Any, systems: SlimSystems, work: str, ids: Tensor) -> dict[str, Callable[[], float]]:
    """What each system does in each round of a case."""
    trains = work in ("training", "layers")
    names = [name for name in args.systems if name != "base" or work != "training"]
    for system in SYSTEMS:
        systems.model(system).train(trains)
    if trains:
        make = training_step if work == "training" else feed_forward
        steps = {name: make(systems, name, ids) for name in names}
        return {name: partial(seconds, args.device, step) for name, step in steps.items()}
    run = decode if work == "decode" else read_prompt
    return {name: partial(run, systems, name, ids, args) for name in names}


def systems_of(args: Any) -> SlimSystems:
    """The systems that the flags ask for."""
    return build_slim(args.shape, args.device, args.dtype, args.seed, args.yielding)


def measure_case(args: Any, case: dict[str, Any]) -> dict[str, Samples]:
    runs = runs_of(args, systems_of(args), case["work"], random_ids(args, case["batch"], case["tokens"]))
    fewer = {} if args.literal is None else {"slim_literal": args.literal}
    return {"step" if case["work"] in ("training", "layers") else "forward": interleaved(runs, args.repeats, fewer)}


def routing_of(args: Any, case: dict[str, Any]) -> dict[str, str]:
    """The case's routing when SLIM runs it, in percent."""
    systems = systems_of(args)
    run = runs_of(args, systems, case["work"], random_ids(args, case["batch"], case["tokens"]))["slim"]
    with routed(systems.slim) as found:
        run()
    measured = [weights for weights in found if case["work"] != "decode" or len(weights) == case["batch"]]
    return {name: f"{share:.0%}" for name, share in asdict(summary(measured)).items()}


def cases_of(args: Any) -> list[dict[str, Any]]:
    sizes = {
        "training": args.size,
        "layers": args.size,
        "decode": [(batch, args.context) for batch in args.batch],
        "prefill": args.prompt,
    }
    cases = [{"work": work, "batch": rows, "tokens": tokens} for work in args.work for rows, tokens in sizes[work]]
    return [{**case, **(routing_of(args, case) if "slim" in args.systems else {})} for case in cases]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(parser(), argv)
    more = {"new_tokens": args.new_tokens, "yielding": args.yielding}
    return measure_all(args, cases_of(args), partial(measure_case, args), PAIRS, **more)


if __name__ == "__main__":
    main()
