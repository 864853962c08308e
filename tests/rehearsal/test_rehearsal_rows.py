"""Rows to rehearse on: where distributions are compared, what the query is, and which rows come when."""

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinweave.rehearsal import RehearsalRows, RehearsalSettings, Written, make_rows

SEQUENCES = st.lists(
    st.lists(st.integers(0, 50), min_size=1, max_size=30).flatmap(
        lambda ids: st.builds(Written, st.just(ids), st.none() | st.integers(1, max(len(ids) - 1, 1)))
    ),
    min_size=1,
    max_size=8,
)


@given(SEQUENCES, st.integers(1, 12), st.integers(0, 5))
def test_rows_mark_places_and_queries(sequences, positions, seed):
    settings = RehearsalSettings(positions=positions, seed=seed)
    rows = make_rows(sequences, settings)
    kept = [written for written in sequences if len(written.ids) > 1]
    assert len(rows) == len(kept)
    for row, written in zip(rows, kept, strict=True):
        assert row["input_ids"] == written.ids
        labelled = [place for place, label in enumerate(row["labels"]) if label != -100]
        assert len(labelled) == min(positions, len(written.ids) - 1)
        assert 0 not in labelled  # nothing predicts the first token
        assert all(row["labels"][place] == written.ids[place] for place in labelled)
        end = sum(row["query_mask"])
        assert row["query_mask"] == [column < end for column in range(len(written.ids))]
        assert end >= 1
        if written.answer is not None:
            assert end in (written.answer, len(written.ids))
    assert make_rows(sequences, settings).to_dict() == rows.to_dict()


def test_both_kinds_of_query_are_rehearsed():
    rows = make_rows([Written(list(range(20)))] * 400, RehearsalSettings())
    ends = numpy.array([sum(row["query_mask"]) for row in rows])
    assert 0.4 < (ends == 20).mean() < 0.6
    assert set(ends) == set(range(1, 21))


def served(count, batch_size, every=1):
    settings = RehearsalSettings(every=every)
    rows = make_rows([Written([i, i, i]) for i in range(count)], settings)
    return RehearsalRows(rows, lambda batch: [row["input_ids"][0] for row in batch], settings, batch_size)


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3))
def test_every_row_comes_once_a_round(count, size, every, seed):
    general = served(count, batch_size=size, every=every)
    batches = [general.batch(step, seed) for step in range(count * every * 2)]
    assert [batch is None for batch in batches] == [step % every != 0 for step in range(len(batches))]
    read = [row for batch in batches if batch is not None for row in batch]
    for start in range(0, len(read) - count + 1, count):
        assert sorted(read[start : start + count]) == list(range(count))
    assert [general.batch(step, seed) for step in range(len(batches))] == batches


def test_another_seed_reads_in_another_order():
    general = served(20, batch_size=20)
    assert general.batch(0, 1) != general.batch(0, 2)
    assert sorted(general.batch(0, 1)) == sorted(general.batch(0, 2))


@pytest.mark.parametrize(
    "change", [{"length": 2}, {"temperature": 0}, {"every": 0}, {"weight": -1}, {"adapter_weight": -1}]
)
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        RehearsalSettings(**change)
