"""Tasks with contexts for a memory model: each row is answered from its own documents, as from a bank of them."""

import json
from copy import deepcopy

import pytest
import torch
from peft import LoraConfig

from twinweave.cmt import CMTConfig, MemoryModel
from twinweave.data.collator import pad_rows
from twinweave.errors import UsageError
from twinweave.evaluation import evaluate_task, evaluate_tasks, forward_logits, log_likelihoods, resolve_task

CONTEXTS = [["a b c d e"], ["f g", "h i j k"], ["l m n o p q r"]]
PROMPTS = [" ".join("stuvwxyz"[: 1 + i]) for i in range(7)]


@pytest.fixture
def memory(llama, tokenizer):
    torch.manual_seed(1)
    settings = CMTConfig(memory_tokens=2, document_tokens=4, aggregator_layers=1, aggregator_heads=2, prefix_rank=8,
                         aggregator_head_size=8, top_k=2)  # fmt: skip
    adapter = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = MemoryModel(deepcopy(llama), settings, adapter, tokenizer=tokenizer).eval()
    with torch.no_grad():
        for layer in model.prefix.layers:
            layer.weight.mul_(4)
    return model


@pytest.fixture
def task_of(tmp_path):
    path = tmp_path / "asked.jsonl"
    rows = [{"context": CONTEXTS[i % 3], "prompt": prompt, "completion": "yes"} for i, prompt in enumerate(PROMPTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**changes):
        fields = {"name": "asked", "kind": "generation", "data": str(path), "context": "context", "max_new_tokens": 5}
        return resolve_task(fields | changes)

    return make


def predictions(score):
    return [example["prediction"] for example in score.examples]


def from_a_bank(memory, path, documents, prompt):
    memory.open_bank(path)
    try:
        memory.memorize(documents)
        return memory.generate(prompt, max_new_tokens=5, do_sample=False)
    finally:
        memory.open_bank(None)


def test_each_row_is_answered_as_from_a_bank_with_its_documents(memory, tokenizer, task_of, tmp_path):
    scores = [evaluate_task(memory, tokenizer, task_of(), batch_size=size, progress=False) for size in (1, 3, 100)]
    banks = [from_a_bank(memory, tmp_path / f"{i}.lance", CONTEXTS[i % 3], prompt) for i, prompt in enumerate(PROMPTS)]
    assert all(predictions(score) == banks for score in scores)
    unread = evaluate_task(memory, tokenizer, task_of(context=None), progress=False)
    assert predictions(unread) != banks
    assert predictions(unread) == predictions(
        evaluate_task(memory.base, tokenizer, task_of(context=None), progress=False)
    )


def test_losses_are_those_of_one_by_one(memory, tokenizer, task_of):
    task = task_of(kind="completion_loss")
    one, all_at_once = (evaluate_task(memory, tokenizer, task, batch_size=n, progress=False).score for n in (1, 100))
    assert one == pytest.approx(all_at_once, abs=1e-5)
    bare = evaluate_task(memory, tokenizer, task_of(kind="completion_loss", context=None), progress=False).score
    assert abs(bare - one) > 1e-3


def test_documents_for_tasks_without_a_context(memory, tokenizer, task_of, tmp_path):
    tasks = [task_of(), task_of(name="bare", context=None)]
    before = evaluate_tasks(memory, tokenizer, tasks, progress=False)
    after = evaluate_tasks(memory, tokenizer, tasks, progress=False, read=CONTEXTS[1])
    assert predictions(before["asked"]) == predictions(after["asked"])
    assert predictions(before["bare"]) != predictions(after["bare"])
    assert predictions(after["bare"]) == [from_a_bank(memory, tmp_path / "b.lance", CONTEXTS[1], p) for p in PROMPTS]
    assert predictions(evaluate_tasks(memory, tokenizer, tasks[1:], progress=False)["bare"]) == predictions(
        before["bare"]
    )


def test_what_is_judged_is_no_part_of_the_question(memory, tokenizer):
    def score(letters, with_prompt):
        ids = [tokenizer.bos_token_id, *tokenizer(letters, add_special_tokens=False)["input_ids"]]
        labels = [-100] * (3 if with_prompt else 1) + ids[(3 if with_prompt else 1) :]
        (found,) = log_likelihoods(memory, [(ids, labels)], 1, batch_size=1, with_prompt=with_prompt)
        return found

    with memory.answering_from(memory.compress(CONTEXTS[2])), torch.no_grad():
        for with_prompt in (True, False):  # one letter at the end is another: what is said of those before is the same
            one, other = (score(letters, with_prompt) for letters in ("a b c d e", "a b c d f"))
            assert torch.equal(one[:-1], other[:-1])
            assert not torch.equal(one[-1], other[-1])


def test_only_the_nearest_are_used_and_few_are_all_used(memory, tokenizer):
    made = memory.compress(["a b c d", "e f g h", "i j k l"])
    assert made.shape == (3, 2, 32)
    ids = pad_rows([tokenizer("s t")["input_ids"]] * 2, 1)

    def logits(given):
        with memory.answering_from(given), torch.no_grad():
            return forward_logits(memory, ids, torch.ones_like(ids))

    everything = logits(made)
    pairs = [logits(made[[a, b]]) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert sum(torch.allclose(everything, pair, atol=1e-6) for pair in pairs) == 1
    mixed = logits([made[:1], made[1:]])  # another number for each row
    assert torch.allclose(mixed[0], logits(made[:1])[0], atol=1e-5)
    assert torch.allclose(mixed[1], logits(made[1:])[1], atol=1e-5)
    with torch.no_grad():
        assert torch.equal(logits(made[:0]), memory.base(ids).logits)


def test_what_cannot_be_given(memory, tokenizer):
    made = memory.compress(["a b c d"])
    with pytest.raises(UsageError, match="some for each row"), memory.answering_from([made]):
        memory.generate(["a", "b"], max_new_tokens=1)
    with pytest.raises(UsageError, match="where"), memory.answering_from(made):
        memory.generate("a", where={"year": 1}, max_new_tokens=1)
