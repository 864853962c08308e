from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from twinweave.errors import DataError, UsageError
from twinweave.evaluation import (
    METRICS,
    contains_alias,
    exact_match,
    exact_text,
    f1_binary,
    matthews_correlation,
    normalize_answer,
    number_match,
    token_f1,
)
from twinweave.evaluation.metrics import OVER_ALL, PER_EXAMPLE, extract_number, parse_yes_no, score_texts

texts = st.text(max_size=30)
filled = st.text(min_size=1, max_size=30).filter(str.strip)
words = st.lists(st.sampled_from(["cat", "dog", "the", "sat", "no", "know"]), min_size=1, max_size=8).map(" ".join)
answers = st.lists(st.sampled_from(["yes", "no"]), min_size=1, max_size=12)
per_example = [exact_match, exact_text, token_f1, contains_alias, number_match]


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat!", "cat"),
        ("a man, an apple, the end.", "man apple end"),
        ("Theatre another Anna", "theatre another anna"),
        ("rock-and-roll", "rockandroll"),
        ("Children’s “Hospital” – L.A.", "childrens hospital la"),
        ("", ""),
        ("The", ""),
    ],
)
def test_normalize_answer(text, normal):
    assert normalize_answer(text) == normal


@given(texts)
def test_normalising_is_stable_and_clean(text):
    normal = normalize_answer(text)
    assert "  " not in normal
    assert not set(normal) & set(".,!?;:'\"()")
    if not set("ΣİI").intersection(text.upper()):  # a few letters change again when lowered twice
        assert normalize_answer(normal.replace("a", "b")) == normal.replace("a", "b")


@pytest.mark.parametrize("metric", per_example)
@given(prediction=texts, references=st.lists(filled, min_size=1, max_size=3))
def test_scores_are_fractions_and_more_references_never_hurt(metric, prediction, references):
    score = metric(prediction, references)
    assert 0.0 <= score <= 1.0
    assert score >= metric(prediction, references[:1])


@pytest.mark.parametrize("metric", [exact_match, exact_text, token_f1, contains_alias])
@given(reference=filled)
def test_gold_is_right_even_when_it_is_only_an_article(metric, reference):
    assert metric(reference, ["something else", reference]) == 1.0


@pytest.mark.parametrize("metric", [exact_match, exact_text, token_f1])
@given(left=words, right=words)
def test_symmetry(metric, left, right):
    assert metric(left, [right]) == pytest.approx(metric(right, [left]))


@given(left=words, right=words)
def test_token_f1_counts_as_multisets(left, right):
    one, other = (Counter(word for word in text.split() if word != "the") for text in (left, right))
    if not one or not other:
        return
    shared = sum(min(one[word], other[word]) for word in one)
    expected = 0.0
    if shared:
        precision, recall = shared / one.total(), shared / other.total()
        expected = 2 * precision * recall / (precision + recall)
    assert token_f1(left, [right]) == pytest.approx(expected)


def test_repeated_words_do_not_count_twice():
    assert token_f1("cat cat cat cat", ["cat sat"]) == pytest.approx(2 * 1 / 6)
    assert token_f1("", ["cat"]) == 0.0


@given(left=words, middle=words, right=words)
def test_aliases_are_found_inside(left, middle, right):
    assume(normalize_answer(middle))
    assert contains_alias(f"{left} {middle} {right}", [middle]) == 1.0


@pytest.mark.parametrize(
    ("prediction", "alias", "found"),
    [
        ("I know.", "no", 0.0),
        ("Well, NO!", "no", 1.0),
        ("It was James K. Polk.", "James K Polk", 1.0),
        ("the new yorker", "New York", 0.0),
        ("in New   York City", "The New York", 1.0),
        ("", "x", 0.0),
        ("grade A", "A", 0.0),
        ("A", "A", 1.0),
    ],
)
def test_contains_alias(prediction, alias, found):
    assert contains_alias(prediction, [alias]) == found


def test_an_empty_answer_is_never_right():
    assert exact_match("", ["The"]) == exact_match("!", ["?"]) == exact_text("", ["a"]) == 0.0
    assert exact_match("the", ["a"]) == 0.0


