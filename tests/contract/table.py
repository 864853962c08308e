"""The page that says what works: made from the grid's findings. Knows nothing about how they were found."""

from typing import Any


def verdict(finding: dict[str, Any]) -> str:
    """One subject in a few words."""
    for word in ("refused", "broken"):
        if word in finding:
            return f"{word}: {finding[word]}"
    failed = [f"{check} ({r['note']})" for check, r in finding["checks"].items() if r["status"] == "fail"]
    if failed:
        return f"FAIL {'; '.join(failed)}"
    other = sum(r["status"] == "n/a" for r in finding["checks"].values())
    return f"pass ({other} n/a)" if other else "pass"


def page(found: dict[str, Any]) -> str:
    return "\n".join(f"{name}: {verdict(f)}" for g in ("architectures", "peft") for name, f in found.get(g, {}).items())
