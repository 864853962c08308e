"""What a bank of memories costs as it grows: search with an index and without, recall, adding, and peak memory.

The memories are random, in the bank's own format. Keys are of two kinds: `structured`, 32 directions with noise, as
texts of one language have it, and `isotropic`, with no structure at all, the hardest case. Memory is that of a fresh
process that opens the bank and answers 100 questions.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import torch
from torch import Tensor

from twinweave.cmt import MemoryBank, upkeep
from twinweave.cmt.rows import Memory
from twinweave.files import write_json_atomic
from twinweave.progress import say

from .measure import RESULTS, provenance

_QUESTIONS = 100
_TOP = 8


def keys_of(kind: str, count: int, width: int, seed: int) -> Tensor:
    """Unit keys [count, D] of one kind; the directions of `structured` are the same for every seed."""
    directions = torch.randn(32, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(count, width, generator=generator)
    if kind == "structured":
        keys += torch.randn(count, 32, generator=generator) @ directions
    return torch.nn.functional.normalize(keys, dim=1)


def fill(bank: MemoryBank, kind: str, start: int, end: int, batch: int) -> tuple[Tensor, list[tuple[int, float]]]:
    """Add documents of one memory each, numbered from `start`; their keys, and after each change how many memories
    there are and how long it took."""
    assert bank.shape is not None
    made, took = [], []
    for first in range(start, end, batch):
        keys = keys_of(kind, min(batch, end - first), bank.shape[1], 1_000 + first)
        blocks = keys[:, None].expand(-1, bank.shape[0], -1)
        memories = [
            Memory(f"d{first + n:07}", f"{first + n:064x}", key, block, tokens=300, metadata={"number": first + n})
            for n, (key, block) in enumerate(zip(keys, blocks, strict=True))
        ]
        begun = time.perf_counter()
        bank.add(memories)
        took.append((first + len(keys), time.perf_counter() - begun))
        made.append(keys)
    return torch.cat(made), took


def per_thousand(took: list[tuple[int, float]], steps: int = 10) -> list[dict[str, float]]:
    """Seconds per 1,000 memories in about `steps` stretches of what `fill` did, with all upkeep that fell into each."""
    size = -(-len(took) // steps)
    stretches, before = [], took[0][0] - (took[1][0] - took[0][0] if len(took) > 1 else took[0][0])
    for start in range(0, len(took), size):
        part = took[start : start + size]
        added, before = part[-1][0] - before, part[-1][0]
        stretches.append({"memories": before, "seconds": 1000 * sum(seconds for _, seconds in part) / added})
    return stretches


@contextmanager
def flat() -> Iterator[None]:
    """Search as if there were no index."""
    with mock.patch.object(upkeep, "index_of", return_value=None):
        yield


def searched(bank: MemoryBank, questions: Tensor, exact: list[set[str]]) -> dict[str, float]:
    """Median and 95th percentile in milliseconds of one question's search, memories and all, and recall.

    processor_ms: what all threads together took, which is the same on a machine that does other things meanwhile.
    """
    bank.search(questions[:1], _TOP)
    seconds, hits, processor = [], 0, time.process_time()
    for question, wanted in zip(questions, exact, strict=True):
        begun = time.perf_counter()
        found = bank.search(question[None], _TOP)[0]
        seconds.append(time.perf_counter() - begun)
        hits += len({hit.id for hit in found} & wanted)
    median, late = (1e3 * float(x) for x in numpy.quantile(seconds, (0.5, 0.95)))
    recall = hits / sum(len(wanted) for wanted in exact)
    processor = 1e3 * (time.process_time() - processor) / len(questions)
    facts = {"median_ms": median, "p95_ms": late, "processor_ms": processor}
    return facts | {"recall_at_8": recall, "questions": len(questions)}


def peak_memory(path: str, kind: str) -> dict[str, int]:
    """Bytes of a fresh process that opens the bank and answers questions: at its peak, and before it opened it."""
    command = [sys.executable, "-m", "benchmarks.bank", "--answer-from", path, "--kinds", kind]
    return dict(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def answer_from(path: str, kind: str) -> dict[str, int]:
    """What `peak_memory` starts."""
    _ = torch.ones(64, 64) @ torch.ones(64, 64)
    __import__("lancedb")
    before = _peak()
    bank = MemoryBank(path)
    assert bank.shape is not None
    for question in keys_of(kind, _QUESTIONS, bank.shape[1], 7):
        bank.search(question[None], _TOP)
    return {"before_bytes": before, "peak_bytes": _peak()}


def _peak() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure(args: argparse.Namespace, kind: str, folder: str) -> Iterator[dict[str, Any]]:
    """One row for each size that the bank grows to."""
    bank = MemoryBank(Path(folder) / f"{kind}.lance", "benchmark", (args.memory_tokens, args.width))
    keys = torch.zeros(0, args.width)
    for size in args.sizes:
        begun, processor, before = time.perf_counter(), time.process_time(), len(keys)
        new, took = fill(bank, kind, before, size, args.batch)
        thousands = (size - before) / 1000
        adding = {"seconds": time.perf_counter() - begun, "processor_seconds": time.process_time() - processor}
        keys = torch.cat((keys, new))
        questions = keys_of(kind, _QUESTIONS, args.width, 7)
        exact = [{f"d{n:07}" for n in row} for row in (questions @ keys.T).topk(_TOP).indices.tolist()]
        stats = bank.stats()
        row: dict[str, Any] = {
            "keys": kind,
            "memories": size,
            "added_from": before,
            "per_1000_added": {name: value / thousands for name, value in adding.items()},
            "per_1000_as_it_grew": per_thousand(took),
            "longest_change_seconds": max(seconds for _, seconds in took),
            "bytes_on_disk": stats["bytes"],
            "indexed": stats["indexed"],
            "index": searched(bank, questions, exact) if stats["index"] else None,
        }
        with flat():
            row["flat"] = searched(bank, questions[: args.flat_questions], exact[: args.flat_questions])
        if args.isolated:
            row["memory"] = peak_memory(bank.path, kind)
        yield row


def main() -> None:
    """Measure, and write the result file after each row."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bank", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 3_000, 10_000, 30_000, 100_000])
    parser.add_argument("--kinds", nargs="+", default=["structured", "isotropic"])
    parser.add_argument("--width", type=int, default=1024, help="D, the numbers of a key")
    parser.add_argument("--memory-tokens", type=int, default=24, help="k, so that a memory has k x D x 2 bytes")
    parser.add_argument("--batch", type=int, default=256, help="documents of one change, as in `memory add`")
    parser.add_argument("--flat-questions", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-memory", dest="isolated", action="store_false", help="leave out the peak memory")
    parser.add_argument("--folder", help="where the banks are written (a temporary folder)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--answer-from", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.answer_from:
        print(json.dumps(answer_from(args.answer_from, args.kinds[0])))
        return
    args.out = args.out or RESULTS / f"bank-k{args.memory_tokens}-d{args.width}.json"
    args.kind, args.device, args.argv = "bank", "cpu", sys.argv[1:]
    names = ("width", "memory_tokens", "batch", "threads")
    result: dict[str, Any] = {"schema": 1, "kind": "bank", "settings": {n: getattr(args, n) for n in names}}
    result |= {"provenance": provenance(args), "complete": False, "rows": []}
    for kind in args.kinds:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            for row in measure(args, kind, folder):
                result["rows"].append(row)
                write_json_atomic(args.out, result)
                say(json.dumps(row))
    result["complete"] = True
    write_json_atomic(args.out, result)
    say(f"Written to {args.out}")


if __name__ == "__main__":
    main()
