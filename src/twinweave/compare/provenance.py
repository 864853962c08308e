"""Where a result comes from: command, versions, device, date. Knows nothing about the result."""

import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("twinweave", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages a result depends on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def device_name() -> str:
    """The device in words."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def provenance() -> dict[str, Any]:
    """The block `provenance` of a results.json."""
    command = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return {
        "command": shlex.join(command),
        "versions": versions(),
        "device": device_name(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
