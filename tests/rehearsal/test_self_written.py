"""What a base writes by itself, and the file that keeps it."""

import pytest
import torch

import tiny_runs
from twinweave.errors import DamagedFileError, DataError, UnsupportedModelError
from twinweave.rehearsal import RehearsalSettings, Written, load_sequences, read_sequences, write_sequences
from twinweave.rehearsal.store import NAME

TEMPLATE = (
    "{% for m in messages %}{{ 'yes ' if m.role == 'user' else 'no ' }}{{ m.content }}{{ ' ? ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'no ' }}{% endif %}"
)
BOS, EOS = 2, 3


@pytest.fixture
def base(make_base):
    model = make_base("llama")
    model.generation_config.eos_token_id = EOS
    return model


@pytest.fixture
def tokenizer():
    return tiny_runs.word_tokenizer()


def small(**changes):
    return RehearsalSettings(**{"sequences": 70, "length": 12} | changes)


def test_texts_start_at_the_start_and_end_at_the_end(base, tokenizer):
    state = torch.random.get_rng_state()
    texts = write_sequences(base, tokenizer, small())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(texts) == 70
    assert len({tuple(text.ids) for text in texts}) > 60
    for text in texts:
        assert text.ids[0] == BOS
        assert text.answer is None
        assert EOS not in text.ids[:-1]
        assert len(text.ids) == 12 or text.ids[-1] == EOS
    assert any(text.ids[-1] == EOS for text in texts)
    assert write_sequences(base, tokenizer, small()) == texts
    assert write_sequences(base, tokenizer, small(seed=1)) != texts


def test_temperature_is_that_of_the_distribution(base, tokenizer):
    cold = write_sequences(base, tokenizer, small(temperature=1e-4))
    greedy = [BOS]
    while len(greedy) < 12 and greedy[-1] != EOS:
        greedy.append(int(base(torch.tensor([greedy])).logits[0, -1].argmax()))
    assert all(text.ids == greedy for text in cold)
    # the first token's frequencies are the base's own
    many = write_sequences(base, tokenizer, small(sequences=3000, length=8))
    found = torch.bincount(torch.tensor([text.ids[1] for text in many]), minlength=61) / 3000
    wanted = base(torch.tensor([[BOS]])).logits[0, -1].softmax(-1)
    assert (found - wanted).abs().max() < 0.04


def test_a_model_file_that_asks_for_its_own_sampling_is_not_heard(base, tokenizer):
    before = write_sequences(base, tokenizer, small())
    base.generation_config.top_k, base.generation_config.top_p = 1, 0.1
    assert write_sequences(base, tokenizer, small()) == before


def test_a_tokenizer_without_a_start_begins_behind_the_end_of_a_text(base):
    texts = write_sequences(base, tiny_runs.word_tokenizer(bos_token=None), small())
    assert all(text.ids[0] == EOS for text in texts)
    assert any(len(text.ids) > 1 for text in texts)


def test_chat_models_write_both_sides(base, tokenizer):
    tokenizer.chat_template = TEMPLATE
    ask, reply = (tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    close = tokenizer.convert_tokens_to_ids("?")
    texts = write_sequences(base, tokenizer, small(length=16))
    assert len({tuple(text.ids) for text in texts}) > 60
    for text in texts:
        assert len(text.ids) <= 16
        assert text.ids[0] == ask
        if text.answer is not None:
            assert text.ids[text.answer - 2 : text.answer] == [close, reply]
            assert EOS not in text.ids[: text.answer]
    assert sum(text.answer is not None for text in texts) > 60
    plain = write_sequences(base, tokenizer, small(chat="off"))
    assert all(text.ids[0] == BOS for text in plain)


def test_chat_settings_that_cannot_be_met(base, tokenizer):
    with pytest.raises(UnsupportedModelError, match="chat template"):
        write_sequences(base, tokenizer, small(chat="on"))
    tokenizer.chat_template = "{{ 'yes' }}"
    with pytest.raises(UnsupportedModelError, match="leaves out"):
        write_sequences(base, tokenizer, small())
    tokenizer.chat_template = "{{ 'a b c d e f ' + messages[0].content + ' a b c' }}"
    with pytest.raises(DataError, match=r"length is 8"):
        write_sequences(base, tokenizer, small(length=8))


def test_they_are_written_once(tmp_path):
    written = [Written([1, 2, 3]), Written([4], None), Written([5, 6], 1)]
    calls = []

    def write():
        calls.append(1)
        return written

    for _ in range(2):
        assert load_sequences(tmp_path / "here", {"base": "x", "length": 3}, write) == written
    assert len(calls) == 1
    with pytest.raises(DamagedFileError, match="length"):
        load_sequences(tmp_path / "here", {"base": "x", "length": 4}, write)


def test_a_damaged_file_is_refused(tmp_path):
    load_sequences(tmp_path, {}, lambda: [Written([1, 2, 3])])
    file = tmp_path / NAME
    whole = file.read_bytes()
    for content in (whole[:20], b"PK\x03\x04" + whole, b""):
        file.write_bytes(content)
        with pytest.raises(DamagedFileError):
            load_sequences(tmp_path, {}, list)


def test_nothing_is_left_of_a_writing_that_fails(tmp_path):
    with pytest.raises(ZeroDivisionError):
        load_sequences(tmp_path / "here", {}, lambda: 1 / 0)
    assert not (tmp_path / "here").exists()


def test_own_text_comes_in_pieces(world, tokenizer):
    settings = RehearsalSettings(text=str(world / "text.jsonl"), length=8, text_rows=7)
    texts = read_sequences(tokenizer, settings)
    assert len(texts) == 7
    assert all(text.ids[0] == BOS and len(text.ids) <= 8 and text.answer is None for text in texts)
    rows = read_sequences(tokenizer, RehearsalSettings(text=str(world / "train.jsonl"), length=24))
    assert len(rows) == 24
    assert all(tokenizer.decode(row.ids[row.answer - 1]) == ":" for row in rows)
    short = read_sequences(tokenizer, RehearsalSettings(text=str(world / "train.jsonl"), length=8))
    assert [row.ids for row in short] == [row.ids[:8] for row in rows]
    assert all(row.answer is None or row.answer < 8 for row in short)
    (world / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match=r"empty\.jsonl"):
        read_sequences(tokenizer, RehearsalSettings(text=str(world / "empty.jsonl")))
