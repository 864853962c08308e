"""The benchmark of a growing stream runs from end to end, and its page says what is in its files."""

import json
from pathlib import Path

import pytest

from benchmarks import streaming, streaming_ways
from benchmarks.streaming_page import page
from twinweave import pocket


def test_the_first_documents_are_asked_again_as_others_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "FIRST", 3)
    monkeypatch.setattr(streaming, "UNRELATED", (1.0,))
    monkeypatch.setattr(streaming, "FOLDER", tmp_path / "here" / "there" / "streaming")
    monkeypatch.setattr(streaming_ways, "EPOCHS", 1)
    kept = ["people_town", "sums"]
    monkeypatch.setattr(pocket, "TASKS", [task for task in pocket.TASKS if task["name"] in kept])
    out = streaming.FOLDER / "pocket.json"
    model = str(pocket.memory_dir())
    streaming.main(
        ["--cmt", model, "--plain-loss", model, "--documents", "3", "5", "--threads", "1", "--out", str(out)]
    )
    (seed,) = json.loads(out.read_text())["seeds"]
    rows = {(row["way"], row["documents"]): row for row in seed["curve"]}
    for documents in (3, 5):
        for way in ("right document", "retrieval", "CMT", "CMT, plain loss", "CMT, no top-K", "CMT, min_similarity"):
            assert rows[way, documents]["exact_match"] > 0.9, way
        assert rows["nothing", documents]["exact_match"] < 0.5
    assert {row["way"] for row in seed["robust"]} == {way for way, _ in rows}
    assert seed["retained"]["base"] == seed["retained"]["CMT, min_similarity"] == dict.fromkeys(kept, 1.0)
    assert seed["retained"]["CMT"]["sums"] < 1
    text = page(streaming.FOLDER)
    assert (tmp_path / "here" / "docs" / "cmt-results.md").read_text(encoding="utf-8") == text
    assert f"| {100 * rows['CMT', 5]['exact_match']:.1f} |" in text


def test_streams_are_of_unseen_people_with_the_first_ones_asked() -> None:
    documents, questions = streaming.stream(130, 1)
    assert len(set(documents)) == 130
    assert len(questions) == 4 * streaming.FIRST
    assert all(q.answer in documents[q.document] for q in questions)
    assert not streaming.trained_on() & {" ".join(text.split()[:2]) for text in documents}
    assert documents != streaming.stream(130, 2)[0]
