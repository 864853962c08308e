"""The lens: what a model wrote, token by token, and how much of each token came from the original memory.

Turns the `lens` part of the results into pieces a page can show. Knows nothing about colours or HTML.
"""

from dataclasses import dataclass
from statistics import fmean
from typing import Any

from .palette import LENS_LEVELS
from .study import FAMILIES, Study
from .units import finite


@dataclass(frozen=True)
class Piece:
    """One generated token: the space before it, its text, and the share (0 to 1) of the original memory."""

    space: str
    text: str
    breaks: str
    share: float | None

    @property
    def level(self) -> int:
        """The step of the colour scale, 0 (all new) to 10 (all original)."""
        return round((self.share or 0.0) * (LENS_LEVELS - 1))

    @property
    def percent(self) -> str:
        """The share in words, for tool tips and screen readers."""
        return "share unknown" if self.share is None else f"{round(100 * self.share)} % from the original memory"


@dataclass(frozen=True)
class Example:
    """One prompt with what the model wrote."""

    label: str
    seed: str
    task: str
    role: str
    prompt: str
    reference: str
    pieces: list[Piece]

    @property
    def mean_share(self) -> float | None:
        """Mean share of the original memory over the generated tokens."""
        shares = [piece.share for piece in self.pieces if piece.share is not None]
        return fmean(shares) if shares else None


def examples(study: Study) -> tuple[list[Example], list[Example]]:
    """The examples of the first method and seed, and those of all others: target prompts first, far ones last."""
    order = {"target": 0, **{family: place + 1 for place, family in enumerate(FAMILIES)}}
    found = [_example(study, entry) for entry in study.lens]
    groups = list(dict.fromkeys((example.label, example.seed) for example in found))
    found.sort(key=lambda example: (groups.index((example.label, example.seed)), order[example.role]))
    first = [example for example in found if (example.label, example.seed) == groups[0]]
    return first, found[len(first) :]


def _example(study: Study, entry: dict[str, Any]) -> Example:
    task = study.tasks.get(entry.get("task") or "")
    return Example(
        label=study.label(str(entry.get("method") or "")),
        seed=str(entry.get("seed", "")),
        task=str(entry.get("task") or ""),
        role="other" if task is None else "target" if task.role == "target" else task.family,
        prompt=str(entry.get("prompt") or ""),
        reference=str(entry.get("reference") or ""),
        pieces=[_piece(token) for token in entry.get("tokens") or []],
    )


def _piece(token: dict[str, Any]) -> Piece:
    raw = str(token.get("text") or "")
    body = raw.strip()
    space = raw[: len(raw) - len(raw.lstrip())] if body else ""
    breaks = "\n" * raw.count("\n")
    # A token of white space alone still has a share, so it needs something to show it on.
    text = body or ("⏎" if breaks else "␣")
    share = finite(token.get("original_share"))
    tail = raw[len(raw.rstrip()) :] if body else breaks
    return Piece(space, text, tail, None if share is None else min(max(share, 0.0), 1.0))
