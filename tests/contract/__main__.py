"""The whole grid: `python -m contract [--grid GRID] [NAME ...]` with `tests` on the path, or `make contract`.

Every subject runs in a process of its own with a time limit, so that a crash costs one row. Results are kept from run
to run while the versions stay the same; `docs/compatibility.md` is written from them.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import signal
import time
import warnings
from dataclasses import asdict
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from twinweave.files import write_json_atomic, write_text_atomic
from twinweave.progress import say

from . import architectures, checks, cmt_checks, genadapter_checks, peft_types, table

# Each grid: the names of its subjects, what makes one of a name, and the module with what they are put to.
GRIDS: dict[str, tuple[tuple[str, ...], Any, Any]] = {
    "architectures": (architectures.NAMES, architectures.subject, checks),
    "slim": (architectures.NAMES, architectures.slim_subject, checks),
    "peft": (peft_types.TYPES, peft_types.subject, checks),
    "lora": (peft_types.LORAS, peft_types.subject, checks),
    "genadapter": (architectures.NAMES, genadapter_checks.subject, genadapter_checks),
    "cmt": (architectures.NAMES, cmt_checks.subject, cmt_checks),
}
DOCS = Path(__file__).parents[2] / "docs"
CPU_LIMIT, LIMIT = 150, 900.0  # seconds for one subject: of work, and on the clock
MEMORY = 8 << 30  # bytes of address space for one subject
PACKAGES = ("torch", "transformers", "peft")


def judge(grid: str, name: str) -> dict[str, Any]:
    """Everything about one subject: why it is refused, or a result for every check."""
    _, make, judges = GRIDS[grid]
    try:
        subject = make(name)
        reason = judges.refusal(subject)
    except Exception as error:  # the base itself cannot be made, or the library fails while wrapping
        return {"broken": checks.said(error)}
    if reason is not None:
        return {"refused": reason}
    results: dict[str, Any] = {}
    for check in judges.CHECKS:
        results[check] = asdict(judges.run_check(check, subject))
        if check == "base runs" and results[check]["status"] != "pass":
            break
    return {"checks": results}


def _in_process(grid: str, name: str, end: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT, CPU_LIMIT + 5))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    end.send(judge(grid, name))


def run_all(grid: str, names: list[str], jobs: int, take: Any) -> None:
    """Judge all `names`, `jobs` at a time, and hand every finding to `take(name, finding, seconds)`."""
    context = multiprocessing.get_context("fork")  # the imports are paid for once
    waiting, running = list(reversed(names)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop()
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_in_process, args=(grid, name, theirs))
            process.start()
            theirs.close()
            running[ours] = (name, process, time.monotonic())
        done = wait(list(running), timeout=1.0)
        for end, (name, process, start) in list(running.items()):
            seconds = time.monotonic() - start
            if end in done:
                try:
                    finding = end.recv()
                except EOFError:
                    finding = {}
            elif seconds > LIMIT:
                finding = {}
                process.kill()
            else:
                continue
            process.join()
            if not finding:
                out_of_time = process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
                finding = {"broken": "out of time" if out_of_time else f"it died ({process.exitcode})"}
            del running[end]
            take(name, finding, seconds)


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}


def main() -> None:
    parser = argparse.ArgumentParser(prog="contract", description=__doc__)
    parser.add_argument("--grid", choices=list(GRIDS), help="one grid only")
    parser.add_argument("names", nargs="*", help="these subjects only, whatever is known of them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--fresh", action="store_true", help="forget what earlier runs found")
    parser.add_argument("--out", type=Path, default=DOCS)
    given = parser.parse_args()
    grids = [given.grid] if given.grid else list(GRIDS)
    if unknown := set(given.names).difference(*(GRIDS[grid][0] for grid in grids)):
        parser.error(f"no subject of {', '.join(grids)}: {', '.join(sorted(unknown))}")
    for grid in grids:
        _run_grid(grid, given)


def _run_grid(grid: str, given: argparse.Namespace) -> None:
    file = given.out / "compatibility.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if found.get("versions") != versions():
        found = {"versions": versions()}
    rows = {} if given.fresh else found.get(grid, {})
    settled = {name for name, finding in rows.items() if table.kind(finding) != "fail" and "broken" not in finding}
    names = [name for name in GRIDS[grid][0] if (name in given.names if given.names else name not in settled)]
    start, count = time.monotonic(), 0

    def take(name: str, finding: dict[str, Any], seconds: float) -> None:
        nonlocal count
        count += 1
        rows[name] = finding
        found[grid] = {n: rows[n] for n in sorted(rows)}
        write_json_atomic(file, found)
        left = (time.monotonic() - start) / count * (len(names) - count)
        say(f"{count}/{len(names)} {name}: {table.verdict(finding)[:300]} ({seconds:.0f} s; {left / 60:.0f} min left)")

    run_all(grid, names, given.jobs, take)
    write_text_atomic(
        given.out / "compatibility.md", table.page(found, {grid: len(names) for grid, (names, *_) in GRIDS.items()})
    )


if __name__ == "__main__":
    main()
