"""The benchmarks of reading run from end to end, and what they compare is what they say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks import answering, answering_page, reading, reading_text
from benchmarks.answering_ways import Question, fine_tuned, generated, plain_ways, put_in, woven
from twinweave import GenerativeAdapter, GenerativeAdapterConfig, pocket
from twinweave.pocket.world import make_world

SETTINGS = GenerativeAdapterConfig(target_modules=["o_proj"], state_size=8, rank=8, scale=0.5, chunk_size=64)


@pytest.fixture(scope="module")
def reader() -> GenerativeAdapter:
    torch.manual_seed(0)
    base, tokenizer = answering.load_base(), AutoTokenizer.from_pretrained(pocket.base_dir())
    made = GenerativeAdapter(base, SETTINGS, tokenizer).eval()
    for generator in made.generators:
        torch.nn.init.normal_(generator.output, std=0.5)  # type: ignore[arg-type]
    return made


def test_reading_and_decoding_are_measured(tmp_path: Path) -> None:
    shared = ["--shape", "tiny", "--threads", "1", "--repeats", "2", "--out", str(tmp_path / "r.json")]
    sizes = ["--state-size", "8", "--rank", "4", "--text", "32", "--batch", "2", "--new-tokens", "2", "--context", "4"]
    result = reading.main([*shared, *sizes])
    assert [row["case"] for row in result["rows"]] == [
        {"text": 32, "measure": "read"},
        {"batch": 2, "measure": "decode"},
    ]
    assert set(result["rows"][0]["ratios"]) == {"read/base", "read_and_factors/base"}
    assert set(result["rows"][1]["ratios"]) == {"adapted/base"}


def test_contexts_are_the_same_for_a_seed_and_about_document_people() -> None:
    found = answering.contexts(4, 1)
    assert found == answering.contexts(4, 1) != answering.contexts(4, 2)
    names = {person.name for person in make_world().document_people}
    for documents, questions in found:
        assert len(documents) == 4
        for question in questions:
            name = next(name for name in names if name in question.text)
            assert name in documents[question.document]
            assert question.answer in documents[question.document]


def test_every_way_answers_and_is_scored(reader: GenerativeAdapter) -> None:
    tokenizer = reader.tokenizer
    documents, questions = answering.contexts(2, 0)[0]
    ways = [*plain_ways(reader.base, tokenizer), fine_tuned(answering.load_base, tokenizer, 1e-3, 1, 0)]
    scores = {way.name: answering.score_way(way, [(documents, questions)]) for way in [*ways, generated(reader)]}
    assert scores["right document"]["accuracy"] > 0.9
    assert scores["nothing"]["accuracy"] < 0.5
    assert scores["retrieval"]["accuracy"] == scores["right document"]["accuracy"]  # the names tell them apart
    assert scores["GenerativeAdapter"]["bytes"] == sum(8 * (t.in_features + t.out_features) * 4 for t in reader.targets)
    assert scores["LoRA on the documents"]["document_flops"] > scores["GenerativeAdapter"]["document_flops"] > 0
    assert scores["prompt"]["question_flops"] > scores["nothing"]["question_flops"]


def test_the_gate_is_trained_over_generated_adapters_and_nothing_else_moves(
    reader: GenerativeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "GATE_STEPS", 2)
    monkeypatch.setattr(answering, "RehearsalSettings", lambda **kw: real(**{**kw, "sequences": 4, "length": 16}))
    imsm = answering.train_gate(reader, 0)
    question = Question("Where does Ada Abbot live?", "", 0)
    state = reader.read("Ada Abbot lives in Amberley. Ada Abbot keeps a crab.")
    put_in(imsm, reader, state)
    ids = reader.tokenizer(question.text, return_tensors="pt")["input_ids"]
    with torch.no_grad(), imsm.use_memory("enhanced"), reader.adapted(state):
        torch.testing.assert_close(imsm(input_ids=ids).logits, reader.base(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert woven(reader, imsm).answer(state, [question])


real: Any = answering.RehearsalSettings


def test_losses_on_text(reader: GenerativeAdapter) -> None:
    text = " ".join(answering.contexts(8, 0)[0][0])
    losses = reading_text.losses_of(text, "Ada Abbot keeps a crab.", reader, 2)
    assert set(losses) == {
        (kind, number, way)
        for kind in ("reconstruction", "completion")
        for number in (1, 2)
        for way in ("nothing", "prompt", "adapter", "adapter of another text")
    }
    assert losses["reconstruction", 1, "nothing"] != losses["reconstruction", 1, "adapter"]


def test_the_page(tmp_path: Path) -> None:
    cell = {"way": "nothing", "documents": 16, "accuracy": 0.25, "questions": 8, "bytes": 2048}
    cell |= dict.fromkeys(("document_seconds", "document_flops", "question_seconds", "question_flops"), 2e6)
    kept = {"base": {"sums": 1.0}, "GenerativeAdapter": {"sums": 0.75}}
    cells = [{**cell, "way": way} for way in ("nothing", "prompt", "right document", "GenerativeAdapter")]
    seeds = [{"seed": 0, "window": 256, "prompt_tokens": {"16": 500}, "curve": cells, "retained": kept}]
    made = {"date": "2026-01-01", "versions": {"torch": "1", "transformers": "2", "peft": "3"}, "device": "cpu"}
    result = {"provenance": {**made, "threads": 2, "command": "run"}, "seeds": seeds}
    (tmp_path / "world.json").write_text(json.dumps(result))
    page = answering_page.page(tmp_path)
    assert "| nothing | 25.0 |" in page
    assert "| prompt | 25.0 * |" in page
    assert "| GenerativeAdapter / right document | 100 % |" in page
    assert "| GenerativeAdapter | 25.0 | 75 |" in page
    assert "2 KiB" in page
