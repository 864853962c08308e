"""Tasks with contexts: read apart by a model that reads, and in the prompt of one that does not."""

import json

import pytest
import torch

from twinweave.errors import UsageError
from twinweave.evaluation import evaluate_task, evaluate_tasks, resolve_task
from twinweave.evaluation.contexts import Contexts
from twinweave.genadapter import GenerativeAdapter, GenerativeAdapterConfig

CONTEXTS = [["a b c d e"], ["f g", "h i j k"], ["l m n o p q r"]]


@pytest.fixture
def reader(llama, tokenizer):
    torch.manual_seed(1)
    settings = GenerativeAdapterConfig(state_size=8, rank=8, chunk_size=4, scale=0.5)
    model = GenerativeAdapter(llama, settings, tokenizer).eval()
    for generator in model.generators:
        torch.nn.init.normal_(generator.output, std=0.5)
    return model


@pytest.fixture
def task_of(tmp_path):
    path = tmp_path / "asked.jsonl"
    # neighbours have different contexts, and prompts different lengths
    rows = [
        {"context": CONTEXTS[i % 3], "prompt": " ".join("stuvwxyz"[: 1 + i]), "completion": "yes"} for i in range(7)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**changes):
        fields = {"name": "asked", "kind": "generation", "data": str(path), "context": "context", "max_new_tokens": 5}
        return resolve_task(fields | changes)

    return make


def predictions(score):
    return [example["prediction"] for example in score.examples]


def answered_by_hand(reader, tokenizer, documents, prompt):
    state = reader.empty_state()
    for document in documents:
        state = state + reader.read(document)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
    with reader.adapted(state):
        output = reader.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_several_contexts_in_a_batch_are_answered_as_one_by_one(reader, tokenizer, task_of):
    task = task_of()
    scores = [evaluate_task(reader, tokenizer, task, batch_size=size, progress=False) for size in (1, 3, 100)]
    expected = [answered_by_hand(reader, tokenizer, CONTEXTS[i % 3], " ".join("stuvwxyz"[: 1 + i])) for i in range(7)]
    assert all(predictions(score) == expected for score in scores)
    unread = evaluate_task(reader, tokenizer, task_of(context=None), batch_size=3, progress=False)
    assert predictions(unread) != expected
    assert scores[0].examples[0]["prompt"] == "s"


def test_losses_are_those_of_one_by_one(reader, tokenizer, task_of):
    task = task_of(kind="completion_loss")
    one, all_at_once = (evaluate_task(reader, tokenizer, task, batch_size=n, progress=False).score for n in (1, 100))
    assert one == pytest.approx(all_at_once, abs=1e-5)
    bare = evaluate_task(reader, tokenizer, task_of(kind="completion_loss", context=None), progress=False).score
    assert abs(bare - one) > 1e-3


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_every_context_is_read_once(reader, tokenizer, task_of, monkeypatch, batch_size):
    read = []
    original = reader.read
    monkeypatch.setattr(reader, "read", lambda text, **kw: read.append(text) or original(text, **kw))
    evaluate_task(reader, tokenizer, task_of(), batch_size=batch_size, progress=False)
    assert sorted(read) == sorted(document for documents in CONTEXTS for document in documents)


def test_only_what_a_batch_needs_is_kept(reader):
    contexts = Contexts(reader, [tuple(c) for c in CONTEXTS])
    for rows in ([0, 1], [1, 2], [2]):
        with contexts.adapted(rows):
            assert set(contexts._states) == set(rows)


def test_a_model_that_does_not_read_has_it_in_the_prompt(llama, tokenizer, task_of):
    score = evaluate_task(llama, tokenizer, task_of(), progress=False)
    assert score.examples[1]["prompt"] == "f g\nh i j k\ns t"
    joined = task_of(context=None, prompt="{context[0]}\n{context[1]}\n{prompt}", limit=2)
    with pytest.raises(Exception, match="does not fit"):  # the first row has one document only
        evaluate_task(llama, tokenizer, joined, progress=False)


def test_documents_read_before_tasks_without_a_context(reader, tokenizer, task_of):
    tasks = [task_of(), task_of(name="bare", context=None)]
    before = evaluate_tasks(reader, tokenizer, tasks, progress=False)
    after = evaluate_tasks(reader, tokenizer, tasks, progress=False, read=CONTEXTS[0])
    assert predictions(before["asked"]) == predictions(after["asked"])
    assert predictions(before["bare"]) != predictions(after["bare"])
    by_hand = [answered_by_hand(reader, tokenizer, CONTEXTS[0], " ".join("stuvwxyz"[: 1 + i])) for i in range(7)]
    assert predictions(after["bare"]) == by_hand
    assert predictions(evaluate_tasks(reader.base, tokenizer, tasks[1:], progress=False, read=CONTEXTS[0])["bare"]) == (
        predictions(before["bare"])
    )


def test_contexts_are_for_two_kinds(task_of):
    with pytest.raises(UsageError, match="for generation and completion_loss tasks, not for text_loss"):
        task_of(kind="text_loss")
