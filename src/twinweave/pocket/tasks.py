"""The pocket world as rows of data and as tasks: what the base must keep, and what it can be taught.

Every row is a `prompt` with its `completion`, as in any user's file; `documents` and `text` have columns of
their own, and `contexts` and `memories` have a `context` too. Knows nothing about tokens or models.
"""

import random
from collections.abc import Callable
from functools import cache
from typing import Any

from twinweave.errors import UsageError, unknown_name
from twinweave.pocket import contexts, language, skills
from twinweave.pocket.world import RELATIONS, TOWN_RELATIONS, Person, World, make_world

Row = dict[str, Any]

TEST_ROWS = 150
TRAIN_ROWS = 2000


def rows(name: str) -> list[Row]:
    """The rows of one data set, always the same ones.

    Raises:
        UsageError: no data set has this name; the message suggests the nearest one.
    """
    makers = _makers()
    if name not in makers:
        raise UsageError(unknown_name("pocket data set", name, makers))
    return [dict(row) for row in _cached_rows(name)]


def names() -> list[str]:
    """The names that `rows` accepts."""
    return list(_makers())


@cache
def _cached_rows(name: str) -> list[Row]:
    return _makers()[name]()


def _makers() -> dict[str, Callable[[], list[Row]]]:
    world = make_world()
    makers: dict[str, Callable[[], list[Row]]] = {}
    for relation in RELATIONS:
        makers[f"people_{relation}/test"] = lambda r=relation: _people_rows(world, r)  # type: ignore[misc]
    makers["people_land/test"] = lambda: _land_rows(world)
    makers["towns/test"] = lambda: _pairs_to_rows(town_pairs(world))
    makers["sums/test"] = lambda: _sample(skills.all_sums(), "sums")
    makers["letters/test"] = lambda: _sample(skills.all_letters(), "letters")
    for skill in skills.KNOWN_SKILLS:
        makers[f"{skill}/test"] = lambda s=skill: _pairs_to_rows(held_out(s))  # type: ignore[misc]
    makers["reading/test"] = lambda: _reading_rows(world)
    for skill in skills.NEW_SKILLS:
        makers[f"{skill}/train"] = lambda s=skill: _new_skill_rows(s)  # type: ignore[misc]
        makers[f"{skill}/test"] = lambda s=skill: _pairs_to_rows(held_out(s))  # type: ignore[misc]
    makers["newcomers/train"] = lambda: _newcomer_rows(world)[0]
    makers["newcomers/test"] = lambda: _newcomer_rows(world)[1]
    makers["documents"] = lambda: _documents(world)
    makers["documents/questions"] = lambda: _document_questions(world)
    makers["contexts/train"] = lambda: contexts.training_rows(world, _generator("contexts/train"))
    makers["contexts/test"] = lambda: _context_rows(world)
    makers["memories/train"] = lambda: contexts.memory_rows(world, _generator("memories/train"))
    makers["text"] = _text_rows
    return makers


def _generator(name: str) -> random.Random:
    return random.Random(f"pocket rows {name}")


def _pairs_to_rows(pairs: list[skills.Pair]) -> list[Row]:
    return [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]


def _sample(pairs: list[skills.Pair], name: str) -> list[Row]:
    chosen = _generator(name).sample(pairs, min(TEST_ROWS, len(pairs)))
    return _pairs_to_rows(chosen)


@cache
def known_pairs(world: World, relation: str) -> list[list[skills.Pair]]:
    """For each known person, the question in both forms with its answer."""
    return [
        [(language.question(relation, person.name, form), person.facts[relation]) for form in (0, 1)]
        for person in world.known
    ]


@cache
def land_pairs(world: World) -> list[skills.Pair]:
    """The land that each known person lives in, which follows from the person's town."""
    return [
        (language.LAND_QUESTION.format(n=person.name), world.towns[person.facts["town"]]["land"])
        for person in world.known
    ]


@cache
def town_pairs(world: World) -> list[skills.Pair]:
    """Every question about a town."""
    return [
        (language.TOWN_QUESTIONS[relation].format(n=town), facts[relation])
        for town, facts in world.towns.items()
        for relation in TOWN_RELATIONS
    ]


def _people_rows(world: World, relation: str) -> list[Row]:
    rng = _generator(f"people_{relation}")
    chosen = rng.sample(known_pairs(world, relation), TEST_ROWS)
    return _pairs_to_rows([rng.choice(forms) for forms in chosen])


def _land_rows(world: World) -> list[Row]:
    return _sample(land_pairs(world), "people_land")


@cache
def held_out(skill: str) -> list[skills.Pair]:
    """The test pairs of a skill without end; training of any kind must leave them out."""
    rng, make = _generator(f"{skill}/test"), {**skills.KNOWN_SKILLS, **skills.NEW_SKILLS}[skill]
    pairs: dict[str, str] = {}
    while len(pairs) < TEST_ROWS:
        pairs.update([make(rng)])
    return list(pairs.items())


def _new_skill_rows(skill: str) -> list[Row]:
    rng, make = _generator(f"{skill}/train"), skills.NEW_SKILLS[skill]
    test = dict(held_out(skill))
    pairs: dict[str, str] = {}
    while len(pairs) < TRAIN_ROWS:
        prompt, completion = make(rng)
        if prompt not in test:
            pairs[prompt] = completion
    return _pairs_to_rows(list(pairs.items()))


