"""The pocket world: who lives in it and what is true of them, drawn from one seed.

Three groups of people have names that never meet: *known* people (the base is taught their facts), *newcomers*
(facts to learn in fine-tuning) and *document people* (facts to read). Anybody else is a *stranger*, invented
for one text. Knows nothing about sentences, tokens or models.
"""

import random
from dataclasses import dataclass
from functools import lru_cache

from twinweave.pocket import words

RELATIONS: dict[str, list[str]] = {
    "town": words.TOWNS,
    "job": words.JOBS,
    "pet": words.PETS,
    "colour": words.COLOURS,
}
TOWN_RELATIONS: dict[str, list[str]] = {"land": words.LANDS, "river": words.RIVERS, "goods": words.GOODS}

KNOWN_PEOPLE = 250
NEWCOMERS = 40
DOCUMENT_PEOPLE = 120


@dataclass(frozen=True)
class Person:
    """A full name (two words) and one value for each of `RELATIONS`."""

    name: str
    facts: dict[str, str]


@dataclass(frozen=True, eq=False)
class World:
    """Everything that is true. `towns` maps a town to one value for each of `TOWN_RELATIONS`."""

    seed: int
    known: list[Person]
    newcomers: list[Person]
    document_people: list[Person]
    towns: dict[str, dict[str, str]]
    reserved_names: frozenset[str]

    def stranger(self, rng: random.Random, taken: frozenset[str] = frozenset()) -> Person:
        """Someone with random facts, whose name is neither reserved nor in `taken`."""
        while True:
            name = f"{rng.choice(words.FIRST_NAMES)} {rng.choice(words.LAST_NAMES)}"
            if name not in self.reserved_names and name not in taken:
                return Person(name, _random_facts(rng))


@lru_cache(maxsize=4)
def make_world(seed: int = 0) -> World:
    """The world of this seed: always the same."""
    rng = random.Random(f"pocket world {seed}")
    every_name = [f"{first} {last}" for first in words.FIRST_NAMES for last in words.LAST_NAMES]
    names = rng.sample(every_name, KNOWN_PEOPLE + NEWCOMERS + DOCUMENT_PEOPLE)
    people = [Person(name, _random_facts(rng)) for name in names]
    towns = {
        town: {relation: rng.choice(values) for relation, values in TOWN_RELATIONS.items()} for town in words.TOWNS
    }
    return World(
        seed=seed,
        known=people[:KNOWN_PEOPLE],
        newcomers=people[KNOWN_PEOPLE : KNOWN_PEOPLE + NEWCOMERS],
        document_people=people[KNOWN_PEOPLE + NEWCOMERS :],
        towns=towns,
        reserved_names=frozenset(names),
    )


def _random_facts(rng: random.Random) -> dict[str, str]:
    return {relation: rng.choice(values) for relation, values in RELATIONS.items()}
