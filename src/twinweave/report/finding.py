"""The finding in one sentence, with its interval, and no stronger than the numbers allow.

Forgetting at equal target comes first, where it was measured. An interval that holds equality gives "no difference
could be shown"; one seed gives no interval and says so.
"""

from typing import Any

from .equal_finding import at_equal_target
from .equal_target import Difference, verdict
from .reading import read_study
from .study import Comparison, Row, Study
from .units import MIXED, interval, number, quantity, setting_text


def finding(results: dict[str, Any]) -> str:
    """What the results show about learning and forgetting, in one sentence with its 95% interval.

    Speaks about IMSM against plain PEFT and the best other method at equal target, else about IMSM against plain PEFT,
    else about the first comparison there is.

    Raises:
        DamagedFileError: `results` is not the contents of a `results.json`.
    """
    return study_finding(read_study(results))


def study_finding(study: Study) -> str:
    """The finding of results that are already read."""
    comparison = leading_comparison(study)
    sentence = at_equal_target(study)
    if sentence is None:
        sentence = _alone(study) if comparison is None else _compared(study, comparison)
    return sentence[0].upper() + sentence[1:] + "."


def leading_comparison(study: Study) -> Comparison | None:
    """The comparison the finding is about: IMSM against plain PEFT if there is one, else the first."""
    known = [c for c in study.comparisons if c.target.mean is not None or c.forgetting.mean is not None]
    known.sort(key=lambda c: bool(c.setting))  # a method as it is before any point of a sweep
    wanted = [c for c in known if (c.method, c.against, c.setting) == ("imsm", "peft", {})]
    return next(iter(wanted + known), None)


def _compared(study: Study, comparison: Comparison) -> str:
    new, old = study.label(comparison.method), study.label(comparison.against)
    if comparison.setting:
        new += f" at {setting_text(comparison.setting)}"
    lead = ""
    if comparison.forgetting.ci is None and comparison.target.ci is None:
        seeds = "one seed" if comparison.seeds == 1 else f"{comparison.seeds} seeds"
        lead = f"with {seeds}, so without an interval: " if comparison.seeds == 1 else f"no interval ({seeds}): "
    if comparison.forgetting.mean is None:
        learned = _learned(study, comparison, f"{new} has", f" than {old}")
        return f"{lead}{learned}; no retained task was measured, so nothing can be said about forgetting"
    forgot = _forgot(study, comparison, new, old)
    if comparison.target.mean is None:
        return f"{lead}{forgot}; the target was not measured"
    kept = verdict(comparison.forgetting, lower_is_better=True)
    learned = verdict(comparison.target, lower_is_better=not study.higher_is_better)
    joint = "but" if {kept, learned} == {"better", "worse"} else "and"
    return f"{lead}{forgot}, {joint} {_learned(study, comparison, 'it has', '')}"


def _forgot(study: Study, comparison: Comparison, new: str, old: str) -> str:
    unit = study.forgetting_unit
    difference, seeds = comparison.forgetting, f"{comparison.seeds} seeds"
    values = [_row(study, comparison.method, comparison.setting), _row(study, comparison.against, {})]
    levels = [number(row.forgetting, unit) for row in values if row and row.forgetting is not None]
    against = f"; forgetting {levels[0]} against {levels[1]}" if len(levels) == 2 else ""
    measure = quantity
    if unit == MIXED:
        against, measure = f"{against or '; forgetting'}, in mixed units", number
    if verdict(difference, True) == "not shown":
        return (
            f"no difference in forgetting could be shown between {new} and {old} "
            f"({measure(difference.mean, unit, signed=True)}, 95% interval "
            f"{interval(difference.ci, unit, signed=True)}, {seeds}{against})"
        )
    assert difference.mean is not None
    size = measure(abs(difference.mean), unit)
    way = "less" if difference.mean < 0 else "more"
    if difference.mean == 0:
        return f"{new} forgets as much as {old}{against.replace('; ', ' (', 1) + ')' if against else ''}"
    if difference.ci is None:
        return f"{new} forgets {size} {way} than {old}{' (' + against[2:] + ')' if against else ''}"
    return f"{new} forgets {size} {way} than {old} (95% interval {_sizes(difference, unit)}, {seeds}{against})"


def _learned(study: Study, comparison: Comparison, subject: str, than: str) -> str:
    unit, difference = study.target_unit, comparison.target
    noun = "target score" if study.higher_is_better else "target loss"
    state = verdict(difference, not study.higher_is_better)
    if state == "not shown":
        return (
            f"no difference in the {noun} could be shown ({quantity(difference.mean, unit, signed=True)}, "
            f"95% interval {interval(difference.ci, unit, signed=True)})"
        )
    assert difference.mean is not None
    if difference.mean == 0:
        return f"{subject} the same {noun}"
    way = "higher" if difference.mean > 0 else "lower"
    bounds = "" if difference.ci is None else f" (95% interval {_sizes(difference, unit)})"
    return f"{subject} a {noun} {quantity(abs(difference.mean), unit)} {way}{than}{bounds}"


def _sizes(difference: Difference, unit: str) -> str:
    """The interval of a difference whose direction the sentence already gives in words."""
    assert difference.ci is not None
    low, high = sorted(abs(bound) for bound in difference.ci)
    return interval((low, high), unit)


def _row(study: Study, method: str, setting: dict[str, float]) -> Row | None:
    return next((row for row in study.rows if row.method == method and row.setting == setting), None)


def _alone(study: Study) -> str:
    """Without a comparison: what the methods reached, and from where."""
    rows = study.plain_rows() or study.rows
    if len(rows) > 1:
        return f"these results hold {len(rows)} settings and no paired comparison, so no difference is claimed"
    row = rows[0]
    noun = "target score" if study.higher_is_better else "target loss"
    unit = study.target_unit
    base = study.base_target
    parts = []
    if row.target is not None:
        start = f" from {number(base, unit)}" if base is not None else ""
        parts.append(f"{row.label} took the {noun}{start} to {quantity(row.target, unit)}{_ci(row.target_ci, unit)}")
    else:
        parts.append(f"the target of {row.label} was not measured")
    if row.forgetting is not None:
        unit = study.forgetting_unit
        parts.append(f"and its forgetting is {quantity(row.forgetting, unit)}{_ci(row.forgetting_ci, unit)}")
    sentence = ", ".join(parts)
    if row.forgetting is None:
        sentence += "; no retained task was measured, so nothing can be said about forgetting"
    if row.target_ci is None and row.forgetting_ci is None:
        sentence += " (one seed, so no interval)" if row.seeds == 1 else f" ({row.seeds} seeds, no interval)"
    return sentence


def _ci(bounds: tuple[float, float] | None, unit: str) -> str:
    return "" if bounds is None else f" (95% interval {interval(bounds, unit)})"
