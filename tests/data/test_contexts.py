import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twinweave.data import (
    CompletionCollator,
    ContextCollator,
    ContextRows,
    SegmentCollator,
    collator_for,
    prepare_segments,
    prepare_training_data,
    to_example,
)
from twinweave.errors import DataError, UnsupportedModelError

WHERE = "x.jsonl row 1"


@pytest.fixture
def write(tmp_path):
    def make(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return make


def row(context, prompt, completion="yes"):
    return {"context": context, "prompt": prompt, "completion": completion}


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_what_a_context_is():
    a_row = {"documents": ["a b", "c"], "title": "t", "prompt": "p", "completion": "q"}
    for context in ("documents", "{documents}"):
        assert to_example(a_row, where=WHERE, context=context).documents == ("a b", "c")
    assert to_example(a_row, where=WHERE, context="{title}: {prompt}").documents == ("t: p",)
    assert to_example(a_row, where=WHERE).documents == ()
    joined = to_example(a_row, where=WHERE, context="documents").with_documents_in_prompt()
    assert (joined.prompt, joined.documents) == ("a b\nc\np", ())
    for wrong in ({"documents": ["a", " "]}, {"documents": 3}, {"documents": [["a"]]}):
        with pytest.raises(DataError, match=r"a context with .* give texts"):
            to_example(a_row | wrong, where=WHERE, context="documents")
    with pytest.raises(DataError, match=r"does not fit x\.jsonl row 1"):
        to_example(a_row, where=WHERE, context="nothing")


def test_a_chat_gets_its_context_into_its_first_turn():
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "v"}]
    example = to_example({"messages": turns, "text": "a"}, where=WHERE, context="text").with_documents_in_prompt()
    assert [turn["content"] for turn in example.messages] == ["a\nu", "v"]


def test_rows_with_the_same_context_share_it(write, words):
    path = write("x.jsonl", [row(["a b c", "d"], "e"), row("f", "g", "no"), row(["a b c", "d"], "h")])
    questions = write("y.jsonl", [row("f", "z")])
    rows = ContextRows(words, chunk_size=2)
    # a column of texts cannot hold a list too, so each source has one kind
    with pytest.raises(DataError, match="mixes kinds"):
        prepare_training_data(path, words, max_length=9, context="context", make_rows=rows, validation=questions)
    path = write("x.jsonl", [row(["a b c", "d"], "e"), row(["f"], "g", "no"), row(["a b c", "d"], "h")])
    made = prepare_training_data(path, words, max_length=9, context="context", make_rows=rows, validation=questions)
    first, second = made.train
    assert first["chunks"] == [ids(words, "a b"), ids(words, "c"), ids(words, "d")]
    assert second["chunks"] == [ids(words, "f")]
    eos = words.eos_token_id
    answer = [*ids(words, "yes"), eos]
    assert first["questions"] == [
        {"input_ids": [*ids(words, letter), *answer], "labels": [-100, *answer]} for letter in "eh"
    ]
    assert made.report.train_rows == 3
    assert isinstance(collator_for(made, words), ContextCollator)
    plain = prepare_training_data(path, words, max_length=9, context="context", validation=questions)
    assert words.decode(plain.train[0]["input_ids"]) == "a b c d e yes </s>"
    assert isinstance(collator_for(plain, words), CompletionCollator)
    fewer = prepare_training_data(
        path, words, max_length=9, context="context", make_rows=ContextRows(words, 2, questions=1), validation=questions
    )
    assert [len(r["questions"]) for r in fewer.train] == [1, 1, 1]
    assert fewer.train[0]["chunks"] == fewer.train[1]["chunks"]


def test_no_context_is_in_both_sets(write, words):
    path = write("x.jsonl", [row(letter, f"{other} {letter}") for letter in "abcdefgh" for other in "mnop"])
    rows = ContextRows(words, chunk_size=4)
    made = prepare_training_data(path, words, max_length=9, context="context", make_rows=rows, validation_fraction=0.25)
    assert (made.report.train_rows, made.report.validation_rows) == (24, 8)
    train, held = ({tuple(r["chunks"][0]) for r in part} for part in (made.train, made.validation))
    assert (len(train), len(held)) == (6, 2)
    assert not train & held
    plain = prepare_training_data(path, words, max_length=9, context="context", validation_fraction=0.25)
    assert {tuple(r["input_ids"][:1]) for r in plain.validation} == held  # the same rows for those that do not read
    one = write("one.jsonl", [row("a", "b"), row("a", "c")])
    with pytest.raises(DataError, match="One context cannot be split"):
        prepare_training_data(one, words, max_length=9, context="context")


