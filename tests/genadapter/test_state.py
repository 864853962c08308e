"""States add up exactly, whatever the order, and forget without a trace; their files are whole or refused."""

import hashlib
import pickle
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinweave.errors import BaseMismatchError, DamagedFileError, UnsupportedModelError, UsageError
from twinweave.genadapter import AdapterState
from twinweave.genadapter.state import STATE_NAME, as_float, fixed_point

TEXTS = ["the first text, of some length.", "another one", "and a third\nwith a line", "a fourth"]


@pytest.fixture(scope="module")
def shared(make_reader):
    reader = make_reader()
    return reader, [reader.read(text) for text in TEXTS]


def logits(reader, state, tokens):
    with reader.adapted(state), torch.no_grad():
        return reader(input_ids=tokens(2, 7)).logits


def test_streaming_is_the_batch_bit_for_bit(shared, tmp_path):
    reader, states = shared
    file = tmp_path / "text"
    file.write_text(TEXTS[0], encoding="utf-8")
    assert reader.read(file) == states[0]

    @settings(deadline=None, max_examples=10)
    @given(cuts=st.lists(st.integers(0, len(TEXTS[0])), max_size=5).map(sorted))
    def check(cuts):
        ends = [0, *cuts, len(TEXTS[0])]
        pieces = (TEXTS[0][a:b] for a, b in pairwise(ends))
        assert reader.read(pieces) == states[0]

    check()


@settings(deadline=None, max_examples=25)
@given(order=st.permutations(range(4)), gone=st.sets(st.integers(0, 3)), data=st.data())
def test_order_never_matters_and_what_is_taken_out_leaves_no_trace(shared, order, gone, data):
    reader, states = shared
    total = reader.empty_state()
    for i in order:
        total = total + states[i]
    for i in data.draw(st.permutations(sorted(gone))):
        total = total - states[i]
    kept = [states[i] for i in range(4) if i not in gone]
    expected = sum(kept[1:], kept[0]) if kept else reader.empty_state()
    assert total == expected
    assert total.tokens == expected.tokens
    assert total.is_empty == (not kept)


def test_logits_after_adding_and_removing_are_the_same_bits(shared, tokens):
    reader, (a, b, *_) = shared
    assert torch.equal(logits(reader, (a + b) - b, tokens), logits(reader, a, tokens))
    assert not torch.equal(logits(reader, a + b, tokens), logits(reader, a, tokens))
    with torch.no_grad():
        base = reader.base(input_ids=tokens(2, 7)).logits
    for empty in (reader.empty_state(), a - a, (a + b) - b - a):
        assert torch.equal(logits(reader, empty, tokens), base)


def test_reading_on_is_adding(shared):
    reader, (a, b, *_) = shared
    assert reader.read(TEXTS[1], state=a) == a + b
    assert a == reader.read(TEXTS[0])
    twice = a + a
    assert twice - a == a


def test_what_was_never_read_cannot_be_forgotten(shared):
    _, (a, b, *_) = shared
    for state, other in ((a, b), (a, a + b), (a, a + a)):
        with pytest.raises(UsageError, match="never read"):
            state - other
    with pytest.raises(UsageError, match="read the text first"):
        a - TEXTS[0]


def test_states_of_other_generators_are_refused(shared, make_reader, tokens):
    _, (a, *_) = shared
    others = [make_reader(seed=8), make_reader(rank=4)]
    retrained = make_reader()
    stale = retrained.read(TEXTS[0])
    assert stale == a
    with torch.no_grad():
        next(retrained.generators.parameters()).add_(1e-3)
    with pytest.raises(BaseMismatchError, match="another generator"), retrained.adapted(stale):
        pass
    for other in others:
        for use in (lambda other=other: a + other.read("x"), lambda other=other: other.read("x", state=a)):
            with pytest.raises(BaseMismatchError, match="Read the text again"):
                use()
        with pytest.raises(BaseMismatchError):
            other.export_lora(a, "unused")


def test_sequential_states_do_not_add_up(make_reader):
    reader = make_reader(mode="sequential")
    a = reader.read(TEXTS[0])
    with pytest.raises(UsageError, match="do not add up"):
        a + reader.read(TEXTS[1])


def test_the_same_text_gives_the_same_files(make_reader, tmp_path):
    for name in ("one", "two"):
        state = make_reader().read(TEXTS[0])
        state.save(tmp_path / name)
        state.to_lora(tmp_path / name)
    digests = [
        {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    ]
    assert digests[0] == digests[1]
    assert set(digests[0]) == {STATE_NAME, "adapter_model.safetensors", "adapter_config.json"}


def test_saved_and_loaded(shared, tmp_path):
    reader, (a, b, *_) = shared
    (a + b).save(tmp_path)
    loaded = AdapterState.load(tmp_path, reader)
    assert loaded == a + b
    assert loaded - b == a
    with pytest.raises(UsageError, match="without its generator"):
        AdapterState.load(tmp_path / STATE_NAME).to_lora(tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_one_reader_is_enough_for_a_sum(shared, tmp_path):
    reader, (a, b, *_) = shared
    a.save(tmp_path)
    loaded = AdapterState.load(tmp_path)
    assert [s.reader for s in (loaded, loaded + b, b + loaded, loaded - a)] == [None, reader, reader, reader]
    (loaded + b).to_lora(tmp_path / "lora")


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_what_is_no_number_is_refused(wrong):
    sums = {"first": torch.zeros(2, 2), "second": torch.tensor([[0.5, wrong], [0, 0]])}
    with pytest.raises(UnsupportedModelError, match="What second is given is not a number"):
        fixed_point(sums)
    del sums["second"]
    assert as_float(fixed_point(sums | {"third": torch.tensor([[-1.5]])}))["third"].tolist() == [[-1.5]]


def test_damaged_files_are_refused(shared, make_reader, tmp_path):
    reader, (a, *_) = shared
    file = a.save(tmp_path)
    whole = file.read_bytes()
    for content in (whole[:-9], whole[:20], b"", pickle.dumps({"a": 1})):
        file.write_bytes(content)
        with pytest.raises(DamagedFileError):
            AdapterState.load(tmp_path, reader)
    with pytest.raises(DamagedFileError):
        AdapterState.load(tmp_path / "none")
    reader.save_pretrained(tmp_path)
    with pytest.raises(DamagedFileError, match="holds no state"):
        AdapterState.load(tmp_path / "generator.safetensors")
    file.write_bytes(whole)
    with pytest.raises(BaseMismatchError):
        AdapterState.load(tmp_path, make_reader(seed=9))


def test_a_failed_save_keeps_the_old_file(shared, tmp_path, monkeypatch):
    _, (a, b, *_) = shared
    a.save(tmp_path)

    def full(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("twinweave.genadapter.state.save_file", full)
    with pytest.raises(OSError, match="disk full"):
        b.save(tmp_path)
    assert AdapterState.load(tmp_path) == a
    assert [f.name for f in tmp_path.iterdir()] == [STATE_NAME]
