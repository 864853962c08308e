"""Real data sets, where a folder with them exists: every one loads, encodes and scores its own answers as right."""

import os
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from twinweave.data import encode_example, prepare_training_data
from twinweave.evaluation import evaluate_task, resolve_task
from twinweave.evaluation.metrics import score_texts
from twinweave.evaluation.rows import read_examples, read_pairs, read_texts

SHARED = Path(os.environ.get("TWINWEAVE_SHARED", Path(__file__).parents[2] / "../shared")).resolve()
DATA, BASE = SHARED / "data", SHARED / "models/small-en"
pytestmark = pytest.mark.skipif(not (DATA.is_dir() and BASE.is_dir()), reason=f"no data in {SHARED}")


@pytest.fixture(scope="module")
def english():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", ["gsm8k", "cola", "mrpc", "ropes", "webq"])
def test_known_tasks_score_their_own_answers_as_right(english, name, split):
    path = DATA / name / f"{split}.jsonl"
    if not path.exists():
        pytest.skip(f"{name} has no {split} rows")
    task = resolve_task({"task": name, "data": str(path), "limit": 1200})
    examples = read_examples(task)
    for example in examples[:200]:
        encoded = encode_example(example, english, max_length=1024)
        assert not encoded.cut
        assert english.decode(encoded.labels[-1:]) == english.eos_token
    answers = [example.completion for example in examples]
    for metric in task.metrics:
        score, _ = score_texts(metric, answers, [example.references for example in examples])
        assert score == 1.0, metric


def test_texts_and_pairs_load(english):
    texts = read_texts(resolve_task({"task": "wikitext", "data": str(DATA / "wiki/heldout.jsonl")}))
    assert len(texts) == 800
    pairs = read_pairs(resolve_task({"task": "minimal_pairs", "data": str(DATA / "blimp/*.jsonl"), "limit": 680}))
    assert len(pairs) == 680
    assert len({pair.where.split(" row ")[0] for pair in pairs}) == 34
    assert all(pair.good != pair.bad for pair in pairs)


def test_training_data_report(english):
    made = prepare_training_data(
        DATA / "ropes/train.jsonl", english, max_length=256, test=str(DATA / "ropes/test.jsonl")
    )
    assert made.report.rows == 1135 == made.report.train_rows + made.report.validation_rows
    assert made.report.cut_rows > 0
    assert made.report.common_with_test == 0
    assert max(map(len, made.train["input_ids"])) == 256


def test_the_small_base_is_scored(english):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BASE, dtype="float32")
    task = resolve_task({"task": "wikitext", "data": str(DATA / "wiki/heldout.jsonl"), "limit": 20})
    score = evaluate_task(model, english, task, batch_size=8, progress=False)
    assert 3.0 < score.score < 5.0
