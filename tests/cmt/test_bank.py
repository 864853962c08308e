"""The bank: what it holds is what a dict would hold, whatever happens to it, and conditions mean what they say."""

import math
import shutil
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from twinweave.cmt import bank as bank_module
from twinweave.cmt import upkeep
from twinweave.cmt.bank import Memory, MemoryBank
from twinweave.errors import BaseMismatchError, DamagedFileError, DataError, UsageError

SHAPE = (2, 8)


def document(name, seed=0, parts=1, metadata=None, key=None, shape=SHAPE):
    """A document of memories that its name and seed make."""
    generator = torch.Generator().manual_seed(seed * 1000 + sum(map(ord, name)))
    return [
        Memory(
            name,
            f"digest of {name} {seed}",
            torch.randn(shape[1], generator=generator) if key is None else key,
            torch.randn(shape, generator=generator).bfloat16().float(),
            part,
            parts,
            10 * parts,
            metadata or {},
        )
        for part in range(parts)
    ]


def nearest(memories, question, top_k):
    """What a search has to find, worked out by hand."""

    def similarity(memory):
        return torch.cosine_similarity(memory.key.double(), question.double(), dim=0).item()

    return sorted(memories, key=lambda m: (-similarity(m), m.id, m.part))[:top_k]


def found(bank, question, top_k=8, where=None):
    return [(hit.id, hit.part) for hit in bank.search(question[None], top_k, where)[0]]


@pytest.fixture
def bank(tmp_path):
    return MemoryBank(tmp_path / "bank.lance", "maker", SHAPE)


# --- the bank against a dict ------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b's", 'c"', "d.md", "ü/ß 語", "e\\", "%_", "\n"])


class Banks(RuleBasedStateMachine):
    """Adding, replacing, removing and restoring in any order."""

    @initialize()
    def start(self):
        self.folder = Path(tempfile.mkdtemp())
        self.bank = MemoryBank(self.folder / "b.lance", "maker", SHAPE)
        self.model, self.before = {}, {}

    @rule(given=st.dictionaries(NAMES, st.tuples(st.integers(0, 9), st.integers(1, 3)), min_size=1, max_size=3))
    def add(self, given):
        documents = {name: document(name, seed, parts, {"seed": seed}) for name, (seed, parts) in given.items()}
        self.bank.add([memory for memories in documents.values() for memory in memories])
        self.model |= documents
        self.remember()

    @rule(names=st.lists(NAMES, max_size=3))
    def remove(self, names):
        assert self.bank.remove(names) == sorted(set(names) & self.model.keys())
        self.model = {name: memories for name, memories in self.model.items() if name not in names}
        self.remember()

    @rule(data=st.data())
    def restore(self, data):
        if self.before:
            version = data.draw(st.sampled_from(sorted(self.before)))
            self.bank.restore(version)
            self.model = dict(self.before[version])
            self.remember()

    @rule()
    def reopen(self):
        self.bank = MemoryBank(self.bank.path, "maker", SHAPE)

    @rule(seed=st.integers(0, 9), top_k=st.integers(1, 5))
    def search(self, seed, top_k):
        question = torch.randn(SHAPE[1], generator=torch.Generator().manual_seed(seed))
        everything = [memory for memories in self.model.values() for memory in memories]
        hits = self.bank.search(question[None], top_k)[0]
        assert [(h.id, h.part) for h in hits] == [(m.id, m.part) for m in nearest(everything, question, top_k)]
        for hit in hits:
            assert torch.equal(hit.block, self.model[hit.id][hit.part].block)
        of_seed = [m for m in everything if m.metadata["seed"] == seed]
        wanted = [(m.id, m.part) for m in nearest(of_seed, question, top_k)]
        assert found(self.bank, question, top_k, {"seed": seed}) == wanted

    @invariant()
    def holds_the_same(self):
        listed = list(self.bank.documents())
        facts = [(d["id"], d["parts"], d["tokens"], d["digest"], d["metadata"]) for d in listed]
        first = [self.model[name][0] for name in sorted(self.model, key=lambda name: name.encode())]
        assert facts == [(m.id, m.parts, m.tokens, m.digest, m.metadata) for m in first]
        assert len(self.bank) == len(self.model)
        assert self.bank.memories == sum(map(len, self.model.values()))
        digests = {m.id: m.digest for m in first}
        assert self.bank.digests_of([*self.model, "nobody"]) == digests
        assert self.bank.ids_of([*digests.values(), "no text"]) == {digest: name for name, digest in digests.items()}

    def remember(self):
        if versions := self.bank.versions():
            self.before[versions[-1]["version"]] = dict(self.model)

    def teardown(self):
        shutil.rmtree(getattr(self, "folder", Path("/nowhere")), ignore_errors=True)


