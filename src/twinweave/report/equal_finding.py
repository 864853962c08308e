"""The finding about forgetting at equal target, in one sentence and no stronger than the numbers allow.

A difference is claimed only where its 95 % interval leaves out equality; a target that is not reached is said first.
"""

from .equal_target import Against, Cost, Reach, verdict
from .study import Study
from .units import interval, number, quantity, share


def at_equal_target(study: Study) -> str | None:
    """The sentence without its full stop; None where nothing was measured at equal target, or no method leads."""
    equal = study.equal
    lead = equal.lead()
    if lead is None or equal.reference is None:
        return None
    reach, name, old = equal.at_target[lead], study.label(lead), reference_name(study)
    cost = reach.costs.get("all")
    if cost is None:
        return f"{name} does not reach {old}'s target {_never(reach.seeds)}, so there is no equal target to compare at"
    lead_in = "with one seed, so without an interval: " if reach.seeds == 1 else ""
    where = f"at {old}'s target {name}"
    if reach.reached < reach.seeds:
        where = f"{name} reaches {old}'s target in {reach.reached} of {reach.seeds} seeds, and there it"
    parts = [f"{lead_in}{where} {_against_reference(study, cost, old)}"]
    if other := _against_best(study, lead, cost):
        parts.append(other)
    return "; ".join(parts)


def reference_name(study: Study) -> str:
    """Plain PEFT as readers know it; "tuned" where another setting than the recipe's own has the best target."""
    equal = study.equal
    return f"tuned {study.label('peft')}" if equal.reference_setting else study.label(equal.reference or "")


def share_text(against: Against | None) -> str:
    """The ratio with its interval in words, as in "14 % (12 % to 17 %)"; an empty string where there is none."""
    if against is None or against.ratio is None:
        return ""
    bounds = against.ratio_ci
    return share(against.ratio) + (f" ({share(bounds[0])} to {share(bounds[1])})" if bounds else "")


def _against_reference(study: Study, cost: Cost, old: str) -> str:
    unit, against = study.forgetting_unit, cost.reference
    if against is None or against.difference.mean is None:
        return f"forgets {quantity(cost.mean, unit)}"
    theirs = cost.mean - against.difference.mean
    state = verdict(against.difference, lower_is_better=True)
    if state == "not shown":
        return (
            f"forgets {quantity(cost.mean, unit)} where {old} forgets {number(theirs, unit)}, and no difference could "
            f"be shown ({_difference(against, unit)})"
        )
    if against.ratio is not None and 0 <= against.ratio < 1:
        bounds = against.ratio_ci
        # Without a bounded ratio the difference still has its interval.
        within = f"95% interval {share(bounds[0])} to {share(bounds[1])}" if bounds else _difference(against, unit)
        within = f" ({within})" if state != "unclear" else ""
        return f"forgets {quantity(cost.mean, unit)}, {share(against.ratio)} of {old}'s {number(theirs, unit)}{within}"
    way = "less" if against.difference.mean < 0 else "more" if against.difference.mean > 0 else "no less"
    within = f" ({_difference(against, unit)})" if state != "unclear" else ""
    return f"forgets {quantity(cost.mean, unit)}, {way} than {old}'s {number(theirs, unit)}{within}"


def _against_best(study: Study, lead: str, cost: Cost) -> str | None:
    equal = study.equal
    if equal.best is None or equal.best in (lead, equal.reference) or cost.best is None:
        return None
    reach = equal.at_target[equal.best]
    theirs = reach.costs["all"].mean
    unit, against = study.forgetting_unit, cost.best
    seldom = f" (in the {reach.reached} of {reach.seeds} seeds that reach it)" if _seldom(reach) else ""
    sentence = f"the best other method, {study.label(equal.best)}, forgets {number(theirs, unit)}{seldom}"
    state = verdict(against.difference, lower_is_better=True)
    if state == "unclear":
        return sentence
    if state == "not shown":
        return f"{sentence}, and no difference from it could be shown ({_difference(against, unit)})"
    assert against.difference.mean is not None
    assert against.difference.ci is not None
    sizes = sorted(abs(bound) for bound in against.difference.ci)
    way = "more" if state == "better" else "less"
    by = f"by {number(abs(against.difference.mean), unit)}, 95% interval {interval(sizes, unit)}"
    return f"{sentence}, which is {way} ({by})"


def _difference(against: Against, unit: str) -> str:
    known = against.difference
    bounds = interval(known.ci, unit, signed=True)
    return f"difference {number(known.mean, unit, signed=True)}, 95% interval {bounds}"


def _seldom(reach: Reach) -> bool:
    return reach.reached < reach.seeds


def _never(seeds: int) -> str:
    return "with its one seed" if seeds == 1 else f"in any of {seeds} seeds"
