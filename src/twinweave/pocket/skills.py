"""Small skills over words, letters and numbers: the question, and the one right answer.

Each function makes one (prompt, completion) from a random generator. Knows nothing about the world's people.
"""

import random
from collections.abc import Callable

from twinweave.pocket.words import LARGEST_TERM, LETTERS, WORDS

Pair = tuple[str, str]

COPY = "Copy the words {list}."
PICK = "Name the {place} of the words {list}."
LETTER = "Which letter is {distance} {side} {letter}?"
SUM = "What is {a} plus {b}?"
REVERSE = "Reverse the words {list}."
SHIFT = "Shift the letters {list}."
SORT = "Sort the letters {list}."
ORDINALS = ("first", "second", "third")
SIDES = {"after": 1, "before": -1}
DISTANCES = (1, 2, 3)
TEMPLATES = (COPY, PICK, LETTER, SUM, REVERSE, SHIFT, SORT, *ORDINALS, *SIDES)


def copy(rng: random.Random) -> Pair:
    """Three words, said again."""
    chosen = " ".join(rng.sample(WORDS, 3))
    return COPY.format(list=chosen), chosen


def pick(rng: random.Random) -> Pair:
    """The first, second or third of three words."""
    chosen = rng.sample(WORDS, 3)
    place = rng.randrange(3)
    return PICK.format(place=ORDINALS[place], list=" ".join(chosen)), chosen[place]


def all_letters() -> list[Pair]:
    """Every question about the letter one to three places after or before another."""
    pairs = []
    for index, letter in enumerate(LETTERS):
        for distance in DISTANCES:
            for side, sign in SIDES.items():
                answer = index + sign * distance
                if 0 <= answer < len(LETTERS):
                    prompt = LETTER.format(distance=distance, side=side, letter=letter)
                    pairs.append((prompt, LETTERS[answer]))
    return pairs


def all_sums() -> list[Pair]:
    """Every sum of two numbers up to `LARGEST_TERM`."""
    terms = range(LARGEST_TERM + 1)
    return [(SUM.format(a=a, b=b), str(a + b)) for a in terms for b in terms]


def reverse(rng: random.Random) -> Pair:
    """Three words, last first."""
    chosen = rng.sample(WORDS, 3)
    return REVERSE.format(list=" ".join(chosen)), " ".join(reversed(chosen))


def shift(rng: random.Random) -> Pair:
    """Three letters, each replaced by the next one of the alphabet."""
    places = rng.sample(range(len(LETTERS) - 1), 3)
    shown = " ".join(LETTERS[place] for place in places)
    return SHIFT.format(list=shown), " ".join(LETTERS[place + 1] for place in places)


def sort(rng: random.Random) -> Pair:
    """Four letters in the order of the alphabet."""
    chosen = rng.sample(LETTERS, 4)
    return SORT.format(list=" ".join(chosen)), " ".join(sorted(chosen))


# Known to the base, and without end: told apart from the targets, which the base has never seen.
KNOWN_SKILLS: dict[str, Callable[[random.Random], Pair]] = {"copy": copy, "pick": pick}
NEW_SKILLS: dict[str, Callable[[random.Random], Pair]] = {"reverse": reverse, "shift": shift, "sort": sort}
