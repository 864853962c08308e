"""Everything that is measured on a GPU, one command after the other; a failed one does not stop the rest.

`python -m benchmarks.gpu` writes one result file per kind and shape; `--shape` picks shapes (each needs minutes).
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from twinweave.progress import say

from .measure import RESULTS
from .shapes import SHAPES

GPU_SHAPES = ("llama3-8b", "qwen3-4b", "qwen3-8b")


def commands(shape: str, device: str, out: Path) -> list[list[str]]:
    """Module name and flags of each measurement of a shape."""
    wanted = {
        "decode": "decode --batch 1 4 8 16 64 --context 32 256 2048 --new-tokens 64 --published 1",
        "decode-compiled": "decode --batch 1 8 --context 256 --new-tokens 256 --compile",
        "prefill": "prefill --batch 1 8 --context 32 256 2048 --adapters all upper",
        "training": "training --batch 4 --length 512 2048 --labelled 0.5 --adapters all upper",
        "memory": "memory --batch 1 16 --context 256 2048 --training-batch 4 --length 512 2048",
        "crossover": "crossover --rows 1 2 4 8 16 32 64 --lengths 1 8 16 32 64 128 256 512 1024 2048",
    }
    kind = device.split(":")[0]
    ends = {
        name: ["--shape", shape, "--device", device, "--out", str(out / f"{name}-{shape}-{kind}.json")]
        for name in wanted
    }
    return [[*shlex.split(flags), *ends[name]] for name, flags in wanted.items()]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(GPU_SHAPES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the result files")
    args = parser.parse_args(argv)
    wanted = [command for shape in args.shape for command in commands(shape, args.device, args.out)]
    failed = []
    for index, (module, *flags) in enumerate(wanted, start=1):
        say(f"[{index}/{len(wanted)}] python -m benchmarks.{module} {shlex.join(flags)}")
        command = [sys.executable, "-m", f"benchmarks.{module}", *flags]
        if subprocess.run(command, cwd=Path(__file__).parent.parent).returncode != 0:
            failed.append(shlex.join([module, *flags]))
    for command_line in failed:
        say(f"Failed: python -m benchmarks.{command_line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
