"""Numbers as people read them: fractions as points x100, nats with three decimals, settings in few digits.

Knows nothing about results; a unit is the word a task declares ("fraction", "nats") or "mixed".
"""

import math
from collections.abc import Sequence

FRACTION, NATS, MIXED = "fraction", "nats", "mixed"
MISSING = "–"
MINUS = "−"


def finite(value: object) -> float | None:
    """`value` as a float, or None where there is no finite number (null, NaN, infinity, text)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def unit_word(unit: str) -> str:
    """The word behind a number: "points" for fractions (x100), "nats", "mixed units", or the unit itself."""
    return {FRACTION: "points", MIXED: "mixed units"}.get(unit, unit)


def scaled(value: float, unit: str) -> float:
    """The value as it is drawn and printed: fractions x100, everything else unchanged."""
    return 100.0 * value if unit == FRACTION else value


def number(value: float | None, unit: str, signed: bool = False) -> str:
    """A number without its unit: one decimal for points, three for the rest, a true minus sign."""
    if value is None:
        return MISSING
    decimals = 1 if unit == FRACTION else 3
    # Adding zero turns the -0.0 that rounding leaves behind into 0.0.
    shown = round(scaled(value, unit), decimals) + 0.0
    sign = MINUS if shown < 0 else "+" if signed and shown > 0 else ""
    return f"{sign}{abs(shown):.{decimals}f}"


def quantity(value: float | None, unit: str, signed: bool = False) -> str:
    """A number with its unit, as in "46.9 points" or "0.148 nats"; without a number, only a dash."""
    if value is None:
        return MISSING
    word = f"in {unit_word(unit)}" if unit == MIXED else unit_word(unit)
    return f"{number(value, unit, signed)} {word}"


def interval(bounds: Sequence[float] | None, unit: str, signed: bool = False) -> str:
    """An interval without its unit, as in "44.1 to 49.7"; an empty string where there is none."""
    return "" if bounds is None else f"{number(bounds[0], unit, signed)} to {number(bounds[1], unit, signed)}"


def setting_text(setting: dict[str, float]) -> str:
    """A point of a sweep in words, as in "scale 0.5"; an empty string for a method as it is."""
    return ", ".join(f"{key} {plain(value)}" for key, value in sorted(setting.items()))


def plain(value: object) -> str:
    """A setting's value in as few digits as it needs."""
    known = finite(value)
    return str(value) if known is None else f"{known:g}".replace("-", MINUS)


def count(value: object) -> str:
    """A whole number with thin separators between thousands, as in "1 234 567"."""
    known = finite(value)
    return MISSING if known is None else f"{round(known):,}".replace(",", "\u202f")


def amount(value: object, divisor: float = 1.0, decimals: int = 1) -> str:
    """A measured amount (seconds, tokens per second, bytes / divisor) with a fixed number of decimals."""
    known = finite(value)
    return MISSING if known is None else f"{known / divisor:,.{decimals}f}".replace(",", "\u202f")


def share(value: float) -> str:
    """A ratio in per cent, as in "12 %"; below ten with one decimal."""
    percent = 100.0 * value
    decimals = 1 if abs(percent) < 9.95 else 0
    shown = round(percent, decimals) + 0.0
    return f"{MINUS if shown < 0 else ''}{abs(shown):.{decimals}f} %"
