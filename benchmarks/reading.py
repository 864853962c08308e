"""GenerativeAdapter's speed: reading a text beside the base's own forward over it, and answering beside the bare base.

read: a text into a state, and further into the adapter; base: one forward of the base's decoder over the same chunks.
decode: a greedy loop with a cache, per token, without the prefill: the base, and the same base adapted to what it read.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from twinweave import AdapterState, GenerativeAdapter, GenerativeAdapterConfig

from .measure import Pairs, Samples, base_parser, interleaved, measure_all, parse, random_ids, seconds
from .shapes import build_base
from .systems import greedy, prefill

PAIRS: Pairs = (("read", "base"), ("read_and_factors", "base"), ("adapted", "base"))


def parser() -> Any:
    found = base_parser("reading", __doc__)
    found.add_argument("--work", choices=["read", "decode"], nargs="+", default=["read", "decode"])
    found.add_argument("--text", type=int, nargs="+", default=[1024, 4096], help="tokens of the text to read")
    found.add_argument("--state-size", type=int, default=1024)
    found.add_argument("--rank", type=int, default=128)
    found.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="for decoding")
    found.add_argument("--context", type=int, default=32, help="for decoding")
    found.add_argument("--new-tokens", type=int, default=32)
    return found


@lru_cache(maxsize=1)
def build(shape: str, device: str, dtype: str, seed: int, state_size: int, rank: int) -> GenerativeAdapter:
    """A base of random weights with a random generator, whose adapters are not zero."""
    base = build_base(shape, device, dtype, seed)
    model = GenerativeAdapter(base, GenerativeAdapterConfig(state_size=state_size, rank=rank)).eval()
    for generator in model.generators:
        nn.init.normal_(generator.output, std=0.02)  # type: ignore[arg-type]
    model.fingerprint()  # taken once in the life of a reader, not at each text
    return model


def chunks(ids: Tensor, size: int) -> list[Tensor]:
    """The text [1, T] in chunks of [1, size]."""
    return list(ids.split(size, dim=1))


@torch.no_grad()
def run_base(model: GenerativeAdapter, ids: Tensor) -> None:
    """The base's decoder over the chunks of a text, which is what any reader has to do."""
    for chunk in chunks(ids, model.settings.chunk_size):
        model.base.get_decoder()(input_ids=chunk, attention_mask=torch.ones_like(chunk), use_cache=False)


def read(model: GenerativeAdapter, ids: Tensor) -> AdapterState:
    """A text of token ids into a state, as `GenerativeAdapter.read` does behind the tokenizer."""
    return model.read_ids([chunk[0].tolist() for chunk in chunks(ids, model.settings.chunk_size)])


def read_and_factors(model: GenerativeAdapter, ids: Tensor) -> None:
    """And decompose it, which happens once, before the first question."""
    with model.adapted(read(model, ids)):
        pass


def decode_seconds(model: GenerativeAdapter, state: AdapterState, ids: Tensor, args: Any) -> float:
    """Seconds per token of the greedy loop, after an unmeasured prefill."""
    with model.adapted(state):
        cache = DynamicCache(config=model.config)
        last = prefill(model.base, ids, cache)
        return seconds(args.device, partial(greedy, model.base, last, cache, args.new_tokens)) / args.new_tokens


def measure_case(args: Any, case: dict[str, Any]) -> dict[str, Samples]:
    model = build(args.shape, args.device, args.dtype, args.seed, args.state_size, args.rank)
    if "text" in case:
        ids = random_ids(args, 1, case["text"])
        runs: dict[str, Callable[[], float]] = {
            "base": lambda: seconds(args.device, partial(run_base, model, ids)),
            "read": lambda: seconds(args.device, partial(read, model, ids)),
            "read_and_factors": lambda: seconds(args.device, partial(read_and_factors, model, ids)),
        }
        return {"read": interleaved(runs, args.repeats)}
    ids = random_ids(args, case["batch"], args.context)
    states = {"base": model.empty_state(), "adapted": read(model, random_ids(args, 1, 1024))}
    decoding = {name: partial(decode_seconds, model, state, ids, args) for name, state in states.items()}
    return {"decode": interleaved(decoding, args.repeats)}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(parser(), argv)
    cases: list[dict[str, Any]] = []
    if "read" in args.work:
        cases += [{"text": text} for text in args.text]
    if "decode" in args.work:
        cases += [{"batch": batch} for batch in args.batch]
    sizes = {"state_size": args.state_size, "rank": args.rank, "context": args.context, "new_tokens": args.new_tokens}
    return measure_all(args, cases, partial(measure_case, args), PAIRS, **sizes)


if __name__ == "__main__":
    main()
