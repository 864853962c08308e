"""What the base model reads while it is trained: an endless, seeded stream of texts and questions.

A sequence is a list of turns (prompt, completion); a plain text has an empty prompt. The test rows of skills
and the names of newcomers and document people never occur. Knows nothing about models.
"""

import random
from collections.abc import Callable

from twinweave.pocket import language, skills, tasks
from twinweave.pocket.words import TOWNS
from twinweave.pocket.world import RELATIONS, Person, World, make_world

Turn = tuple[str, str]

# Asked about one text, so that little of the time goes into texts themselves.
QUESTIONS = 8


def sample_question(rng: random.Random) -> list[Turn]:
    """One question with its answer, to be known by heart or by skill."""
    makers, weights = zip(*_SHARES, strict=True)
    return [rng.choices(makers, weights)[0](make_world(), rng)]


def sample_text(rng: random.Random, people: int) -> list[Turn]:
    """A text about so many strangers with questions behind it, or one about what is known without any.

    Texts of the same number of people have about the same length.
    """
    world = make_world()
    kind = rng.random()
    if kind < 0.8:
        return _reading(world, rng, people)
    if kind < 0.95:
        return [("", language.document(rng.sample(world.known, people), rng))]
    towns = rng.sample(TOWNS, people)
    return [("", " ".join(language.town_document(world, town, rng) for town in towns))]


def _reading(world: World, rng: random.Random, count: int) -> list[Turn]:
    people: list[Person] = []
    for _ in range(count):
        people.append(world.stranger(rng, frozenset(person.name for person in people)))
    asked = [(person, relation) for person in people for relation in RELATIONS]
    turns = [
        (language.question(relation, person.name, rng.randrange(2)), person.facts[relation])
        for person, relation in rng.sample(asked, min(len(asked), QUESTIONS))
    ]
    first_question, first_answer = turns[0]
    return [(f"{language.document(people, rng)} {first_question}", first_answer), *turns[1:]]


def _known_person(world: World, rng: random.Random) -> Turn:
    return rng.choice(rng.choice(tasks.known_pairs(world, rng.choice(list(RELATIONS)))))


def _skill(name: str) -> Callable[[World, random.Random], Turn]:
    def make(world: World, rng: random.Random) -> Turn:
        test = dict(tasks.held_out(name))
        while True:
            prompt, completion = skills.KNOWN_SKILLS[name](rng)
            if prompt not in test:
                return prompt, completion

    return make


_SHARES: list[tuple[Callable[[World, random.Random], Turn], float]] = [
    (_known_person, 0.40),
    (lambda world, rng: rng.choice(tasks.land_pairs(world)), 0.08),
    (lambda world, rng: rng.choice(tasks.town_pairs(world)), 0.06),
    (lambda world, rng: rng.choice(skills.all_sums()), 0.12),
    (lambda world, rng: rng.choice(skills.all_letters()), 0.12),
    (_skill("copy"), 0.08),
    (_skill("pick"), 0.14),
]
