import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from twinweave.data import IGNORED_LABEL
from twinweave.errors import DataError, UnsupportedModelError, UsageError
from twinweave.evaluation import evaluate_task, evaluate_tasks, resolve_task
from twinweave.evaluation.runner import _windows

BOS, END = 2, 3


@pytest.fixture
def write(tmp_path):
    def make(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return make


def total(model, ids, first):
    """Log-likelihood of ids[first:], one row alone."""
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(logs[position - 1, ids[position]].item() for position in range(first, len(ids)))


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def run(model, tokenizer, **fields):
    return evaluate_task(model, tokenizer, resolve_task(fields), batch_size=3, progress=False)


def test_generation(model, tokenizer, write):
    prompts = ["a b c", "d", "e f g h i j", "k l"]
    rows = [{"prompt": prompt, "completion": "x"} for prompt in prompts]
    fields = {"name": "x", "kind": "generation", "max_new_tokens": 5}
    first = run(model, tokenizer, data=write("a.jsonl", rows), **fields)
    assert [example["prompt"] for example in first.examples] == prompts
    said = [example["prediction"] for example in first.examples]
    assert all(said), "pick other prompts: one answer is empty"
    gold = [{"prompt": p, "completion": ["q q", text]} for p, text in zip(prompts[:3], said, strict=False)]
    score = run(
        model,
        tokenizer,
        data=write("b.jsonl", [*gold, {"prompt": prompts[3], "completion": ["x"]}]),
        metrics=["exact_text", "token_f1"],
        **fields,
    )
    assert score.per_example == [1.0, 1.0, 1.0, 0.0]
    assert (score.score, score.count, score.cut_rows) == (0.75, 4, 0)
    assert set(score.metrics) == {"exact_text", "token_f1"}
    assert score.examples[0]["references"] == ["q q", said[0]]


def test_generation_from_a_chat(llama, tokenizer, write):
    turns = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
    score = run(
        llama, tokenizer, name="x", kind="generation", max_new_tokens=4, data=write("a.jsonl", [{"messages": turns}])
    )
    assert score.examples[0]["prompt"] == "user: a b"
    assert score.examples[0]["references"] == ["c"]


def test_long_prompts_lose_their_start_and_are_counted(llama, tokenizer, write):
    rows = [{"prompt": " ".join("abcdefghij" * 9), "completion": "x"}, {"prompt": "a", "completion": "x"}]
    fields = {"name": "x", "kind": "generation", "max_new_tokens": 8}
    path = write("a.jsonl", rows)
    score = run(llama, tokenizer, data=path, **fields)
    assert (score.count, score.cut_rows) == (2, 1)
    rows[0]["prompt"] = " ".join(("abcdefghij" * 9)[-39:])  # 48 positions, 8 answers, 1 start of text
    same = run(llama, tokenizer, data=write("b.jsonl", rows), **fields)
    assert same.cut_rows == 0
    assert same.examples[0]["prediction"] == score.examples[0]["prediction"]
    with pytest.raises(UsageError, match="47 new tokens in a window of 48"):
        run(llama, tokenizer, data=path, name="x", kind="generation", max_new_tokens=47)


def test_examples_are_at_most_twenty(llama, tokenizer, write):
    rows = [{"prompt": letter, "completion": "x"} for letter in "abcdefghijklmnopqrstuvwxyz"]
    score = run(llama, tokenizer, name="x", kind="generation", max_new_tokens=2, data=write("a.jsonl", rows))
    assert (len(score.examples), score.count, len(score.per_example)) == (20, 26, 26)


def test_multiple_choice_is_the_mean_per_token(model, tokenizer, write):
    rows = [
        {"question": "a b c ?", "options": ["d", "e f g h", "i j"], "answer": 0},
        {"question": "k ?", "options": ["l m n o p", "q"], "answer": 1},
        {"question": "r s t u v w x ?", "options": ["y z", "yes", "no no no"], "answer": 2},
    ]
    task = {"name": "x", "kind": "multiple_choice", "choices": "options", "answer": "answer"}
    score = run(model, tokenizer, data=write("a.jsonl", rows), **task)
    for row, shown, right in zip(rows, score.examples, score.per_example, strict=True):
        prompt = [BOS, *ids_of(tokenizer, row["question"])]
        choices = [ids_of(tokenizer, choice) for choice in row["options"]]
        means = [total(model, prompt + choice, len(prompt)) / len(choice) for choice in choices]
        best = means.index(max(means))
        assert shown["prediction"] == row["options"][best]
        assert right == float(best == row["answer"])
    assert score.score == pytest.approx(sum(score.per_example) / 3)


def test_minimal_pairs_are_whole_likelihoods(model, tokenizer, write):
    pairs = [("a b c", "a c b"), ("d", "e"), ("f g", "f h i j"), ("k l m n", "k l m"), ("o", "o")]
    path = write("a.jsonl", [{"good": good, "bad": bad} for good, bad in pairs])
    score = run(model, tokenizer, name="x", kind="minimal_pairs", data=path)
    expected = []
    for pair in pairs:
        good, bad = (total(model, [BOS, *ids_of(tokenizer, text)], 1) for text in pair)
        expected.append(float(good > bad))
    assert score.per_example == expected
    assert expected[-1] == 0.0
    path = write("b.jsonl", [{"good": "a " * 48, "bad": "a"}])
    with pytest.raises(DataError, match="row 1 has 49 tokens"):
        run(model, tokenizer, name="x", kind="minimal_pairs", data=path)


def test_text_loss(model, tokenizer, write):
    texts = ["a b c d e f", "g", "h i j"]
    path = write("a.jsonl", [{"body": text} for text in texts])
    score = run(model, tokenizer, name="x", kind="text_loss", data=path, text="{body}")
    rows = [[BOS, *ids_of(tokenizer, text)] for text in texts]
    expected = -sum(total(model, row, 1) for row in rows) / 10
    assert score.metrics == {"loss": pytest.approx(expected, abs=1e-5)}
    assert (score.count, score.cut_rows, score.per_example, score.examples) == (3, 0, [], [])


def test_long_texts_are_read_in_windows(llama, tokenizer, write):
    text = " ".join("abcdefghijklmnopqrstuvwxyz" * 3)
    score = run(llama, tokenizer, name="x", kind="text_loss", max_length=20, data=write("a.jsonl", [{"text": text}]))
    ids = [BOS, *ids_of(tokenizer, text)]
    pieces = [ids[start : start + 20] for start in range(0, len(ids) - 1, 19)]
    expected = -sum(total(llama, piece, 1) for piece in pieces) / 78
    assert score.score == pytest.approx(expected, abs=1e-5)


@given(length=st.integers(0, 60), size=st.integers(2, 12))
def test_windows_predict_each_token_once_from_its_predecessor(length, size):
    ids = list(range(length))
    rows = _windows(ids, size)
    assert all(2 <= len(piece) == len(labels) <= size for piece, labels in rows)
    assert [label for _, labels in rows for label in labels if label != IGNORED_LABEL] == ids[1:]
    assert all(labels[1:] == piece[1:] and labels[0] == IGNORED_LABEL for piece, labels in rows)


def test_completion_loss(model, tokenizer, write):
    rows = [("a b c", "d e"), ("f", "g h i j"), ("k l m n o p", "q")]
    path = write("a.jsonl", [{"input": prompt, "output": answer} for prompt, answer in rows])
    score = run(model, tokenizer, name="x", kind="completion_loss", data=path)
    nats, count = 0.0, 0
    for prompt, answer in rows:
        start, rest = [BOS, *ids_of(tokenizer, prompt)], [*ids_of(tokenizer, answer), END]
        nats -= total(model, start + rest, len(start))
        count += len(rest)
    assert score.score == pytest.approx(nats / count, abs=1e-5)
    rows = [{"prompt": "a " * 90, "completion": "b"}]
    assert run(model, tokenizer, name="x", kind="completion_loss", data=write("b.jsonl", rows)).cut_rows == 1


def all_tasks(write):
    qa = write("qa.jsonl", [{"prompt": "a b ?", "completion": "yes"}, {"prompt": "c ?", "completion": "no"}])
    pairs = write("pairs.jsonl", [{"good": "a b", "bad": "b a"}])
    text = write("text.jsonl", [{"text": "a b c"}])
    choices = {"choices": ["yes", "no"], "answer": "completion"}
    return [
        resolve_task({"task": "cola", "data": qa}),
        resolve_task({"name": "choice", "kind": "multiple_choice", "data": qa, **choices}),
        resolve_task({"task": "minimal_pairs", "data": pairs}),
        resolve_task({"task": "wikitext", "data": text}),
        resolve_task({"task": "completion_loss", "data": qa}),
    ]


def tiny():
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=36, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


def test_every_kind_runs_on_plain_and_adapted_models(tokenizer, write):
    from twinweave.imsm import get_imsm_model

    tasks = all_tasks(write)
    lora = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    plain = evaluate_tasks(tiny(), tokenizer, tasks, batch_size=2, progress=True)
    adapted = evaluate_tasks(get_peft_model(tiny(), LoraConfig(**lora)), tokenizer, tasks, progress=False)
    woven = evaluate_tasks(get_imsm_model(tiny(), LoraConfig(**lora)), tokenizer, tasks, progress=False)
    assert list(plain) == ["cola", "choice", "minimal_pairs", "wikitext", "completion_loss"]
    for task in tasks:
        # A fresh adapter changes nothing.
        assert adapted[task.name].metrics == pytest.approx(plain[task.name].metrics, abs=1e-5)
        assert woven[task.name].metrics == pytest.approx(plain[task.name].metrics, abs=1e-5)


def test_the_model_is_left_as_it_was(tokenizer, write):
    model = tiny().train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    tasks = all_tasks(write)
    evaluate_tasks(model, tokenizer, tasks, progress=False)
    assert [module.training for module in model.modules()] == flags
    with pytest.raises(DataError):
        run(model, tokenizer, name="x", kind="text_loss", data="/nowhere.jsonl")
    assert [module.training for module in model.modules()] == flags
    model(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([[5, 6]])).loss.backward()
    assert tokenizer.padding_side == "right"


def test_what_cannot_be_scored(llama, tokenizer, write):
    tasks = all_tasks(write)
    with pytest.raises(UsageError, match="Two tasks are called 'cola'"):
        evaluate_tasks(llama, tokenizer, [tasks[0], tasks[0]])
    kept, tokenizer.pad_token = tokenizer.pad_token, None
    try:
        with pytest.raises(UnsupportedModelError, match="no padding token"):
            evaluate_task(llama, tokenizer, tasks[0])
    finally:
        tokenizer.pad_token = kept
