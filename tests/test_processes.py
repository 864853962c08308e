"""Sharing between a run's processes: who writes, who waits, and which rows each of them rehearses."""

import threading
import time

import datasets
import numpy
import pytest
import torch

from twinweave.processes import from_first, is_first, mean_over_processes, process_count, wait_for
from twinweave.rehearsal import RehearsalRows, RehearsalSettings, Written, load_sequences


def collate(rows):
    return [tuple(row["input_ids"]) for row in rows]


def rows_of(count, batch_size, every=1):
    dataset = datasets.Dataset.from_dict({"input_ids": [[i] * (1 + i % 5) for i in range(count)]})
    return RehearsalRows(dataset, collate, RehearsalSettings(every=every), batch_size)


@pytest.fixture
def as_process(monkeypatch):
    def become(index, count):
        monkeypatch.setenv("RANK", str(index))
        monkeypatch.setenv("WORLD_SIZE", str(count))

    return become


@pytest.mark.parametrize(("count", "batch_size"), [(40, 4), (13, 4), (6, 4)])
def test_processes_rehearse_parts_of_what_one_would(as_process, count, batch_size):
    whole = rows_of(count, batch_size * 2)
    expected = [whole.batch(step, 3) for step in range(12)]
    parts = []
    for index in (0, 1):
        as_process(index, 2)
        parts.append([rows_of(count, batch_size).batch(step, 3) for step in range(12)])
    if count >= 2 * batch_size:
        assert [one + other for one, other in zip(*parts, strict=True)] == expected
    for one, other in zip(*parts, strict=True):
        assert len(one) == len(other) == min(batch_size, count // 2)
    seen = numpy.bincount([ids[0] for part in parts for batch in part for ids in batch], minlength=count)
    assert seen.max() - seen.min() <= 1


def test_fewer_rows_than_processes(as_process):
    for index in range(3):
        as_process(index, 3)
        assert len(rows_of(2, 4).batch(0, 0)) == 1  # never none: the others would wait for it


def test_the_first_writes_and_the_others_wait(as_process, tmp_path):
    written = [Written([1, 2, 3])]
    assert (is_first(), process_count()) == (True, 1)
    as_process(1, 2)
    assert (is_first(), process_count()) == (False, 2)
    found = []

    def never():
        raise AssertionError("only the first process writes")

    waiting = threading.Thread(target=lambda: found.extend(load_sequences(tmp_path, {"of": "x"}, never)), daemon=True)
    waiting.start()
    time.sleep(0.3)
    assert not found
    as_process(0, 2)
    load_sequences(tmp_path, {"of": "x"}, lambda: written)
    waiting.join(timeout=20)
    assert found == written
    assert wait_for(tmp_path) == tmp_path


def test_without_a_group_everything_is_ones_own():
    mean = torch.tensor(0.3)
    assert mean_over_processes(mean, 7) is mean
    assert from_first(lambda: 5) == 5