def _newcomer_rows(world: World) -> tuple[list[Row], list[Row]]:
    """Each fact is taught in one form and half of them in the other too; the test asks the rest in the other."""
    rng = _generator("newcomers")
    train: list[skills.Pair] = []
    test: list[skills.Pair] = []
    for person in world.newcomers:
        for relation, value in person.facts.items():
            forms = [(language.question(relation, person.name, form), value) for form in (0, 1)]
            rng.shuffle(forms)
            train.append(forms[0])
            (train if rng.random() < 0.5 else test).append(forms[1])
    rng.shuffle(train)
    return _pairs_to_rows(train), _pairs_to_rows(test)


def _reading_rows(world: World) -> list[Row]:
    """A text about one document person each, with one question right behind it."""
    rng = _generator("reading")
    pairs = []
    for _ in range(TEST_ROWS):
        person, relation = rng.choice(world.document_people), rng.choice(list(RELATIONS))
        asked = language.question(relation, person.name, rng.randrange(2))
        pairs.append((f"{language.document([person], rng)} {asked}", person.facts[relation]))
    return _pairs_to_rows(pairs)


def _document_id(person: Person) -> str:
    return person.name.lower().replace(" ", "-")


def _documents(world: World) -> list[Row]:
    rng = _generator("documents")
    return [
        {"id": _document_id(person), "text": language.document([person], rng), "person": person.name}
        for person in world.document_people
    ]


def _document_questions(world: World) -> list[Row]:
    rng = _generator("documents/questions")
    return [
        {
            "prompt": language.question(relation, person.name, rng.randrange(2)),
            "completion": value,
            "document": _document_id(person),
        }
        for person in world.document_people
        for relation, value in person.facts.items()
    ]


def _context_rows(world: World) -> list[Row]:
    """Questions about document people, each with the one document that tells of them."""
    texts = {row["id"]: row["text"] for row in _documents(world)}
    chosen = _generator("contexts/test").sample(_document_questions(world), TEST_ROWS)
    return [
        {"context": [texts[row["document"]]], "prompt": row["prompt"], "completion": row["completion"]}
        for row in chosen
    ]


def _text_rows() -> list[Row]:
    from twinweave.pocket.corpus import sample_question, sample_text  # which imports this module

    rng = _generator("text")
    texts = []
    for index in range(TEST_ROWS):
        prompt, completion = (sample_question(rng) if index % 3 else sample_text(rng, rng.randint(1, 3)))[0]
        texts.append(f"{prompt} {completion}".strip())
    return [{"text": text} for text in texts]


def _task(name: str, role: str, family: str | None, max_new_tokens: int, description: str) -> dict[str, Any]:
    return {
        "name": name,
        "kind": "generation",
        "data": f"pocket:{name}/test",
        "metrics": ["exact_match"],
        "family": family,
        "max_new_tokens": max_new_tokens,
        "description": description,
        "role": role,
    }


TASKS: list[dict[str, Any]] = [
    _task("people_town", "retained", "far", 4, "where each of 250 known people lives"),
    _task("people_job", "retained", "far", 4, "the job of each known person"),
    _task("people_pet", "retained", "far", 4, "the pet of each known person"),
    _task("people_colour", "retained", "far", 4, "the favourite colour of each known person"),
    _task("people_land", "retained", "far", 4, "the land each known person lives in"),
    _task("towns", "retained", "far", 4, "land, river and goods of 40 towns"),
    _task("sums", "retained", "far", 4, "sums of two numbers up to 12"),
    _task("reading", "retained", "far", 4, "answers read in a text about people the base never met"),
    _task("letters", "retained", "near", 4, "the letter a few places after or before another"),
    _task("copy", "retained", "near", 6, "three words, said again"),
    _task("pick", "retained", "near", 4, "the first, second or third of three words"),
    _task("reverse", "target", None, 6, "three words, last first (easy)"),
    _task("shift", "target", None, 6, "three letters, each replaced by the next of the alphabet (medium)"),
    _task("sort", "target", None, 7, "four letters in the order of the alphabet (hard)"),
    _task("newcomers", "target", None, 4, "facts about 40 people the base never met, asked in another form"),
]


# To a fine-tuning on facts about people, other facts about people are near and word lists are far.
_NEAR_TO_NEWCOMERS = {"people_town", "people_job", "people_pet", "people_colour", "people_land"}


def retained_tasks(target: str) -> list[dict[str, Any]]:
    """What should be kept when `target` is taught, without the role mark, with families as seen from it.

    Raises:
        UsageError: no target has this name; the message suggests the nearest one.
    """
    targets = [task["name"] for task in TASKS if task["role"] == "target"]
    if target not in targets:
        raise UsageError(unknown_name("pocket target", target, targets))
    result = []
    for task in TASKS:
        if task["role"] == "retained":
            plain = {key: value for key, value in task.items() if key != "role"}
            if target == "newcomers":
                plain["family"] = "near" if task["name"] in _NEAR_TO_NEWCOMERS else "far"
            result.append(plain)
    return result
