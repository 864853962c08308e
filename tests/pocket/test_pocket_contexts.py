"""Contexts to train readers on, and those to test them on, of people who are in no training."""

import re
from collections import Counter
from itertools import groupby

import pytest

from twinweave.pocket import rows
from twinweave.pocket.contexts import CONTEXTS, DOCUMENTS, MEMORIES
from twinweave.pocket.world import make_world


@pytest.fixture(scope="module")
def training():
    return rows("contexts/train")


def test_contexts_of_strangers(training):
    contexts = [(context, list(of_context)) for context, of_context in groupby(training, key=lambda r: r["context"])]
    assert len(contexts) == CONTEXTS == len({tuple(context) for context, _ in contexts})
    sizes = Counter(len(context) for context, _ in contexts)
    assert sorted(sizes) == list(DOCUMENTS)
    assert min(sizes.values()) > CONTEXTS / 10
    reserved = make_world().reserved_names
    for context, of_context in contexts[:300]:
        assert 8 <= len(of_context) <= 16
        assert len({row["prompt"] for row in of_context}) == len(of_context)
        assert not any(name in text for name in reserved for text in context)
        for row in of_context:
            assert any(row["completion"] in document for document in context)


def test_memories_are_of_strangers_of_whom_no_two_share_a_name():
    asked = rows("memories/train")
    documents = [(context, list(of_it)) for context, of_it in groupby(asked, key=lambda row: row["context"])]
    assert len(documents) == MEMORIES
    names = set()
    for [document], of_it in documents:
        assert len({row["prompt"] for row in of_it}) == len(of_it) == 8
        assert all(row["completion"] in document for row in of_it)
        (name,) = {re.search(r"[A-Z]\w+ [A-Z]\w+", row["prompt"])[0] for row in of_it}
        assert name in document
        names.add(name)
    assert len(names) == MEMORIES
    assert not names & make_world().reserved_names


def test_contexts_of_document_people():
    asked = rows("contexts/test")
    people = {person.name: person for person in make_world().document_people}
    assert len(asked) == 150
    assert len({row["prompt"] for row in asked}) == 150
    for row in asked:
        [document] = row["context"]
        [name] = [name for name in people if name in row["prompt"]]
        assert name in document
        assert row["completion"] in document
        assert row["completion"] in people[name].facts.values()