Banks.TestCase.settings = settings(max_examples=8, stateful_step_count=6, deadline=None)
test_a_bank_is_a_dict = Banks.TestCase


# --- conditions -------------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
KEYS = TEXTS.filter(bool)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(-1e6, 1e6).map(lambda x: round(x, 3)) | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=2),
    max_leaves=4,
)


def same(a, b):
    """Whether two values of JSON are the same."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, int | float) and isinstance(b, int | float):
        return a == b
    return type(a) is type(b) and a == b


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.dictionaries(KEYS, VALUES, max_size=3), min_size=1, max_size=4))
@example(
    [{"a.b": 1, 'q"': "it's", "b\\s": None, "n": {"m": [1, {"z": True}]}, "e": "😀\u007f\x01\t/"}, {"a": {"b": 1}}]
)
@example([{"a": 1}, {"a": 1.0}, {"a": True}, {"a": "1"}, {"a": None}, {}, {"a": [1]}, {"a": 0.1}])
def test_every_value_is_found_by_its_key_and_nothing_else_is(metadata):
    with tempfile.TemporaryDirectory() as folder:
        bank = MemoryBank(Path(folder) / "b.lance", "maker", SHAPE)
        bank.add([m for n, told in enumerate(metadata) for m in document(str(n), metadata=told)])
        assert [d["metadata"] for d in bank.documents()] == metadata
        for told in metadata:
            for key, value in told.items():
                wanted = [str(n) for n, other in enumerate(metadata) if key in other and same(other[key], value)]
                assert [d["id"] for d in bank.documents({key: [value]})] == wanted, (key, value)
        whole = {key: [value] for key, value in metadata[0].items()}
        assert "0" in [name for name, _ in found(bank, torch.ones(8), 9, whole)]


def test_a_list_means_any_of_it_and_a_text_is_sql(bank):
    bank.add([m for year in range(5) for m in document(f"d{year}", metadata={"year": 2020 + year, "by": "me"})])
    question = torch.ones(SHAPE[1])

    def ids(where):
        assert sorted(name for name, _ in found(bank, question, 9, where)) == [d["id"] for d in bank.documents(where)]
        return [d["id"] for d in bank.documents(where)]

    assert ids({"year": [2021, 2023]}) == ["d1", "d3"]
    assert ids({"year": 2021, "by": "me"}) == ["d1"]
    assert ids({"year": 2021, "by": "you"}) == []
    assert ids({"year": []}) == []
    assert ids({}) == ids("") == ids(None) == [f"d{n}" for n in range(5)]
    assert ids("json_get_int(metadata, 'year') > 2022 AND id <> 'd4'") == ["d3"]
    assert ids("true) OR (false") == [f"d{n}" for n in range(5)]  # SQL is the caller's own
    assert [d["id"] for d in bank.documents(limit=2)] == ["d0", "d1"]


@pytest.mark.parametrize("where", ["nonsense = 1", "a b c", "id = 'x", "json_get_int(metadata, 'by') > 1", "id"])
def test_a_condition_that_cannot_be_read_is_named(bank, where):
    bank.add(document("a", metadata={"by": "me"}))
    with pytest.raises(UsageError, match=r"condition") as said:
        bank.search(torch.ones(1, 8), 3, where)
    assert where in str(said.value)
    assert ".rs:" not in str(said.value)
    with pytest.raises(UsageError, match="condition"):
        list(bank.documents(where))


@pytest.mark.parametrize("metadata", [{"a": math.nan}, {"a": {1, 2}}, {"": 1}, {1: 2}, {"a": "\ud800"}, [1]])
def test_metadata_that_json_cannot_hold_is_refused(bank, metadata):
    with pytest.raises(UsageError, match="Metadata"):
        bank.add([replace(m, metadata=metadata) for m in document("a")])
    assert not bank.exists


@pytest.mark.parametrize("where", [{"": 1}, {1: 1}, {"a": math.inf}, {"a": object()}])
def test_a_condition_that_json_cannot_hold_is_refused(bank, where):
    bank.add(document("a"))
    with pytest.raises(UsageError):
        bank.search(torch.ones(1, 8), 3, where)


# --- ties -------------------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(st.permutations(range(24)), st.integers(1, 6), st.integers(1, 12))
def test_equally_near_memories_come_by_name_whatever_the_order(order, kinds, top_k):
    keys = torch.randn(kinds, SHAPE[1], generator=torch.Generator().manual_seed(0))
    documents = [document(f"d{n:02}", key=keys[n % kinds]) for n in range(24)]
    question = torch.ones(SHAPE[1])
    wanted = [(m.id, m.part) for m in nearest([d[0] for d in documents], question, top_k)]
    with tempfile.TemporaryDirectory() as folder:
        bank = MemoryBank(Path(folder) / "b.lance", "maker", SHAPE)
        for start in range(0, 24, 8):
            bank.add([m for n in order[start : start + 8] for m in documents[n]])
        assert found(bank, question, top_k) == wanted


def test_a_hundred_memories_with_one_key_are_cut_by_name(bank):
    for n in reversed(range(0, 100, 20)):
        bank.add([m for i in range(n, n + 20) for m in document(f"d{i:03}", key=torch.ones(SHAPE[1]))])
    assert found(bank, torch.ones(SHAPE[1]), 8) == [(f"d{i:03}", 0) for i in range(8)]


# --- what is refused, and what is kept --------------------------------------------------------------------------------


def test_questions_in_a_batch_find_what_each_finds_alone(bank):
    bank.add([m for n in range(40) for m in document(f"d{n}", n)])
    questions = torch.randn(5, SHAPE[1], generator=torch.Generator().manual_seed(1))
    together = [[(h.id, h.part, h.similarity) for h in hits] for hits in bank.search(questions, 7)]
    assert together == [[(h.id, h.part, h.similarity) for h in bank.search(q[None], 7)[0]] for q in questions]
    assert bank.search(questions[:0], 7) == []


def test_another_compressor_is_refused_even_after_the_bank_was_emptied(bank, tmp_path):
    bank.add(document("a"))
    bank.remove(["a"])
    for maker, shape in (("another", SHAPE), ("maker", (4, 4)), ("maker", (2, 16))):
        with pytest.raises(BaseMismatchError, match="another compressor"):
            MemoryBank(tmp_path / "bank.lance", maker, shape)
    assert len(MemoryBank(tmp_path / "bank.lance", "maker", SHAPE)) == 0
    late = MemoryBank(tmp_path / "late.lance", "maker", SHAPE)
    MemoryBank(tmp_path / "late.lance", "another", SHAPE).add(document("a"))
    with pytest.raises(BaseMismatchError):
        late.add(document("b"))


def test_a_bank_opens_without_its_compressor(bank, tmp_path):
    assert not MemoryBank(tmp_path / "bank.lance").exists
    with pytest.raises(UsageError, match="no bank"):
        MemoryBank(tmp_path / "bank.lance").add(document("a"))
    bank.add(document("a"))
    again = MemoryBank(tmp_path / "bank.lance")
    assert (again.compressor, again.shape, len(again)) == ("maker", SHAPE, 1)


def test_part_of_a_document_is_refused(bank):
    whole = document("a", parts=3)
    for some in (whole[:2], whole[1:], [*whole, whole[0]]):
        with pytest.raises(UsageError, match="parts"):
            bank.add(some)
    with pytest.raises(UsageError, match="key"):
        bank.add([replace(document("a")[0], key=torch.ones(3))])
    with pytest.raises(DataError, match="finite"):
        bank.add(document("a", key=torch.full((8,), math.nan)))
    assert not bank.exists


@pytest.mark.parametrize("name", ["bank", ".lance", "ü.lance", "a b.lance", "bank.lance.txt"])
def test_a_name_that_is_none_is_refused(tmp_path, name):
    with pytest.raises(UsageError, match="no name of a bank"):
        MemoryBank(tmp_path / name, "maker", SHAPE)


def test_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    relative = MemoryBank("b.lance", "maker", SHAPE)
    for path in ("sub folder/ü/b.lance/", "~/b.lance"):
        MemoryBank(path, "maker", SHAPE).add(document("a"))
    relative.add(document("a"))
    monkeypatch.chdir("sub folder")
    assert len(relative) == 1
    relative.add(document("b"))
    for path in ("../b.lance", "ü/b.lance", "../home/b.lance"):
        assert MemoryBank(path).exists, path


def test_what_is_no_bank_is_left_alone(tmp_path):
    (tmp_path / "notes.lance").mkdir()
    (tmp_path / "notes.lance" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"mine\.txt"):
        MemoryBank(tmp_path / "notes.lance", "maker", SHAPE).add(document("a"))
    import lancedb

    lancedb.connect(tmp_path).create_table("other", [{"a": 1}])
    with pytest.raises(DamagedFileError, match="no bank"):
        MemoryBank(tmp_path / "other.lance", "maker", SHAPE)
    (tmp_path / "cut.lance" / "_versions").mkdir(parents=True)
    (tmp_path / "cut.lance" / "_versions" / "1.manifest").write_bytes(b"cut")
    with pytest.raises(DamagedFileError, match=r"cut\.lance"):
        MemoryBank(tmp_path / "cut.lance", "maker", SHAPE)


def test_a_folder_left_by_a_killed_first_write_is_used(tmp_path):
    (tmp_path / "b.lance" / "data").mkdir(parents=True)
    bank = MemoryBank(tmp_path / "b.lance", "maker", SHAPE)
    assert not bank.exists
    bank.add(document("a"))
    assert len(bank) == 1


def test_one_change_is_one_version(bank):
    bank.add(document("a", parts=3) + document("b"))
    first = bank.versions()[-1]["version"]
    bank.add(document("a", 1) + document("c"))
    bank.remove(["b", "c"])
    after = [v["memories"] for v in bank.versions() if v["version"] > first]
    # the change marks what is gone, and another that shows nowhere deletes the rows
    assert after == [3 + 2, 3, 1]
    bank.restore(first + 1)
    assert bank.memories == 3
    assert [hit.id for hit in bank.search(torch.ones(1, 8), 9)[0]].count("a") == 1
    with pytest.raises(UsageError, match="no version 99"):
        bank.restore(99)


def test_a_writer_waits_for_another_and_says_so_in_the_end(bank, monkeypatch):
    bank.add(document("a"))
    monkeypatch.setattr(bank_module, "_WAIT", 0.05)
    with MemoryBank(bank.path).writing():
        assert len(bank) == 1
        with pytest.raises(UsageError, match="Another process"):
            bank.add(document("b"))
    bank.add(document("b"))
    assert len(bank) == 2


def test_searching_warns_of_nothing(bank):
    bank.add(document("a"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bank.search(torch.ones(1, 8), 3)
        list(bank.documents())


# --- the index --------------------------------------------------------------------------------------------------------


def test_with_an_index_new_documents_are_found_at_once_and_folded_in(tmp_path, monkeypatch):
    shape = (2, 64)  # an index has a bit for each number of a key: of 8 numbers it can tell little
    bank = MemoryBank(tmp_path / "bank.lance", "maker", shape)
    monkeypatch.setattr(upkeep, "INDEXED_FROM", 300)
    trained = []
    make = upkeep.make_index
    monkeypatch.setattr(upkeep, "make_index", lambda table, count: (trained.append(count), make(table, count)))
    everything = []
    for start in range(0, 1200, 40):
        new = [m for n in range(start, start + 40) for m in document(f"d{n}", n, shape=shape)]
        bank.add(new)
        everything += new
        assert found(bank, new[7].key, 1) == [(new[7].id, 0)]
    assert trained[0] == 320
    assert len(trained) <= 8  # one for so many new memories, not one for each change
    stats = bank.stats()
    assert stats["index"] == "IvfRq"
    assert stats["memories"] - stats["indexed"] < 200
    questions = torch.randn(20, shape[1], generator=torch.Generator().manual_seed(3))
    hits = [len(set(found(bank, q, 8)) & {(m.id, m.part) for m in nearest(everything, q, 8)}) / 8 for q in questions]
    assert sum(hits) / 20 >= 0.95
    bank.remove([f"d{n}" for n in range(1100)])
    assert len(found(bank, questions[0], 200)) == 100
    bank.add(document("d1150", 5, shape=shape) + document("d3", 5, shape=shape))
    assert found(bank, document("d1150", 5, shape=shape)[0].key, 1) == [("d1150", 0)]


def test_names_are_indexed_and_later_ones_are_found_too(bank, monkeypatch):
    monkeypatch.setattr(upkeep, "_NAMED_FROM", 100)
    for start in range(0, 330, 30):
        bank.add([m for n in range(start, start + 30) for m in document(f"d{n}", n)])
    lacking = {tuple(i.columns): i.num_unindexed_rows for i in bank._open().list_indices()}
    assert lacking == {("id",): 90, ("digest",): 90}
    bank.add(document("d7", 5, parts=2) + document("new", 5))
    bank.remove(["d8", "d329"])
    names = ["d7", "d8", "d9", "d328", "d329", "new", "nobody"]
    wanted = {"d7": "digest of d7 5", "new": "digest of new 5", "d9": "digest of d9 9", "d328": "digest of d328 328"}
    assert bank.digests_of(names) == wanted
    assert bank.ids_of([*wanted.values(), "digest of d7 7", "digest of d8 8"]) == {
        d: name for name, d in wanted.items()
    }
    assert (len(bank), bank.memories) == (329, 330)


def test_many_small_changes_are_put_together(bank, monkeypatch):
    monkeypatch.setattr(upkeep, "_FILES", 8)
    for n in range(30):
        bank.add(document(f"d{n:02}", n))
    assert bank._open().stats()["fragment_stats"]["num_fragments"] <= 17
    assert [d["id"] for d in bank.documents()] == [f"d{n:02}" for n in range(30)]
