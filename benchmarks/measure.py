"""What all measurements share: flags, interleaved rounds, medians, provenance and the result file.

Systems take turns within one process, so that whatever else the machine does meets all of them: a ratio is taken
between runs of the same round, and the order is turned round each time. Knows nothing about models.
"""

import argparse
import gc
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import numpy
import torch

from twinweave.compare.provenance import provenance as package_provenance
from twinweave.files import write_json_atomic
from twinweave.progress import progress_bar, say

from .shapes import SHAPES
from .tables import print_tables

RESULTS = Path(__file__).parent / "results"
Samples = dict[str, list[float]]  # system -> one value per round
Pairs = Sequence[tuple[str, str]]  # (of, to): the ratios that are reported


def base_parser(kind: str, description: str | None, repeats: int = 5) -> argparse.ArgumentParser:
    """The flags of every measurement."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{kind}", description=description)
    parser.set_defaults(kind=kind)
    parser.add_argument("--shape", choices=SHAPES, default="200m")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="float32 on the CPU, bfloat16 elsewhere")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (all cores)")
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds in which every system runs once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the result file (benchmarks/results/KIND-SHAPE-DEVICE.json)")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags with their defaults, and the threads set."""
    args = parser.parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    args.out = args.out or RESULTS / f"{args.kind}-{args.shape}-{args.device}.json"
    torch.set_num_threads(args.threads)
    return args


def random_ids(args: argparse.Namespace, rows: int, columns: int) -> torch.Tensor:
    """Token ids [rows, columns], the same for the same seed."""
    generator = torch.Generator().manual_seed(args.seed)
    return torch.randint(3, SHAPES[args.shape].vocab_size, (rows, columns), generator=generator).to(args.device)


def synchronize(device: str) -> None:
    """Wait for everything that was started on `device`."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(device: str, run: Callable[[], Any]) -> float:
    """How long `run` takes, its work on the device included."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def interleaved(
    runs: Mapping[str, Callable[[], float]], repeats: int, fewer: dict[str, int] | None = None, warm_up: int = 1
) -> Samples:
    """Every run once per round, after `warm_up` rounds that do not count.

    Each callable returns its own measurement, so that it can leave out what it prepares. `fewer`: systems too slow for
    more than some rounds, and for a warm-up, which is a small part of them. The order is reversed in every other round;
    garbage is collected between runs only.
    """
    samples: Samples = {name: [] for name in runs}
    was_enabled = gc.isenabled()
    gc.disable()
    gc.collect()
    gc.freeze()  # what exists already is not looked through again between runs
    try:
        for index in range(-warm_up, repeats):
            order = list(runs)[:: 1 if index % 2 == 0 else -1]
            for name in order:
                if name in (fewer or {}) and not 0 <= index < (fewer or {})[name]:
                    continue
                gc.collect()
                value = runs[name]()
                if index >= 0:
                    samples[name].append(value)
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
    return samples


def make_row(case: dict[str, Any], unit: str, samples: Samples, pairs: Pairs) -> dict[str, Any]:
    """One row of a result: each measurement, the medians, and the paired ratios with their 10 and 90 % quantiles."""
    ratios = {}
    for of, to in pairs:
        if samples.get(of) and samples.get(to):
            paired = [a / b for a, b in zip(samples[of], samples[to], strict=False) if b > 0]
            if paired:
                low, high = (float(value) for value in numpy.quantile(paired, (0.1, 0.9)))
                ratios[f"{of}/{to}"] = {"median": median(paired), "low": low, "high": high, "samples": paired}
    medians = {name: median(values) for name, values in samples.items() if values}
    return {"case": case, "unit": unit, "medians": medians, "ratios": ratios, "samples": samples}


def provenance(args: argparse.Namespace) -> dict[str, Any]:
    """The package's provenance with what a measurement of speed needs beside it."""
    found = package_provenance()
    found["command"] = shlex.join(["python", "-m", f"benchmarks.{args.kind}", *args.argv])
    on_cpu = args.device == "cpu"
    found["device"] = _cpu_model() if on_cpu else torch.cuda.get_device_name()
    found |= {"cores": os.cpu_count(), "threads": args.threads, "load_at_start": list(os.getloadavg())}
    found["git_commit"] = _git_commit()
    return found


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} ({platform.machine()})"
    return platform.machine()


def _git_commit() -> str | None:
    """The commit that was measured, with "+changes" where its code was changed since; None outside a checkout."""
    root = Path(__file__).parent.parent
    changes = ["status", "--porcelain", "--untracked-files=no", "--", "src", "benchmarks", ":!benchmarks/results"]
    with suppress(OSError, subprocess.CalledProcessError):
        said = [
            subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "HEAD"], changes)
        ]
        return said[0] + ("+changes" if said[1] else "")
    return None


def measure_all(
    args: argparse.Namespace,
    cases: Iterable[dict[str, Any]],
    measure: Callable[[dict[str, Any]], dict[str, Samples]],
    pairs: Pairs,
    unit: str = "s",
    **settings: Any,
) -> dict[str, Any]:
    """Measure every case, write the result file after each, print the table, and return the result.

    `measure` gives, for a case, what was measured -> system -> samples; each becomes a row. A case that does not fit
    into the device's memory is listed under "failed", and the next one follows.
    """
    cases = list(cases)
    shared = {name: getattr(args, name) for name in ("shape", "device", "dtype", "threads", "repeats", "seed")}
    result: dict[str, Any] = {
        "schema": 1,
        "kind": args.kind,
        "settings": shared | settings,
        "provenance": provenance(args),
        "complete": False,
        "rows": [],
        "failed": [],
    }
    start = time.monotonic()
    with progress_bar() as bar:
        for done, case in enumerate(bar.track(cases, description=f"{args.kind} {args.shape}"), start=1):
            try:
                for measured, samples in measure(case).items():
                    result["rows"].append(make_row({**case, "measure": measured}, unit, samples, pairs))
            except (torch.OutOfMemoryError, subprocess.CalledProcessError) as error:
                result["failed"].append({"case": case, "error": str(error).splitlines()[0]})
                say(f"{args.kind} {args.shape}: {case} failed: {error}")
            if args.device.startswith("cuda"):
                torch.cuda.empty_cache()
            result["complete"] = done == len(cases)
            write_json_atomic(args.out, result)
            left = (time.monotonic() - start) / done * (len(cases) - done)
            say(f"{args.kind} {args.shape}: {done} of {len(cases)} {case}, about {left / 60:.1f} minutes left")
    print_tables(result)
    say(f"Written to {args.out}")
    return result
