"""A few rows times weight matrices, from either side: why the stacked pass turns the product of two to four rows.

`x_wt` is what a linear layer computes; `w_xt` is the same numbers as W x^T. A decoding step of one sequence multiplies
the two rows of both memories by every weight, so it takes as long as this product.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear

from .measure import Samples, base_parser, interleaved, measure_all, parse, seconds
from .shapes import SHAPES

MATRICES = 40  # more than fits into a cache, as in a model


def parser() -> Any:
    found = base_parser("few_rows", __doc__, repeats=15)
    found.add_argument("--rows", type=int, nargs="+", default=[1, 2, 3, 4, 8])
    return found


@torch.no_grad()
def measure_case(args: Any, weights: list[torch.Tensor], case: dict[str, Any]) -> dict[str, Samples]:
    x = torch.randn(case["rows"], 1, weights[0].shape[1], dtype=weights[0].dtype, device=args.device)
    turned = x.flatten(0, 1).t()
    sides: dict[str, Callable[[], Any]] = {
        "x_wt": lambda: [linear(x, w) for w in weights],
        "w_xt": lambda: [torch.mm(w, turned).t().contiguous() for w in weights],
    }
    runs = {name: partial(seconds, args.device, side) for name, side in sides.items()}
    return {"product": interleaved(runs, args.repeats)}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(parser(), argv)
    shape = SHAPES[args.shape]
    size, dtype = (shape.intermediate_size, shape.hidden_size), getattr(torch, args.dtype)
    weights = [torch.randn(size, dtype=dtype, device=args.device) for _ in range(MATRICES)]
    cases = [{"rows": rows} for rows in args.rows]
    return measure_all(args, cases, partial(measure_case, args, weights), [("w_xt", "x_wt")])


if __name__ == "__main__":
    main()
