"""The page that says what works: made from the grid's findings. Knows nothing about how they were found."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from . import checks, cmt_checks, genadapter_checks

Finding = dict[str, Any]
TITLES = {
    "architectures": "Architectures",
    "slim": "Architectures with SLIM",
    "peft": "PEFT types",
    "lora": "LoRA in its variants",
    "genadapter": "Architectures with a generated adapter",
    "cmt": "Architectures with memories",
}
INTRODUCTION = {
    "architectures": "Every model type in transformers' causal-LM mapping, as a tiny model with random weights, with "
    "LoRA on all linear layers of its decoder.",
    "slim": "The same models with SLIM at every feed-forward in LoRA's place. Its clusters have been started by two "
    "batches.",
    "peft": "Every PEFT type, and SLIM, on a tiny Llama with random weights.",
    "lora": "On the same Llama. PiSSA, OLoRA, CorDA and LoRA-GA are compared with PEFT's own in the library's tests: "
    "there the base's weights change, here they do not, and the two agree up to rounding.",
    "genadapter": "The models of the first table with a GenerativeAdapter that is away from its start, put to "
    f"{len(genadapter_checks.CHECKS)} checks of their own, listed below; with the layers that it adapts by default.",
    "cmt": "The models of the first table with a MemoryModel that is away from its start and memories given in a "
    f"bank's place, put to {len(cmt_checks.CHECKS)} checks of their own, listed last.",
}


def kind(finding: Finding) -> str:
    """pass, fail, refused (by a clear error when it is wrapped), or not checked (it does not run without us)."""
    if "refused" in finding:
        return "refused"
    if "broken" in finding or finding["checks"]["base runs"]["status"] != "pass":
        return "not checked"
    return "fail" if _of_status(finding, "fail") else "pass"


def verdict(finding: Finding) -> str:
    """One subject in a line."""
    found = kind(finding)
    return f"{found}: {reason}" if (reason := reasons(finding)) else found


def reasons(finding: Finding) -> str:
    """Why a subject is anything but a pass in every check."""
    for word in ("refused", "broken"):
        if word in finding:
            return str(finding[word])
    failed, other = _of_status(finding, "fail"), _of_status(finding, "n/a")
    parts = [layers] if (layers := finding["checks"].get("layers found", {}).get("note")) and not failed else []
    parts += [f"{', '.join(names)}: {note}" for note, names in failed.items()]
    parts += [f"{', '.join(names)} n/a ({note})" for note, names in other.items()]
    return "; ".join(parts)


def page(found: dict[str, Any], totals: dict[str, int]) -> str:
    """Markdown for everything found so far; `totals`: how many subjects each grid has."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [
        "# Compatibility",
        "",
        f"Written by `make contract` ({versions}).",
        "",
        f"Each row is put to {len(checks.CHECKS)} checks, listed below. **pass**: every check that applies holds. "
        "**n/a**: a check does not apply; where it says *upstream*, the base alone or plain PEFT breaks the same "
        "promise, found by the same measurement without twinweave. **refused**: wrapping raises an error with this "
        "reason. **not checked**: the base alone, or plain PEFT over it, does not run or learn.",
    ]
    for grid, total in totals.items():
        if grid in found:
            lines += _section(grid, found[grid], total)
    lines += _legend("Checks", checks.CHECKS)
    if "genadapter" in found:
        lines += _legend("Checks of generated adapters", genadapter_checks.CHECKS)
    if "cmt" in found:
        lines += _legend("Checks of memories", cmt_checks.CHECKS)
    return "\n".join([*lines, ""])


def _section(grid: str, rows: dict[str, Finding], total: int) -> list[str]:
    counts = Counter(kind(finding) for finding in rows.values())
    summary = ", ".join(f"{counts[k]} {k}" for k in ("pass", "refused", "not checked", "fail"))
    return [
        "",
        f"## {TITLES[grid]}",
        "",
        f"{INTRODUCTION[grid]} {len(rows)} of {total} done: {summary}.",
        "",
        "| name | result | notes |",
        "| --- | --- | --- |",
        *(f"| {name} | {kind(rows[name])} | {_cell(reasons(rows[name]))} |" for name in sorted(rows)),
    ]


def _legend(title: str, judges: Mapping[str, Any]) -> list[str]:
    described = ((name, (check.__doc__ or "").split("\n\n")[0]) for name, check in judges.items())
    return ["", f"## {title}", "", *(f"- **{name}**: {' '.join(text.split())}" for name, text in described)]


def _of_status(finding: Finding, status: str) -> dict[str, list[str]]:
    """Notes of the checks with this status -> their names."""
    found: dict[str, list[str]] = {}
    for name, result in finding["checks"].items():
        if result["status"] == status:
            found.setdefault(result["note"], []).append(name)
    return found


def _cell(text: str) -> str:
    """Fit for one cell of a table."""
    text = " ".join(text.replace("|", "\\|").split())
    return text if len(text) <= 400 else f"{text[:397]}…"
