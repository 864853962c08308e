"""The lens shows the gate that wrote each token, and texts that add up to the answer."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from twinweave import IMSMConfig, get_imsm_model
from twinweave.evaluation import original_shares, resolve_task, token_texts
from twinweave.evaluation.lens import read_lens


@pytest.fixture(scope="module")
def words():
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *(x + y for x in "abcdefgh" for y in "stuvwxy"), "z"]
    assert len(vocabulary) == 61
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def every_byte():
    """One token for each byte, so that most characters are spread over several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def test_shares_are_the_gate_computed_token_by_token(make_imsm, tokens, words):
    model = make_imsm("llama")
    prompt = tokens(1, 6)[0].tolist()
    ids, shares = original_shares(model, words, prompt, max_new_tokens=9)
    written = list(prompt)
    for token, share in zip(ids, shares, strict=True):
        # greedy, without a cache, with the prompt as the query of every step
        query = torch.tensor([[1] * len(prompt) + [0] * (len(written) - len(prompt))])
        with torch.no_grad():
            out = model(input_ids=torch.tensor([written]), query_mask=query, output_gate=True)
        assert out.logits[0, -1].argmax().item() == token
        assert share == pytest.approx(out.gate[0, -1].mean().item(), abs=6e-5)
        written.append(token)
    assert len(ids) == 9 or ids[-1] == words.eos_token_id
    assert len(set(shares)) > 1
    for retention, share in ((float("inf"), 1.0), (float("-inf"), 0.0)):
        model.retention = retention
        assert set(original_shares(model, words, prompt, max_new_tokens=3)[1]) == {share}


def test_the_answer_ends_at_any_of_the_models_ends_and_is_greedy(make_imsm, tokens, words):
    model = make_imsm("llama")
    prompt = tokens(1, 6)[0].tolist()
    ids, _ = original_shares(model, words, prompt, max_new_tokens=9)
    assert len(ids) > 3
    model.generation_config.eos_token_id = [ids[2], 60]
    assert original_shares(model, words, prompt, max_new_tokens=9)[0] == ids[: ids.index(ids[2]) + 1]
    model.generation_config.eos_token_id = None
    model.generation_config.repetition_penalty = 50.0  # somebody's taste, not what the model finds likeliest
    assert original_shares(model, words, prompt, max_new_tokens=9)[0] == ids


@pytest.mark.parametrize(
    "text", ["plain words", "naïve café", "日本語 と 漢字", "🙂🙃 a", "tail 🙂", " two  spaces ", "�x", ""]
)
def test_token_texts_add_up_to_the_text(every_byte, text):
    ids = every_byte(text)["input_ids"]
    texts = token_texts(every_byte, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == every_byte.decode(ids) == text


def test_token_texts_of_half_a_character_and_of_special_tokens(every_byte, words):
    ids = every_byte("é")["input_ids"][:1]
    assert token_texts(every_byte, ids) == ["�"]
    assert token_texts(every_byte, [*every_byte("é")["input_ids"], *ids]) == ["", "é", "�"]
    ids = [5, 6, words.eos_token_id]
    assert "".join(token_texts(words, ids)) == words.decode(ids)
    assert token_texts(words, ids)[-1].strip() == "</s>"


def test_prompts_are_spread_over_the_tasks_that_have_any(make_imsm, words, tmp_path):
    def task(name, kind, rows, **more):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return resolve_task({"name": name, "kind": kind, "data": str(file), "max_new_tokens": 4, **more})

    rows = [{"prompt": f"as b{x}", "completion": f"c{x}"} for x in "stu"]
    tasks = [
        task("one", "completion_loss", rows),
        task("two", "generation", rows[:1], metrics=["exact_match"]),
        task("text", "text_loss", [{"text": "as bs"}]),
    ]
    entries = read_lens(make_imsm("llama"), words, tasks, prompts=5)
    assert [(e["task"], e["prompt"], e["reference"]) for e in entries] == [
        ("one", "as bs", "cs"),
        ("two", "as bs", "cs"),
        ("one", "as bt", "ct"),
        ("one", "as bu", "cu"),
    ]
    assert all(1 <= len(e["tokens"]) <= 4 for e in entries)
    assert read_lens(make_imsm("llama"), words, tasks[2:], prompts=5) == []


def test_prompts_longer_than_the_window_are_cut_and_not_an_index_error(words, make_peft, tmp_path):
    base = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=16, n_embd=16, n_layer=1, n_head=2)).eval()
    model = get_imsm_model(base, make_peft("lora", "gpt2"), IMSMConfig(gate_rank=2)).eval()
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({"prompt": "as " * 40 + "bs", "completion": "cs"}) + "\n")
    for new_tokens, entries in ((4, 1), (64, 0)):  # no room for a prompt: no entry
        fields = {"name": "long", "kind": "completion_loss", "data": str(file), "max_new_tokens": new_tokens}
        found = read_lens(model, words, [resolve_task(fields)], prompts=1)
        assert len(found) == entries
