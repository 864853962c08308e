import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from twinweave.data import IGNORED_LABEL, Example, check_tokenizer, encode_example, encode_prompt, join_completion
from twinweave.data.encode import bos_ids, text_ids
from twinweave.errors import DataError, UnsupportedModelError

texts = st.text(min_size=1, max_size=40).filter(str.strip)
letters = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=12).map(" ".join)
turns = st.lists(st.tuples(texts, texts), min_size=1, max_size=3)


def example(prompt, completion):
    return Example(where="row 3", prompt=prompt, completion=completion, references=(completion,))


def chat(pairs):
    messages = []
    for question, answer in pairs:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Example(where="row 3", messages=tuple(messages), references=(pairs[-1][1],))


def trained(encoded):
    return [label for label in encoded.labels if label != IGNORED_LABEL]


@given(prompt=texts, completion=texts, max_length=st.integers(2, 80))
def test_invariants_of_prompt_and_completion(bytes_bpe, prompt, completion, max_length):
    whole_prompt = text_ids(bytes_bpe, prompt)
    answer = [*text_ids(bytes_bpe, join_completion(prompt, completion)), bytes_bpe.eos_token_id]
    fits = 1 + 1 + len(answer) <= max_length
    if not fits:
        with pytest.raises(DataError, match=f"row 3.*{max_length}"):
            encode_example(example(prompt, completion), bytes_bpe, max_length=max_length)
        return
    encoded = encode_example(example(prompt, completion), bytes_bpe, max_length=max_length)
    assert len(encoded.input_ids) == len(encoded.labels) <= max_length
    assert trained(encoded) == answer == encoded.input_ids[-len(answer) :]
    assert encoded.labels[: -len(answer)] == [IGNORED_LABEL] * (len(encoded.labels) - len(answer))
    assert encoded.input_ids[0] == bytes_bpe.bos_token_id
    kept = encoded.input_ids[1 : -len(answer)]
    assert kept == whole_prompt[-len(kept) :] != []
    assert encoded.cut == (len(kept) < len(whole_prompt))
    assert not encoded.cut or len(encoded.input_ids) == max_length


def test_the_smallest_window_holds_start_one_prompt_token_answer_and_end(bytes_bpe):
    row = example("a question", "yes")
    answer = [*text_ids(bytes_bpe, " yes"), bytes_bpe.eos_token_id]
    smallest = 1 + 1 + len(answer)
    encoded = encode_example(row, bytes_bpe, max_length=smallest)
    assert encoded.input_ids == [bytes_bpe.bos_token_id, text_ids(bytes_bpe, row.prompt)[-1], *answer]
    with pytest.raises(DataError, match=f"the window is {smallest - 1}"):
        encode_example(row, bytes_bpe, max_length=smallest - 1)


@given(prompt=letters, completion=letters)
def test_training_starts_from_what_generation_starts_from(words, prompt, completion):
    encoded = encode_example(example(prompt, completion), words, max_length=100)
    ids, cut = encode_prompt(prompt, words, max_length=100)
    assert encoded.input_ids[: len(ids)] == ids
    assert words.decode(encoded.input_ids[len(ids) :]) == f"{completion} </s>"
    assert not cut
    assert bos_ids(words) == []


@given(pairs=turns, max_length=st.integers(1, 200))
def test_invariants_of_chats(bytes_bpe, pairs, max_length):
    assume(not any("<" in text for pair in pairs for text in pair))
    whole = encode_example(chat(pairs), bytes_bpe, max_length=10_000)
    assert bytes_bpe.decode(whole.input_ids) == bytes_bpe.apply_chat_template(
        list(chat(pairs).messages), tokenize=False
    ).removesuffix("\n")
    assert bytes_bpe.decode(trained(whole)) == "".join(f"{answer}<|end|>" for _, answer in pairs)
    try:
        cut = encode_example(chat(pairs), bytes_bpe, max_length=max_length)
    except DataError:
        return
    assert len(cut.input_ids) == len(cut.labels) <= max_length
    assert trained(cut) == trained(whole)
    assert cut.input_ids[0] == bytes_bpe.bos_token_id
    tail = len(cut.input_ids) - 1
    assert cut.input_ids[1:] == whole.input_ids[-tail:]


@given(pairs=turns)
def test_chat_prompt_is_the_start_of_the_training_row(bytes_bpe, pairs):
    assume(not any("<" in text for pair in pairs for text in pair))
    row = chat(pairs)
    ids, _ = encode_prompt(row.messages[:-1], bytes_bpe, max_length=10_000)
    assert encode_example(row, bytes_bpe, max_length=10_000).input_ids[: len(ids)] == ids


@given(prompt=texts, max_length=st.integers(2, 30))
def test_prompts_lose_their_start(bytes_bpe, prompt, max_length):
    ids, cut = encode_prompt(prompt, bytes_bpe, max_length=max_length)
    whole = text_ids(bytes_bpe, prompt)
    assert ids[0] == bytes_bpe.bos_token_id
    assert ids[1:] == whole[-(max_length - 1) :]
    assert cut == (len(whole) + 1 > max_length)


@pytest.mark.parametrize(
    ("prompt", "completion", "joined"),
    [
        ("Q: x", "yes", " yes"),
        ("Q: x ", "yes", "yes"),
        ("Q:\n", "yes", "yes"),
        ("Q:", " yes", " yes"),
        ("Q:", "\nyes", "\nyes"),
        ("", "yes", "yes"),
    ],
)
def test_join_completion(prompt, completion, joined):
    assert join_completion(prompt, completion) == joined


def test_a_template_without_an_end_marker_gets_the_end_of_text(words, restore):
    restore.chat_template = "{% for m in messages %}{{ m.role[0] }} {{ m.content }} {% endfor %}"
    encoded = encode_example(chat([("b", "c d")]), restore, max_length=50)
    assert trained(encoded)[-1] == restore.eos_token_id
    assert "c d" in restore.decode(trained(encoded))


@pytest.fixture
def restore(words):
    kept = words.chat_template, words.eos_token, words.pad_token
    yield words
    words.chat_template, words.eos_token, words.pad_token = kept


def test_templates_that_cannot_be_used(restore):
    with pytest.raises(UnsupportedModelError, match="no chat template"):
        encode_example(chat([("a", "b")]), restore, max_length=50)
    restore.chat_template = "{{ messages | length }} {% for m in messages %}{{ m.content }} {% endfor %}"
    with pytest.raises(UnsupportedModelError, match="differently when later ones follow"):
        encode_example(chat([("a", "b")]), restore, max_length=50)
    restore.chat_template = "{{ raise_exception('no system turn, please') }}"
    with pytest.raises(DataError, match=r"row 3: the chat template refuses .*no system turn, please"):
        encode_example(chat([("a", "b")]), restore, max_length=50)


def test_texts_without_tokens(bytes_bpe):
    with pytest.raises(DataError, match="prompt has no tokens"):
        encode_prompt("", bytes_bpe, max_length=9)


def test_tokenizer_needs_an_end_and_padding(restore):
    check_tokenizer(restore)
    restore.pad_token = None
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.pad_token = tokenizer\.eos_token"):
        check_tokenizer(restore)
    with pytest.raises(UnsupportedModelError, match="'<nope>' is not in the vocabulary"):
        check_tokenizer(restore, pad_token="<nope>")
    assert restore.pad_token is None
    check_tokenizer(restore, pad_token="</s>")
    assert restore.pad_token_id == restore.eos_token_id
    restore.eos_token = None
    with pytest.raises(UnsupportedModelError, match="no end-of-text token"):
        check_tokenizer(restore)
