"""How much of what the base could do is still there. Knows nothing about models or tasks, only about their scores."""

from collections.abc import Mapping

from twinweave.errors import UsageError


def retained_score(scores: Mapping[str, float], higher_is_better: Mapping[str, bool]) -> float:
    """The mean score over retained tasks, losses negated, so that more is always better.

    Raises:
        UsageError: there is no task, or one without a direction.
    """
    if not scores:
        raise UsageError("No retained task was scored, so there is nothing to measure forgetting on. Add one.")
    missing = sorted(set(scores) - set(higher_is_better))
    if missing:
        raise UsageError(f"No direction is known for: {', '.join(missing)}. Say whether higher is better.")
    return sum(score if higher_is_better[task] else -score for task, score in scores.items()) / len(scores)


def forgetting(base: Mapping[str, float], scores: Mapping[str, float], higher_is_better: Mapping[str, bool]) -> float:
    """The mean loss of score against the base: 0 is nothing forgotten, negative is better than the base.

    Per task it is base - score where higher is better, and score - base for losses. The unit is the tasks' own.

    Raises:
        UsageError: base and run were not scored on the same tasks, or on none.
    """
    if set(base) != set(scores):
        differing = sorted(set(base) ^ set(scores))
        raise UsageError(f"Base and run were not scored on the same retained tasks: {', '.join(differing)}.")
    return retained_score(base, higher_is_better) - retained_score(scores, higher_is_better)
