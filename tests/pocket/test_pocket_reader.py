"""The shipped generator of adapters answers about people that neither it nor the base has met."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from twinweave import GenerativeAdapter, pocket
from twinweave.data import encode_prompt
from twinweave.evaluation.generate import generate_texts
from twinweave.pocket import language
from twinweave.pocket.world import RELATIONS, make_world


@pytest.fixture(scope="module")
def reader():
    base = AutoModelForCausalLM.from_pretrained(pocket.base_dir(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(pocket.base_dir())
    return GenerativeAdapter.from_pretrained(pocket.reader_dir(), base, tokenizer=tokenizer)


def right(reader, questions, before=""):
    prompts = [encode_prompt(f"{before} {text}".strip(), reader.tokenizer, max_length=4096)[0] for text, _ in questions]
    answers = generate_texts(reader.base, reader.tokenizer, prompts, max_new_tokens=4, batch_size=32)
    return sum(answer == fact for answer, (_, fact) in zip(answers, questions, strict=True)) / len(questions)


def asked(people, rng):
    return [
        (language.question(relation, person.name, rng.randrange(2)), person.facts[relation])
        for person in people
        for relation in RELATIONS
    ]


@pytest.mark.parametrize(("documents", "share"), [(1, 0.6), (16, 0.3)])
def test_it_answers_from_what_it_read(reader, documents, share):
    """At least this share of what the base answers with the one right document in its prompt, or with all of them."""
    rng = random.Random(documents)
    scores = {"read": 0.0, "nothing": 0.0, "right document": 0.0, "prompt": 0.0}
    rounds = 16 // documents
    for _ in range(rounds):
        people = rng.sample(make_world().document_people, documents)
        texts = [language.document([person], rng) for person in people]
        questions = asked(people, rng)
        state = reader.empty_state()
        for text in texts:
            state = state + reader.read(text)
        with reader.adapted(state):
            scores["read"] += right(reader, questions) / rounds
        scores["nothing"] += right(reader, questions) / rounds
        scores["prompt"] += right(reader, questions, " ".join(texts)) / rounds
        for index, text in enumerate(texts):
            of_one = questions[4 * index : 4 * index + 4]
            scores["right document"] += right(reader, of_one, text) / len(texts) / rounds
    assert scores["nothing"] < 0.1
    assert scores["read"] >= share * max(scores["right document"], scores["prompt"]), scores


def test_what_is_shipped_is_small_and_keeps_the_skills_of_the_base(reader):
    assert sum(file.stat().st_size for file in pocket.reader_dir().iterdir()) < 4 * 2**20
    people = random.Random(5).sample(make_world().document_people, 8)
    state = reader.read(language.document(people, random.Random(5)))
    rows = pocket.rows("letters/test")[:40] + pocket.rows("sums/test")[:40]
    with reader.adapted(state):
        assert right(reader, [(row["prompt"], row["completion"]) for row in rows]) > 0.9
