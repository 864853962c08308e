import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twinweave.data import IGNORED_LABEL, prepare_training_data, to_example
from twinweave.data.prepare import hold_out
from twinweave.errors import DataError, UnsupportedModelError


@pytest.fixture
def write(tmp_path):
    def make(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return make


def row(prompt, completion="yes"):
    return {"prompt": prompt, "completion": completion}


ALPHABET = "abcdefghijklmnopqrstuvwxyz"
ROWS = [row(f"{first} {second}") for first in ALPHABET for second in "abcd"]


def test_columns_report_and_seeded_split(write, words):
    path = write("x.jsonl", ROWS)
    made = prepare_training_data(path, words, max_length=10)
    assert set(made.train.column_names) == {"input_ids", "labels"}
    assert made.report.rows == 104
    assert (made.report.train_rows, made.report.validation_rows) == (99, 5) == (len(made.train), len(made.validation))
    assert made.report.trained_tokens == 2 * 99
    assert (made.report.cut_rows, made.report.common_with_test, made.report.warnings) == (0, 0, [])
    together = {tuple(ids) for part in (made.train, made.validation) for ids in part["input_ids"]}
    assert len(together) == 104
    again = prepare_training_data(path, words, max_length=10)
    other = prepare_training_data(path, words, max_length=10, seed=1)
    assert list(again.validation["input_ids"]) == list(made.validation["input_ids"])
    assert list(other.validation["input_ids"]) != list(made.validation["input_ids"])


@given(count=st.integers(2, 30_000), fraction=st.floats(0.001, 0.999), seed=st.integers(0, 3))
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_held_out_rows(count, fraction, seed):
    rows = list(range(count))
    kept, held = hold_out(rows, fraction, seed)
    assert sorted(kept + held) == rows
    assert 1 <= len(held) <= 500
    assert kept


@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=12),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_whole_contexts_are_held_out_where_they_fit(sizes, fraction, seed):
    contexts = [name for name, size in enumerate(sizes, start=1) for _ in range(size)]
    kept, held = hold_out(list(range(len(contexts))), fraction, seed, contexts)
    assert sorted(kept + held) == list(range(len(contexts)))
    assert not {contexts[row] for row in kept} & {contexts[row] for row in held}
    assert kept
    assert 1 <= len(held) <= max(round(len(contexts) * fraction), min(sizes))


def test_a_large_context_is_trained_on():
    contexts = ["big"] * 990 + ["small"] * 10
    for seed in range(6):
        kept, held = hold_out(contexts, 0.05, seed, contexts)
        assert (len(kept), set(held)) == (990, {"small"})
    tens = [str(i // 2000) for i in range(20_000)]
    assert len(hold_out(tens, 0.05, 0, tens)[1]) == 2000  # none fits


def test_cut_rows_are_counted(write, words):
    path = write("x.jsonl", [row("a b c d e"), row("a"), row("a b")])
    made = prepare_training_data(path, words, max_length=4, validation=path)
    assert made.report.cut_rows == 2
    assert "2 of 6 rows are longer than 4 tokens" in made.report.warnings[0]
    assert made.train[0]["labels"][:2] == [IGNORED_LABEL] * 2
    assert words.decode(made.train[0]["input_ids"]) == "d e yes </s>"


def test_common_rows_are_counted(write, words):
    train = write("train.jsonl", [row("a b"), row("C  d"), row("e f"), row("g h", "no")])
    test = write("test.jsonl", [row("c d", "YES"), row("a b"), row("a b"), row("g h", "yes")])
    validation = write("validation.jsonl", [row("e f")])
    report = prepare_training_data(train, words, max_length=9, validation=validation, test=test).report
    assert report.common_with_test == 2
    assert any("2 of 4 training rows are in the test data" in warning for warning in report.warnings)
    assert any("1 of 4 training rows are in the validation data" in warning for warning in report.warnings)
    assert (report.train_rows, report.validation_rows) == (4, 1)


def test_test_rows_may_be_examples_or_of_another_form(write, words):
    train = write("train.jsonl", [row("a b"), row("c d")])
    test = [to_example({"question": "A B", "answer": "yes"}, where="row 1")]
    assert prepare_training_data(train, words, max_length=9, test=test).report.common_with_test == 1
    other = write("test.jsonl", [{"text": "a b yes"}])
    report = prepare_training_data(train, words, max_length=9, test=other).report
    assert report.common_with_test == 0
    assert any("not compared with the test data" in warning for warning in report.warnings)


def test_templates_and_limit(write, words):
    rows = [{"q": f"{letter}", "a": ["yes", "no"]} for letter in ALPHABET]
    path = write("x.jsonl", rows)
    made = prepare_training_data(path, words, max_length=9, limit=4, prompt_template="x {q}", completion_template="{a}")
    assert made.report.rows == 4
    assert all(words.decode(ids).startswith("x ") for ids in made.train["input_ids"])
    assert all(words.decode(ids).endswith("yes </s>") for ids in made.train["input_ids"])


def test_errors_name_the_row(write, words):
    path = write("x.jsonl", [row("a"), {"prompt": "b"}])
    with pytest.raises(DataError, match=r"x\.jsonl row 2 has no completion"):
        prepare_training_data(path, words, max_length=9)
    path = write("y.jsonl", [row("a"), row("a", "b c d e f")])
    with pytest.raises(DataError, match=r"y\.jsonl row 2 has 7 tokens.* window is 6") as caught:
        prepare_training_data(path, words, max_length=6)
    assert "raise max_length" in str(caught.value)


def test_a_split_needs_few_rows_and_a_fraction(write, words):
    with pytest.raises(DataError, match="One row cannot be split"):
        prepare_training_data(write("x.jsonl", [row("a")]), words, max_length=9)
    with pytest.raises(DataError, match="validation_fraction is 1"):
        prepare_training_data(write("x.jsonl", ROWS), words, max_length=9, validation_fraction=1)


def test_the_tokenizer_is_checked_first(words):
    kept, words.pad_token = words.pad_token, None
    try:
        with pytest.raises(UnsupportedModelError, match="no padding token"):
            prepare_training_data("nowhere.jsonl", words, max_length=9)
    finally:
        words.pad_token = kept
