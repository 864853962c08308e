"""How the pocket world speaks: questions, sentences, and documents about its people and towns.

Answers are single words. Knows nothing about tokens, models, or which rows belong to which task.
"""

import random
from collections.abc import Sequence

from twinweave.pocket.world import RELATIONS, TOWN_RELATIONS, Person, World

# Two ways to ask for each relation; {n} is the name.
QUESTIONS: dict[str, tuple[str, str]] = {
    "town": ("Where does {n} live?", "Which town is the home of {n}?"),
    "job": ("What does {n} work as?", "Which job does {n} have?"),
    "pet": ("Which animal does {n} keep?", "What is the pet of {n}?"),
    "colour": ("What colour does {n} like best?", "Which colour is the favourite of {n}?"),
}
LAND_QUESTION = "In which land does {n} live?"
TOWN_QUESTIONS: dict[str, str] = {
    "land": "Which land is {n} in?",
    "river": "Which river runs through {n}?",
    "goods": "What is {n} known for?",
}

# Predicates follow a name and can be joined by "and"; statements are whole sentences. {v} is the value.
PREDICATES: dict[str, tuple[str, ...]] = {
    "town": ("lives in {v}", "has a home in {v}"),
    "job": ("works as a {v}", "has the job of a {v}"),
    "pet": ("keeps a {v}", "has a {v} as a pet"),
    "colour": ("likes {v} best", "has {v} as favourite colour"),
}
STATEMENTS: dict[str, str] = {
    "town": "The home of {n} is in {v}.",
    "job": "The job of {n} is that of a {v}.",
    "pet": "The pet of {n} is a {v}.",
    "colour": "The favourite colour of {n} is {v}.",
}
TOWN_STATEMENTS: dict[str, str] = {
    "land": "{n} is in {v}.",
    "river": "The river {v} runs through {n}.",
    "goods": "{n} is known for {v}.",
}


def question(relation: str, name: str, form: int) -> str:
    """The question for a relation of a person; `form` is 0 or 1."""
    return QUESTIONS[relation][form].format(n=name)


def sentences(person: Person, rng: random.Random) -> list[str]:
    """Two to four sentences that tell all four facts in a random order and phrasing; each names the person."""
    relations = rng.sample(list(RELATIONS), len(RELATIONS))
    result = []
    while relations:
        relation = relations.pop()
        if rng.random() < 0.3:
            result.append(STATEMENTS[relation].format(n=person.name, v=person.facts[relation]))
            continue
        clauses = [_predicate(person, relation, rng)]
        if relations and rng.random() < 0.5:
            clauses.append(_predicate(person, relations.pop(), rng))
        result.append(f"{person.name} {' and '.join(clauses)}.")
    return result


def _predicate(person: Person, relation: str, rng: random.Random) -> str:
    return rng.choice(PREDICATES[relation]).format(v=person.facts[relation])


def document(people: Sequence[Person], rng: random.Random) -> str:
    """One text about all these people: one after the other, or (one time in three) with sentences mixed."""
    parts = [sentences(person, rng) for person in people]
    flat = [sentence for part in parts for sentence in part]
    if len(people) > 1 and rng.random() < 1 / 3:
        rng.shuffle(flat)
    return " ".join(flat)


def town_document(world: World, town: str, rng: random.Random) -> str:
    """Three sentences about a town, in a random order."""
    relations = rng.sample(list(TOWN_RELATIONS), len(TOWN_RELATIONS))
    return " ".join(TOWN_STATEMENTS[r].format(n=town, v=world.towns[town][r]) for r in relations)
