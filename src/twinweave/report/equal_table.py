"""The table of forgetting at equal target as plain rows of text. Knows nothing about HTML."""

from .canvas import looks
from .equal_finding import reference_name
from .equal_target import Against, Cost, Reach
from .html_tables import Cell, HtmlTable, key
from .study import Study, part_unit
from .units import MISSING, interval, number, setting_text, share, unit_word

_NAMES = {"all": "Forgetting", "near": "… near", "far": "… far"}


def equal_target(study: Study) -> HtmlTable | None:
    """One line per method, least forgetting first: what it forgets where it has plain PEFT's target, and on the way.

    None where nothing was measured at equal target.
    """
    equal = study.equal
    if not equal.parts:
        return None
    old, styles = reference_name(study), looks(study)
    columns = [part for part in equal.parts if part != "all"]
    head = [Cell("Method"), *(Cell(_NAMES[part], unit_word(part_unit(study, part))) for part in equal.parts)]
    head.append(Cell(f"Share of {old}’s", "all tasks"))
    head += [Cell(f"… {part}") for part in columns]
    if equal.best is not None and equal.best != equal.reference:
        head.append(Cell("Share of the best other’s", study.label(equal.best)))
    head += [Cell("On the way there", unit_word(study.forgetting_unit)), Cell("Seeds there")]
    table = HtmlTable(f"Forgetting at {old}’s target", head)
    for method in equal.ranked():
        reach = equal.at_target[method]
        costs = [reach.costs.get(part) for part in equal.parts]
        cells = [Cell(study.label(method), key=key(styles[method]) if method in styles else "")]
        cells += [_forgotten(study, cost, part) for cost, part in zip(costs, equal.parts, strict=True)]
        cells += [_share(cost.reference if cost else None) for cost in costs]
        if equal.best is not None and equal.best != equal.reference:
            cells.append(_share(costs[0].best if costs[0] else None))
        cells.append(_forgotten(study, equal.along.get(method, Reach(0, 0)).costs.get("all"), "all"))
        table.rows.append([*cells, Cell(f"{reach.reached} of {reach.seeds}")])
    return table


def level_note(study: Study) -> str:
    """In words: what "equal target" means here; an empty string where nothing was measured at equal target."""
    equal = study.equal
    if not equal.parts or equal.target is None:
        return ""
    unit = study.target_unit
    noun = "target score" if study.higher_is_better else "target loss"
    within = f"{number(equal.tolerance, unit)} {unit_word(unit)}"
    setting = setting_text(equal.reference_setting)
    tuned = f" ({study.label(equal.reference or '')}, {setting})" if setting else ""
    return (
        f"Equal target: {reference_name(study)}’s own {noun}{tuned} in each seed, to within {within}; on average "
        f"{number(equal.target, unit)}. A method that does better may leave some queries to the base, and what it "
        "forgets is read off its curve. Near and far are those of the same mixture. “On the way there” is the mean "
        "along the curve, from the base to that target."
    )


def _forgotten(study: Study, cost: Cost | None, part: str) -> Cell:
    unit = part_unit(study, part)
    return Cell(number(cost.mean, unit), interval(cost.ci, unit)) if cost else Cell(MISSING)


def _share(against: Against | None) -> Cell:
    if against is None or against.ratio is None:
        return Cell(MISSING)
    bounds = against.ratio_ci
    return Cell(share(against.ratio), f"{share(bounds[0])} to {share(bounds[1])}" if bounds else "")
