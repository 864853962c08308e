"""What a batch of documents leaves in the bank: each name its last text, and no text lost or stored twice."""

from itertools import permutations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twinweave.cmt import MemoryBank
from twinweave.cmt.memorizing import batches_of, memorize
from twinweave.cmt.rows import Memory
from twinweave.errors import UsageError


class TextReader:
    """Stands for a `Reader`: a text is its own SHA-256 and has one part, and `meanwhile` runs as it is compressed."""

    def __init__(self, meanwhile=lambda: None):
        self.meanwhile = meanwhile

    def parts_of(self, text):
        return text, [[ord(text)]]

    def padded(self, rows):
        return rows, None

    def compressed(self, rows, _):
        self.meanwhile()
        return torch.tensor(rows).float()[:, :, None].expand(-1, 2, 4)


def bank_at(path):
    return MemoryBank(path / "bank.lance", "maker", (2, 4))


def told(documents):
    return [(text, name, {}) for name, text in documents]


def texts_of(bank):
    return {d["id"]: d["digest"] for d in bank.documents()}


def outcomes(entries):
    return [(entry.id, entry.outcome) for entry in entries]


@pytest.mark.parametrize("batch", permutations([("0", "X"), ("a", "Y"), ("c", "X")]))
def test_a_text_whose_old_name_is_taken_keeps_a_new_one(tmp_path, batch):
    bank = bank_at(tmp_path)
    memorize(TextReader(), bank, told([("a", "X")]))
    entries = memorize(TextReader(), bank, told(batch))
    kept = MemoryBank(bank.path).ids_of(["X"])["X"]
    assert texts_of(bank) == {"a": "Y", kept: "X"}
    assert sorted(entry.outcome for entry in entries) == ["added", "known", "replaced"]
    assert [entry.id for entry in entries] == [kept if text == "X" else "a" for _, text in batch]
    assert {entry.outcome for entry in memorize(TextReader(), bank, told(batch))} == {"known"}


def test_names_that_change_round_lose_nothing(tmp_path):
    bank = bank_at(tmp_path)
    memorize(TextReader(), bank, told([("a", "X"), ("b", "Y"), ("c", "Z")]))
    # X is known as a, Y as b, and Z as c until each of those names gets another text in turn
    memorize(TextReader(), bank, told([("d", "Z"), ("c", "Y"), ("b", "X"), ("a", "W")]))
    assert texts_of(bank) == {"a": "W", "b": "X", "c": "Y", "d": "Z"}


documents = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("STUVW")), min_size=1, max_size=7)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=st.lists(documents, min_size=1, max_size=3))
def test_after_any_batches_every_text_that_was_not_replaced_is_there_once(tmp_path_factory, batches):
    bank = bank_at(tmp_path_factory.mktemp("bank"))
    for batch in batches:
        before = texts_of(bank)
        entries = memorize(TextReader(), bank, told(batch))
        found = texts_of(bank)
        assert len(set(found.values())) == len(found)
        assert set(dict(batch).values()) <= set(found.values())
        assert all(found[name] == text for name, text in before.items() if name not in dict(batch))
        last = {name: (entry, text) for (name, text), entry in zip(batch, entries, strict=True)}
        assert all(found[entry.id] == text for entry, text in last.values())


def test_a_text_that_another_process_adds_meanwhile_is_not_stored_twice(tmp_path):
    def other():
        memorize(TextReader(), bank_at(tmp_path), told([("theirs", "X"), ("both", "Z")]))

    bank = bank_at(tmp_path)
    memorize(TextReader(), bank, told([("old", "W")]))
    entries = memorize(TextReader(other), bank, told([("ours", "X"), ("new", "Y"), ("both", "Z"), ("again", "X")]))
    assert texts_of(bank) == {"old": "W", "theirs": "X", "both": "Z", "new": "Y"}
    known = ("theirs", "known")
    assert [outcomes(entries)[number] for number in (0, 1, 3)] == [known, ("new", "added"), known]


def test_if_all_were_added_meanwhile_nothing_is_written(tmp_path):
    bank = bank_at(tmp_path)
    block = torch.ones(2, 4)
    bank.add([Memory("a", "X", block[0], block)])
    before = bank.stats()["version"]
    assert bank.add([Memory("b", "X", block[0], block)]) == {"b": "a"}
    assert bank.stats()["version"] == before
    assert bank.add([Memory("a", "X", block[0], block)]) == {}
    # a name that gives its text away in the same change is no reason to leave that text out
    assert bank.add([Memory("b", "X", block[0], block), Memory("a", "Y", block[0], block)]) == {}
    assert texts_of(bank) == {"a": "Y", "b": "X"}


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_a_batch_holds_at_least_one(size):
    with pytest.raises(UsageError, match="batch_size is"):
        next(batches_of(told([("a", "X")]), size))
    assert [len(batch) for batch in batches_of(told([("a", "X")] * 5), 2)] == [2, 2, 1]
