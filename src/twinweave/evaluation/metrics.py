"""What a prediction is worth: pure functions over texts. Knows nothing about models, tasks or files.

Texts are compared as in SQuAD (Rajpurkar et al., 2016): lower case, without punctuation and articles.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from sklearn.metrics import f1_score, matthews_corrcoef

from twinweave.errors import DataError, UsageError, unknown_name

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_YES_NO = re.compile(r"(?:answer (?:is )?)?(yes|no)\b")
# A sign counts only where nothing that could be subtracted from stands before it: "16-9" holds 16 and 9.
_NUMBER = re.compile(
    r"""
    (?P<sign> (?<![\w.)]) [-−] )?
    (?: [$€£] (?P<inner>[-−])? )?
    (?P<digits> (?: [0-9]{1,3} (?:,[0-9]{3})+ (?![0-9]) | [0-9]+ ) (?:\.[0-9]+)? | (?<![\w.]) \.[0-9]+ )
    """,
    re.VERBOSE,
)
_ANSWER_MARK = re.compile(r"the answer is\b", re.IGNORECASE)


@dataclass(frozen=True)
class Metric:
    """One way of scoring.

    Attributes:
        name: as written in a task.
        higher_is_better: False for losses.
        per_example: the score is the mean of a score of each row (so that rows can be resampled).
        description: one sentence for people.
        unit: "fraction" (0 to 1; Matthews correlation -1 to 1) or "nats" (per token).
    """

    name: str
    higher_is_better: bool
    per_example: bool
    description: str
    unit: Literal["fraction", "nats"] = "fraction"


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("exact_match", True, True, "share of predictions equal to a reference after normalisation"),
        Metric("exact_text", True, True, "share of predictions equal to a reference but for white space"),
        Metric("token_f1", True, True, "word overlap with the best reference (F1 over multisets)"),
        Metric("contains_alias", True, True, "share of predictions that contain a reference as whole words"),
        Metric("number_match", True, True, "share of predictions whose final number equals the reference's"),
        Metric("accuracy", True, True, "share of right choices; of right yes/no answers where text is generated"),
        Metric("matthews_correlation", True, False, "Matthews correlation of yes/no answers, -1 to 1"),
        Metric("f1_binary", True, False, "F1 of the answer yes"),
        Metric("loss", False, False, "mean cross-entropy per token", "nats"),
    )
}


def normalize_answer(text: str) -> str:
    """Lower case, no punctuation (of any script), no English articles, single spaces."""
    lowered = "".join(char for char in text.lower() if not _is_punctuation(char))
    return " ".join(_ARTICLES.sub(" ", lowered).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the prediction equals a reference after normalisation, else 0.0."""
    words = _words(prediction)
    return float(any(words == _words(reference) for reference in references))


