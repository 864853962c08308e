"""Where two passes overtake the stacked one: their ratio over rows (decoding) and prompt lengths (prefill).

What the automatic plan's thresholds are chosen from.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from .decode import loop_seconds
from .measure import Samples, base_parser, interleaved, measure_all, parse, random_ids
from .prefill import prefill_seconds
from .systems import build_for


def parser() -> Any:
    found = base_parser("crossover", __doc__)
    found.add_argument("--rows", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8, 12, 16, 32, 64], help="for decoding")
    found.add_argument("--context", type=int, default=64, help="tokens before the decoding starts")
    found.add_argument("--new-tokens", type=int, default=16)
    found.add_argument("--lengths", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024])
    return found


def measure_case(args: Any, case: dict[str, Any]) -> dict[str, Samples]:
    systems = build_for(args, "all")
    ids = random_ids(args, case["rows"], case["tokens"])
    plans = ("stacked", "two_pass")
    if case["phase"] == "decode":
        runs = {plan: partial(loop_seconds, systems, plan, ids, args) for plan in plans}
    else:
        runs = {plan: partial(prefill_seconds, systems, plan, ids, args.device) for plan in plans}
    return {"per_token" if case["phase"] == "decode" else "prefill": interleaved(runs, args.repeats)}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(parser(), argv)
    cases = [{"phase": "decode", "rows": rows, "tokens": args.context} for rows in args.rows]
    cases += [{"phase": "prefill", "rows": 1, "tokens": length} for length in args.lengths]
    return measure_all(args, cases, partial(measure_case, args), [("stacked", "two_pass")], new_tokens=args.new_tokens)


if __name__ == "__main__":
    main()
