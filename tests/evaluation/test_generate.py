import copy
import logging
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from twinweave.evaluation import generate_texts
from twinweave.evaluation.generate import _cut

prompts = st.lists(st.lists(st.integers(7, 35), min_size=1, max_size=10), min_size=1, max_size=5)
END = 3


def greedy(model, tokenizer, prompt, steps):
    """Token by token, one row, no cache, no padding; ends at the end of text."""
    ids = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == END:
            break
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()


@settings(max_examples=20)
@given(prompts=prompts, batch_size=st.integers(1, 4))
def test_batches_equal_single_rows_without_a_cache(model, tokenizer, prompts, batch_size):
    with torch.inference_mode():
        made = generate_texts(model, tokenizer, prompts, max_new_tokens=6, batch_size=batch_size)
    assert made == [greedy(model, tokenizer, prompt, 6) for prompt in prompts]


@settings(max_examples=15)
@given(prompts=prompts, stop=st.lists(st.sampled_from(["a", "b c", "x", "yes", "no"]), min_size=1, max_size=3))
def test_stop_texts_cut_the_answer_and_only_shorten_the_work(llama, tokenizer, prompts, stop):
    with torch.inference_mode():
        whole = generate_texts(llama, tokenizer, prompts, max_new_tokens=8)
        made = generate_texts(llama, tokenizer, prompts, max_new_tokens=8, stop=stop)
    assert made == [_cut(text, stop).strip() for text in whole]
    assert not any(mark in text for text in made for mark in stop)


def test_work_ends_once_every_row_has_stopped(llama, tokenizer, monkeypatch):
    lengths = []
    plain = llama.generate

    def spy(**kwargs):
        output = plain(**kwargs)
        lengths.append(output.shape[1] - kwargs["input_ids"].shape[1])
        return output

    monkeypatch.setattr(llama, "generate", spy)
    [whole] = generate_texts(llama, tokenizer, [[9, 10]], max_new_tokens=8)
    assert len(whole.split()) > 2, "pick another prompt: this one ends at once"
    generate_texts(llama, tokenizer, [[9, 10]], max_new_tokens=8, stop=[whole.split()[0]])
    assert lengths[1] == 1 < lengths[0]


def test_a_stop_text_in_the_prompt_does_not_count(llama, tokenizer):
    whole = generate_texts(llama, tokenizer, [[9, 10]], max_new_tokens=8)
    stop = [tokenizer.decode([10])]
    assert generate_texts(llama, tokenizer, [[9, 10]], max_new_tokens=8, stop=stop)[0] == _cut(whole[0], stop).strip()


def noisy(model):
    model.generation_config.update(do_sample=True, temperature=5.0, top_p=0.3, num_beams=3, repetition_penalty=9.0)
    model.generation_config.update(max_length=20, min_p=0.1, no_repeat_ngram_size=1)
    return model


@pytest.mark.parametrize("adapted", [False, True])
def test_the_models_own_settings_neither_leak_nor_warn(tokenizer, llama, caplog, monkeypatch, adapted):
    prompts = [[9, 10], [11]]
    before = generate_texts(llama, tokenizer, prompts, max_new_tokens=8)
    model = noisy(copy.deepcopy(llama))
    if adapted:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")).eval()
    own = model.generation_config
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error", UserWarning)
        assert generate_texts(model, tokenizer, prompts, max_new_tokens=8) == before
    assert not caplog.messages
    assert model.generation_config is own
    assert own.temperature == 5.0


def test_every_end_of_text_of_the_model_ends_an_answer(llama, tokenizer):
    [whole] = generate_texts(llama, tokenizer, [[9, 10]], max_new_tokens=8)
    third = tokenizer.convert_tokens_to_ids(whole.split()[2])
    llama.generation_config.eos_token_id = [END, third]
    try:
        [made] = generate_texts(llama, tokenizer, [[9, 10]], max_new_tokens=8)
    finally:
        llama.generation_config.eos_token_id = END
    words = whole.split()
    assert made.split() == words[: words.index(words[2]) + 1]


@pytest.mark.parametrize(
    ("text", "stop", "cut"),
    [("a b\nc", ["\n"], "a b"), ("abc", [], "abc"), ("abcd", ["d", "b"], "a"), ("abc", ["x"], "abc"), ("b", ["b"], "")],
)
def test_cut(text, stop, cut):
    assert _cut(text, stop) == cut