def test_exact_text_keeps_what_carries_meaning():
    assert exact_match("b c", ["a b c"]) == 1.0
    assert exact_text("b c", ["a b c"]) == 0.0
    assert exact_text(" a  b c\n", ["a b c"]) == 1.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 18.", "18"),
        ("The answer is 18.0", "18"),
        ("So 3 + 4 = 7. The answer is $1,234.50, not 9.", "1234.5"),
        ("The answer is 5.\nQuestion: what of 7?", "5"),
        ("the answer is: **$72**", "72"),
        ("The answer is unclear.\nMaybe 4", "4"),
        ("#### 72", "72"),
        ("48/2=24", "24"),
        ("16-9", "9"),
        ("(16)-9", "9"),
        ("it is -9", "-9"),
        ("it is −9", "-9"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("50%", "50"),
        ("1,000,000", "1000000"),
        ("1, 2, 3", "3"),
        ("12,34", "34"),
        (".5", "0.5"),
        ("72.", "72"),
        ("no number", None),
        ("", None),
    ],
)
def test_extract_number(text, number):
    found = extract_number(text)
    assert (found is None) if number is None else found == extract_number(number), found


@given(
    number=st.decimals(-(10**9), 10**9, places=3),
    before=words,
    after=words,
    sign=st.sampled_from(["", "$"]),
)
def test_numbers_are_read_back_however_they_are_written(number, before, after, sign):
    written = f"{before} {sign}{number:,} {after}"
    assert extract_number(written) == number
    assert extract_number(f"1 2 {written} 3. The answer is {number:,}. 4") == number
    assert number_match(written, ["x", f"{number}000"]) == 1.0
    assert number_match(written, [f"{number + 1}"]) == 0.0


def test_no_number_matches_nothing():
    assert number_match("none", ["none"]) == 0.0


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("yes", True),
        (" No.", False),
        ("Yes, they are", True),
        ("The answer is no", False),
        ("Answer: yes", True),
        ("know", None),
        ("nothing", None),
        ("maybe yes", None),
        ("", None),
    ],
)
def test_parse_yes_no(text, label):
    assert parse_yes_no(text) is label


@given(predictions=answers, data=st.data())
def test_label_metrics_range_and_symmetry(predictions, data):
    references = data.draw(
        st.lists(st.sampled_from(["yes", "no"]), min_size=len(predictions), max_size=len(predictions))
    )
    assert -1.0 <= matthews_correlation(predictions, references) <= 1.0
    assert 0.0 <= f1_binary(predictions, references) <= 1.0
    assert matthews_correlation(predictions, references) == pytest.approx(matthews_correlation(references, predictions))
    assert f1_binary(predictions, references) == pytest.approx(f1_binary(references, predictions))


def test_unparsable_predictions_are_wrong_and_never_dropped():
    gold = ["yes", "no", "yes", "no"]
    assert matthews_correlation(gold, gold) == f1_binary(gold, gold) == 1.0
    assert matthews_correlation(["hm"] * 4, gold) == f1_binary(["hm"] * 4, gold) == 0.0
    assert 0 < matthews_correlation(["yes", "no", "yes", "hm"], gold) < 1
    assert f1_binary(["yes", "no", "hm", "no"], gold) == pytest.approx(2 / 3)
    assert f1_binary(["yes", "hm", "yes", "no"], gold) == pytest.approx(4 / 5)
    assert score_texts("accuracy", ["yes", "hm"], [["yes"], ["no"]]) == (0.5, [1.0, 0.0])
    with pytest.raises(DataError, match="'maybe' is not yes or no"):
        f1_binary(["yes"], ["maybe"])


def test_the_table_is_complete():
    assert set(METRICS) == {*PER_EXAMPLE, *OVER_ALL, "loss"}
    for name, metric in METRICS.items():
        assert metric.name == name
        assert metric.per_example == (name in PER_EXAMPLE)
        assert metric.higher_is_better == (metric.unit == "fraction")
    with pytest.raises(UsageError, match="Did you mean 'exact_match'"):
        score_texts("exact_mach", ["a"], [["a"]])
