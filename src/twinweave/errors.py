"""The errors a user can cause. Each message names the offending value and says what to do about it.

Knows nothing about models, data or the command line; the command line turns `exit_code` into its exit status.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class TwinweaveError(Exception):
    """Something the user can mend: the message says what was found and how to mend it."""

    exit_code = 1


class UsageError(TwinweaveError):
    """The request itself is malformed (a recipe, an option, a name); nothing was started."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe with an unknown key, a bad value, or parts that contradict each other."""


class DataError(TwinweaveError):
    """Training or evaluation data that cannot be used as it is."""


class UnsupportedModelError(TwinweaveError):
    """A model, tokenizer or adapter that cannot carry the requested method."""


class BaseMismatchError(TwinweaveError):
    """A saved model was made for another base than the one it is being loaded onto."""


class DamagedFileError(TwinweaveError):
    """A saved file is missing, truncated, or not of the format its name promises."""


class TrainingError(TwinweaveError):
    """Training cannot go on (for example: the loss is not a number, or the disk is full)."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """One sentence for a name that does not exist, with the nearest existing one if any is near.

    `kind` is the noun ("task", "method", "recipe key"); `known` are the names that would have worked.
    """
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(names)}."
    return f"Unknown {kind} '{name}'. {hint}"