def exact_text(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the prediction is a reference but for white space, else 0.0.

    For answers in which the letter a, case or punctuation carries meaning, which normalisation would remove.
    """
    return float(any(prediction.split() == reference.split() for reference in references))


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """F1 of the words shared with the best reference; a repeated word counts as often as both sides have it."""
    return max(_f1(_words(prediction), _words(reference)) for reference in references)


def contains_alias(prediction: str, references: Sequence[str]) -> float:
    """1.0 if a reference occurs in the prediction as whole words in a row: "no" is not in "know"."""
    text = f" {' '.join(_words(prediction))} "
    return float(any(f" {' '.join(words)} " in text for words in map(_words, references) if words))


def number_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the final number of the prediction equals that of a reference as a number: 18 == 18.0 == $18."""
    number = extract_number(prediction)
    return float(number is not None and any(number == extract_number(reference) for reference in references))


def extract_number(text: str) -> Decimal | None:
    """The number after the first "The answer is" in its line if there is one, else the last number of the text.

    Thousands commas, signs, decimals, currency and percent signs are understood; percent is not converted.
    """
    for mark in _ANSWER_MARK.finditer(text):
        line = text[mark.end() :].partition("\n")[0]
        found = _NUMBER.search(line)
        if found:
            return _to_decimal(found)
    numbers = list(_NUMBER.finditer(text))
    return _to_decimal(numbers[-1]) if numbers else None


def parse_yes_no(text: str) -> bool | None:
    """True or False if the normalised text begins with yes or no (also "the answer is yes"), else None."""
    found = _YES_NO.match(normalize_answer(text))
    return None if found is None else found[1] == "yes"


def yes_no_accuracy(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the prediction says the same of yes and no as the first reference; what says neither is wrong.

    Raises:
        DataError: the reference is not yes or no.
    """
    return float(parse_yes_no(prediction) == _label(references[0]))


def matthews_correlation(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Matthews correlation of yes/no answers; a prediction that is neither is a third, always wrong, answer.

    A model that never says yes or no therefore scores 0, not -1. References of one class only give 0.

    Raises:
        DataError: a reference is not yes or no.
    """
    labels = [_label(reference) for reference in references]
    guesses = [parse_yes_no(prediction) for prediction in predictions]
    if len(set(labels)) < 2:
        return 0.0  # undefined with one class only
    return float(matthews_corrcoef(_coded(labels), _coded(guesses)))


def f1_binary(predictions: Sequence[str], references: Sequence[str]) -> float:
    """F1 of the answer yes; a prediction that is neither yes nor no counts as the wrong one of the two.

    Raises:
        DataError: a reference is not yes or no.
    """
    labels = [_label(reference) for reference in references]
    parsed = [parse_yes_no(prediction) for prediction in predictions]
    guesses = [not label if guess is None else guess for guess, label in zip(parsed, labels, strict=True)]
    return float(f1_score(labels, guesses, zero_division=0.0))


PER_EXAMPLE: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "exact_text": exact_text,
    "token_f1": token_f1,
    "contains_alias": contains_alias,
    "number_match": number_match,
    "accuracy": yes_no_accuracy,
}
OVER_ALL: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "matthews_correlation": matthews_correlation,
    "f1_binary": f1_binary,
}


def score_texts(
    name: str, predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, list[float]]:
    """The score of a metric over generated texts, and that of each row (empty if it has none).

    Args:
        name: a metric for texts, that is any but "loss".
        predictions: one text per row.
        references: the accepted answers of each row.

    Raises:
        UsageError: no metric for texts has this name.
        DataError: the references do not suit the metric.
    """
    if name in PER_EXAMPLE:
        scores = [PER_EXAMPLE[name](text, answers) for text, answers in zip(predictions, references, strict=True)]
        return sum(scores) / len(scores), scores
    if name in OVER_ALL:
        return OVER_ALL[name](predictions, [answers[0] for answers in references]), []
    raise UsageError(unknown_name("metric", name, [*PER_EXAMPLE, *OVER_ALL]))


def _is_punctuation(char: str) -> bool:
    return char in string.punctuation or unicodedata.category(char).startswith("P")


def _words(text: str) -> list[str]:
    # An answer that is nothing but an article or punctuation ("A", "+") must not vanish.
    return normalize_answer(text).split() or text.lower().split()


def _f1(prediction: list[str], reference: list[str]) -> float:
    shared = sum((Counter(prediction) & Counter(reference)).values())
    return 2 * shared / (len(prediction) + len(reference)) if shared else 0.0


def _to_decimal(found: re.Match[str]) -> Decimal:
    value = Decimal(found["digits"].replace(",", ""))
    return -value if found["sign"] or found["inner"] else value


def _label(reference: str) -> bool:
    label = parse_yes_no(reference)
    if label is None:
        raise DataError(f"The reference {reference!r:.60} is not yes or no. Choose another metric, or map the labels.")
    return label


def _coded(answers: Sequence[bool | None]) -> list[int]:
    return [-1 if answer is None else int(answer) for answer in answers]
