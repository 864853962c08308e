"""The shipped memory model answers about people that neither it nor the base has met; the rest is the base's."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from twinweave import MemoryModel, pocket
from twinweave.pocket import language
from twinweave.pocket.world import RELATIONS, make_world

PEOPLE = 40
OPTIONS = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    base = AutoModelForCausalLM.from_pretrained(pocket.base_dir(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(pocket.base_dir())
    bank = tmp_path_factory.mktemp("bank") / "people.lance"
    model = MemoryModel.from_pretrained(pocket.memory_dir(), base, bank=bank, tokenizer=tokenizer)
    rng = random.Random(0)
    documents = [language.document([person], rng) for person in people()]
    model.memorize(documents, ids=[person.name for person in people()], batch_size=PEOPLE)
    return model


def people():
    return make_world().document_people[:PEOPLE]


def asked(persons):
    rng = random.Random(1)
    return [(language.question(r, p.name, rng.randrange(2)), p.facts[r]) for p in persons for r in RELATIONS]


def right(answers, questions):
    return sum(answer == fact for answer, (_, fact) in zip(answers, questions, strict=True)) / len(questions)


def test_it_answers_from_its_bank(memory):
    questions = asked(people())
    assert right(memory.generate([text for text, _ in questions], **OPTIONS), questions) > 0.9
    found = memory.search([text for text, _ in questions], top_k=1)
    assert [hits[0].id for hits in found] == [person.name for person in people() for _ in RELATIONS]
    bank = memory.bank.path
    memory.open_bank(None)
    try:
        assert right(memory.generate([text for text, _ in questions], **OPTIONS), questions) < 0.1
    finally:
        memory.open_bank(bank)


def test_what_the_base_knows_by_itself_it_still_knows(memory):
    questions = asked(make_world().known[:PEOPLE])
    assert right(memory.generate([text for text, _ in questions], **OPTIONS), questions) > 0.9


def test_what_is_shipped_is_small():
    assert sum(file.stat().st_size for file in pocket.memory_dir().iterdir()) < 4 * 2**20