def test_a_batch_of_contexts(words):
    rows = [
        {"chunks": [[5, 6], [7]], "questions": [{"input_ids": [8, 9], "labels": [-100, 9]}]},
        {
            "chunks": [[10]],
            "questions": [{"input_ids": [11, 12, 13], "labels": [-100, -100, 13]}, {"input_ids": [3], "labels": [3]}],
        },
    ]
    pad = words.pad_token_id
    batch = ContextCollator(words)(rows)
    assert next(iter(batch)) == "input_ids"
    assert batch["context_ids"].tolist() == [[5, 6], [7, pad], [10, pad]]
    assert batch["context_mask"].tolist() == [[1, 1], [1, 0], [1, 0]]
    assert batch["reads"].tolist() == [[1, 1, 0], [0, 0, 1]]
    assert batch["input_ids"].tolist() == [[8, 9, pad], [pad] * 3, [11, 12, 13], [3, pad, pad]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 9, -100], [-100] * 3, [-100, -100, 13], [3, -100, -100]]


def test_segments_of_text(write, bytes_bpe):
    start = bytes_bpe.bos_token_id
    text = "abcdefghijk"  # a token each
    path = write("x.jsonl", [{"t": text}, {"t": " "}, {"t": "ab"}, {"t": "a"}])
    made = prepare_segments(path, bytes_bpe, "{t}", chunk_size=2, segment_chunks=3, validation=path)
    letters = ids(bytes_bpe, text)
    pairs = [[start, *letters[at : at + 2]] for at in range(0, 11, 2)]
    assert len(letters) == 11
    assert made.validation["chunks"][:2] == [pairs[:3], pairs[3:]]
    # one chunk is cut into halves, one token is nothing to learn from
    assert made.validation["chunks"][2:] == [[[start, letters[0]], [start, letters[1]]]]
    assert isinstance(collator_for(made, bytes_bpe), SegmentCollator)
    held = prepare_segments(path, bytes_bpe, "{t}", chunk_size=2, segment_chunks=3)
    assert (len(held.train), len(held.validation)) == (2, 1)
    with pytest.raises(DataError, match="one text"):
        prepare_segments(write("y.jsonl", [{"t": "abc"}]), bytes_bpe, "{t}", chunk_size=2, segment_chunks=3)
    with pytest.raises(DataError, match="no text of two words"):
        prepare_segments(write("z.jsonl", [{"t": ""}]), bytes_bpe, "{t}", chunk_size=2)


def test_no_text_is_learned_from_and_validated_on(write, bytes_bpe):
    texts = [chr(97 + i) * 9 for i in range(8)]
    path = write("x.jsonl", [{"t": text} for text in (*texts, texts[0])])
    made = prepare_segments(path, bytes_bpe, "{t}", chunk_size=2, segment_chunks=2, validation_fraction=0.4)
    train, held = ({row["chunks"][0][1] for row in part} for part in (made.train, made.validation))
    assert len(train) + len(held) == 8
    assert len(held) >= 2
    assert not train & held


def test_a_tokenizer_that_cannot_pad_is_refused(write, bytes_bpe):
    unpadded = copy.deepcopy(bytes_bpe)
    unpadded.pad_token = None
    with pytest.raises(UnsupportedModelError, match="padding"):
        prepare_segments(write("x.jsonl", [{"t": "abc"}, {"t": "def"}]), unpadded, "{t}", chunk_size=2)


@given(sizes=st.lists(st.integers(2, 5), min_size=1, max_size=4))
def test_a_batch_of_segments(sizes, words):
    segments = [[[0, 10 * s + c + 3] for c in range(size)] for s, size in enumerate(sizes)]
    rows = [{"chunks": segment} for segment in segments]
    batch = SegmentCollator(words)(rows)
    assert all(torch.equal(tensor, batch[name]) for name, tensor in SegmentCollator(words)(rows).items())
    assert batch["context_ids"].tolist() == [chunk for segment in segments for chunk in segment[:-1]]
    assert len(batch["input_ids"]) == 2 * len(batch["reads"]) == 2 * sum(size - 1 for size in sizes)
    states = [(segment, j) for segment in segments for j in range(1, len(segment))]
    for (segment, j), read, again, onward in zip(
        states, batch["reads"], batch["input_ids"][::2], batch["input_ids"][1::2], strict=True
    ):
        seen = batch["context_ids"][read.bool()].tolist()
        assert seen == segment[:j]
        assert again.tolist() in seen
        assert onward.tolist() == segment[j]
    assert batch["labels"][:, 0].eq(-100).all()
    assert torch.equal(batch["labels"][:, 1:], batch["input_ids"][:, 1:])


def test_another_batch_says_other_chunks_again(words):
    segment = {"chunks": [[0, c] for c in range(3, 11)]}
    others = [{"chunks": [[0, n], [0, n + 1]]} for n in range(8)]
    drawn = {tuple(SegmentCollator(words)([segment, other])["input_ids"][:14:2, 1].tolist()) for other in others}
    assert len(drawn) > 3
