"""The measurement of the bank runs from end to end, and its arithmetic holds."""

import json
import sys

import pytest

from benchmarks import bank

pytest.importorskip("lancedb")


def test_a_small_bank_is_measured(tmp_path, monkeypatch):
    out = tmp_path / "bank.json"
    flags = ["--sizes", "40", "100", "--kinds", "isotropic", "--width", "16", "--memory-tokens", "2", "--batch", "20"]
    flags += ["--flat-questions", "5", "--threads", "1", "--no-memory", "--folder", str(tmp_path), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bank", *flags])
    bank.main()
    result = json.loads(out.read_text())
    assert result["complete"]
    assert [(row["added_from"], row["memories"]) for row in result["rows"]] == [(0, 40), (40, 100)]
    for row in result["rows"]:
        assert row["index"] is None
        assert row["flat"]["recall_at_8"] == 1
        assert row["per_1000_as_it_grew"][-1]["memories"] == row["memories"]


def test_seconds_per_thousand_of_stretches():
    took = [(60, 0.5), (70, 0.5), (80, 1.0), (90, 2.0), (95, 1.0)]  # 50 there before
    assert bank.per_thousand(took, 2) == [
        {"memories": 80, "seconds": 1000 * 2.0 / 30},
        {"memories": 95, "seconds": 1000 * 3.0 / 15},
    ]
