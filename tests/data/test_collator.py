import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twinweave.data import IGNORED_LABEL, CompletionCollator

ids = st.lists(st.integers(0, 28), min_size=1, max_size=9)
batches = st.lists(ids, min_size=1, max_size=5)


@pytest.mark.parametrize("side", ["left", "right"])
@given(batch=batches, multiple=st.sampled_from([None, 1, 4, 8]))
def test_round_trip(words, side, batch, multiple):
    rows = [{"input_ids": row, "labels": [IGNORED_LABEL, *row[1:]], "extra": "x"} for row in batch]
    made = CompletionCollator(words, padding_side=side, pad_to_multiple_of=multiple)(rows)
    assert set(made) == {"input_ids", "attention_mask", "labels"}
    assert {tensor.dtype for tensor in made.values()} == {torch.long}
    longest = max(map(len, batch))
    assert longest <= made["input_ids"].shape[1] < longest + (multiple or 1)
    for index, row in enumerate(rows):
        real = made["attention_mask"][index].bool()
        assert made["input_ids"][index][real].tolist() == row["input_ids"]
        assert made["labels"][index][real].tolist() == row["labels"]
        assert set(made["input_ids"][index][~real].tolist()) <= {words.pad_token_id}
        assert set(made["labels"][index][~real].tolist()) <= {IGNORED_LABEL}
        order = real.int().tolist()
        assert order == sorted(order, reverse=side == "right")


def test_padding_that_is_the_end_of_text_hides_no_token(words):
    kept, words.pad_token = words.pad_token, words.eos_token
    end = words.eos_token_id
    rows = [{"input_ids": [5, end], "labels": [IGNORED_LABEL, end]}, {"input_ids": [5], "labels": [5]}]
    made = CompletionCollator(words)(rows)
    words.pad_token = kept
    assert made["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert made["labels"].tolist() == [[IGNORED_LABEL, end], [5, IGNORED_LABEL]]
