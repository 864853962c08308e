"""Contexts to read with questions about them: rows {context, prompt, completion}, the context a list of documents.

To train on: strangers, with 1 to 16 documents in a context, or with the one about them and everything that can be
asked of it. To test on: document people, of whom no training tells.
Knows nothing about tokens or models.
"""

import random
from typing import Any

from twinweave.pocket import language
from twinweave.pocket.world import RELATIONS, Person, World

CONTEXTS = 4000
DOCUMENTS = (1, 2, 4, 8, 16)
FEWEST_QUESTIONS, MOST_QUESTIONS = 8, 16
MEMORIES = 6000


def training_rows(world: World, rng: random.Random) -> list[dict[str, Any]]:
    """8 to 16 questions each about `CONTEXTS` contexts, neighbours where they have the same context."""
    rows: list[dict[str, Any]] = []
    for _ in range(CONTEXTS):
        people = strangers(world, rng, rng.choice(DOCUMENTS))
        context = [language.document([person], rng) for person in people]
        askable = [(person, relation, form) for person in people for relation in RELATIONS for form in (0, 1)]
        for person, relation, form in rng.sample(askable, min(len(askable), _questions(rng))):
            prompt = language.question(relation, person.name, form)
            rows.append({"context": context, "prompt": prompt, "completion": person.facts[relation]})
    return rows


def memory_rows(world: World, rng: random.Random) -> list[dict[str, Any]]:
    """All 8 questions each about `MEMORIES` documents, neighbours where they have the same one; no two are of people
    with the same name."""
    rows: list[dict[str, Any]] = []
    for person in strangers(world, rng, MEMORIES):
        context = [language.document([person], rng)]
        for relation, value in person.facts.items():
            for form in (0, 1):
                prompt = language.question(relation, person.name, form)
                rows.append({"context": context, "prompt": prompt, "completion": value})
    return rows


def strangers(world: World, rng: random.Random, count: int) -> list[Person]:
    """So many people of different names, none of them reserved."""
    found: dict[str, Person] = {}
    while len(found) < count:
        person = world.stranger(rng)
        found.setdefault(person.name, person)
    return list(found.values())


def _questions(rng: random.Random) -> int:
    return rng.randint(FEWEST_QUESTIONS, MOST_QUESTIONS)
