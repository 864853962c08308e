"""A text gives the same chunks however it arrives."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twinweave import text as module
from twinweave.errors import DataError
from twinweave.text import blocks_of_text, chunks_of, digest_and_pieces


def chunks(text, tokenizer, size=8):
    digest, pieces = digest_and_pieces(text)
    found = list(chunks_of(pieces, tokenizer, size))
    return found, digest()


@settings(deadline=None, max_examples=60)
@given(pieces=st.lists(st.text("ab \n", max_size=30), max_size=12), block=st.integers(2, 20))
def test_blocks_depend_on_the_text_alone(pieces, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        whole = "".join(pieces)
        found = list(blocks_of_text(pieces))
        assert found == list(blocks_of_text([whole]))
        assert "".join(found) == whole
        assert all(0 < len(one) <= block for one in found)


def test_a_file_a_str_and_a_stream_give_the_same_chunks(tokenizer, tmp_path):
    text = "one line\nand another,\n" * 9 + "the end"
    file = tmp_path / "text.txt"
    file.write_bytes(text.encode())
    expected = chunks(text, tokenizer)
    assert chunks(file, tokenizer) == expected
    assert chunks(iter([text[:5], "", text[5:6], text[6:]]), tokenizer) == expected
    assert expected[1] == hashlib.sha256(text.encode()).hexdigest()
    file.write_bytes(text.replace("\n", "\r\n").encode())
    assert chunks(file, tokenizer) == chunks(file.read_text(encoding="utf-8"), tokenizer) == expected
    ids = [i for chunk, _ in expected[0] for i in chunk[1:]]
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert all(chunk[0] == tokenizer.bos_token_id for chunk, _ in expected[0])
    assert {own for _, own in expected[0][:-1]} == {8}


@pytest.mark.parametrize("text", ["", " \n ", [], ["", "  "], 5, b"bytes", ["a", b"b"], "a \ud800 b"])
def test_what_is_no_text_is_refused(tokenizer, text):
    with pytest.raises(DataError, match=r"Give|half a character .*ud800.*Decode it"):
        chunks(text, tokenizer)


def test_files_that_cannot_be_read(tokenizer, tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        chunks(tmp_path / "none.txt", tokenizer)
    (tmp_path / "bad.txt").write_bytes(b"a\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        chunks(tmp_path / "bad.txt", tokenizer)
