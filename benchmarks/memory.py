"""Peak memory of decoding (`generate`) and of training steps, each system in a fresh process that holds only it.

peak: everything resident at the highest point (on a GPU: everything allocated), interpreter and weights included.
above_empty: the peak less what the same process held before the model was made (interpreter and libraries).
above_loaded: the peak less what was held with the model loaded, before the measured work.
On the CPU it is the kernel's own high-water mark (VmHWM, reset after loading), so this needs Linux.
"""

import argparse
import ctypes
import gc
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from twinweave.progress import say

from . import training
from .measure import Pairs, Samples, base_parser, measure_all, parse, random_ids
from .published_loop import published_copy, published_generate
from .shapes import SHAPES, build_base, imsm_model, plain_model, sharing_weights
from .systems import PLANS, SYSTEMS, Systems, generate

DECODING = (*SYSTEMS, "published")
PAIRS: Pairs = (*((name, "plain") for name in PLANS), ("auto", "published"), *training.PAIRS)


def parser() -> Any:
    found = base_parser("memory", __doc__, repeats=1)
    found.add_argument("--work", choices=["decode", "training"], nargs="+", default=["decode", "training"])
    found.add_argument("--batch", type=int, nargs="+", default=[1], help="for decoding")
    found.add_argument("--context", type=int, nargs="+", default=[256], help="for decoding")
    found.add_argument("--new-tokens", type=int, default=64)
    found.add_argument("--training-batch", type=int, nargs="+", default=[4])
    found.add_argument("--length", type=int, nargs="+", default=[256], help="for training")
    found.add_argument("--labelled", type=float, default=0.5)
    found.add_argument("--systems", nargs="+", choices=[*DECODING, *training.TASK_ALONE], help="only these")
    found.add_argument("--child", help="not for you: what one process measures, as JSON")
    return found


def resident_bytes(field: str) -> int:
    """A field of this process's status: VmRSS or VmHWM."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}; peak memory on the CPU is measured on Linux only.")


def held(device: str) -> int:
    """Bytes in use now, after everything that can be given back was; the next peak counts from here."""
    gc.collect()
    if device == "cpu":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets VmHWM to what is resident now
        return resident_bytes("VmRSS")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak(device: str) -> int:
    """The most bytes in use since `held`."""
    if device == "cpu":
        return resident_bytes("VmHWM")
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def decode_work(args: Any, system: str, case: dict[str, Any]) -> Callable[[int, int], Any]:
    """Loads what the system needs; the result decodes (context, new tokens)."""
    base = build_base(args.shape, args.device, args.dtype, args.seed)

    def ids(context: int) -> torch.Tensor:
        return random_ids(args, case["batch"], context)

    if system == "published":
        plain = plain_model(sharing_weights(base), "all", args.seed)
        imsm = imsm_model(sharing_weights(base), "all", args.seed)
        published = published_copy(base, plain, imsm)
        return lambda context, new_tokens: published_generate(published, ids(context), new_tokens)
    if system == "plain":
        model: Any = plain_model(base, "all", args.seed)
    else:
        model = imsm_model(base, "all", args.seed)
        model.plan = system
    return lambda context, new_tokens: generate(model, ids(context), new_tokens)


def training_work(args: Any, system: str, case: dict[str, Any]) -> Callable[[int, int], Any]:
    """Loads what the system needs; the result trains on (length, steps)."""
    base = build_base(args.shape, args.device, args.dtype, args.seed)
    if system == "plain_full":
        systems = Systems(plain_model(base, "all", args.seed), None)
    else:
        systems = Systems(None, imsm_model(base, "all", args.seed))
    batches = {n: training.batch_of(args, case["batch"], n, args.labelled) for n in (8, case["length"])}
    steps = {n: training.training_step(args, systems, system, batch) for n, batch in batches.items()}
    return lambda length, count: [steps[length]() for _ in range(count)]


def child(args: Any, work: str, system: str, case: dict[str, Any]) -> dict[str, int]:
    """What one fresh process measures: bytes held before loading and after it, and the peak."""
    load = decode_work if work == "decode" else training_work
    small = (4, 2) if work == "decode" else (8, 1)
    # a tiny model first, so that no library is loaded lazily in what is measured
    load(argparse.Namespace(**{**vars(args), "shape": "tiny"}), system, case)(*small)
    empty = held(args.device)
    run = load(args, system, case)
    run(*small)
    loaded = held(args.device)
    run(*((case["context"], args.new_tokens) if work == "decode" else (case["length"], 2)))
    return {"empty": empty, "loaded": loaded, "peak": peak(args.device)}


def in_fresh_process(args: Any, work: str, system: str, case: dict[str, Any]) -> dict[str, int]:
    """`child` in a process of its own."""
    what = json.dumps({"work": work, "system": system, "case": case})
    command = [sys.executable, "-m", "benchmarks.memory", *args.argv, "--child", what]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parent.parent)
    return json.loads(done.stdout.splitlines()[-1])


def measure_case(args: Any, case: dict[str, Any]) -> dict[str, Samples]:
    names: Sequence[str] = DECODING if case["work"] == "decode" else training.TASK_ALONE
    names = tuple(n for n in names if args.systems is None or n in args.systems)
    if case["batch"] > 1:
        names = tuple(n for n in names if n != "published")
    found: dict[str, Samples] = {
        measured: {name: [] for name in names} for measured in ("peak", "above_empty", "above_loaded")
    }
    for _ in range(args.repeats):
        for name in names:
            counted = in_fresh_process(args, case["work"], name, case)
            found["peak"][name].append(counted["peak"])
            found["above_empty"][name].append(counted["peak"] - counted["empty"])
            found["above_loaded"][name].append(counted["peak"] - counted["loaded"])
            say(f"memory {args.shape}: {case['work']} {name}: {counted['peak'] / 2**20:.1f} MiB")
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(parser(), argv)
    if args.child:
        print(json.dumps(child(args, **json.loads(args.child))))
        return {}
    cases: list[dict[str, Any]] = []
    if "decode" in args.work:
        cases += [{"work": "decode", "batch": b, "context": c} for b, c in itertools.product(args.batch, args.context)]
    if "training" in args.work:
        cases += [
            {"work": "training", "batch": b, "length": n}
            for b, n in itertools.product(args.training_batch, args.length)
        ]
    element = torch.finfo(getattr(torch, args.dtype)).bits // 8
    for case in cases:  # what the acceptance allows beside the plain model: one [B, T, d]
        tokens = case["batch"] * (case["length"] if case["work"] == "training" else case["context"])
        case["one_state_mib"] = round(tokens * SHAPES[args.shape].hidden_size * element / 2**20, 3)
    return measure_all(
        args, cases, partial(measure_case, args), PAIRS, "bytes", new_tokens=args.new_tokens, labelled=args.labelled
    )


if __name__ == "__main__":
    main()
