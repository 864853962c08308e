"""The bridge to lm-evaluation-harness, on three local tasks: choices, whole texts, generation."""

import builtins
import importlib
import json
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import yaml

pytest.importorskip("lm_eval")

import lm_eval as harness
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny_runs
from twinweave.data import IGNORED_LABEL
from twinweave.errors import DataError, UsageError
from twinweave.evaluation import generate_texts, log_likelihoods
from twinweave.evaluation.lm_eval import TwinweaveLM, find_tasks, score_lm_tasks

TASKS = ("tiny_choice", "tiny_text", "tiny_generation")
BOS, PAD = 2, 1
CONTEXTS = ["a", "copy a b c :", "reverse d e ?", "f g h i j a b c :", "", "copy"]
CONTINUATIONS = [" a", " b c", " d e f a"]


@pytest.fixture
def tasks(world):
    """A folder with three YAML tasks on local rows."""
    folder = world / "tasks"
    folder.mkdir()
    rows = [{"q": f"copy {a} ?", "options": ["yes", f"no {a}"], "answer": i % 2} for i, a in enumerate("abcdefgh")]
    tiny_runs.write_rows(world / "choices.jsonl", rows)
    every = {"dataset_path": "json", "test_split": "test"}
    own = {
        "tiny_choice": {
            "dataset_kwargs": {"data_files": {"test": str(world / "choices.jsonl")}},
            "output_type": "multiple_choice",
            "doc_to_text": "{{q}}",
            "doc_to_choice": "{{options}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}, {"metric": "brier_score"}],
        },
        "tiny_text": {
            "dataset_kwargs": {"data_files": {"test": str(world / "text.jsonl")}},
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "tiny_generation": {
            "dataset_kwargs": {"data_files": {"test": str(world / "test.jsonl")}},
            "output_type": "generate_until",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{completion}}",
            "generation_kwargs": {"until": ["?"], "max_gen_toks": 6, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, task in own.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | every | task))
    return folder


@pytest.fixture
def load(world):
    return lambda: AutoModelForCausalLM.from_pretrained(world / "base").eval()


@pytest.fixture
def tokenizer(world):
    return AutoTokenizer.from_pretrained(world / "base")


@pytest.fixture
def woven(load, make_imsm):
    return make_imsm(base=load())


def run(lm, folder):
    loaded = TaskManager(include_path=str(folder), include_defaults=False).load(list(TASKS))
    for task in loaded["tasks"].values():
        task.set_config("num_fewshot", 0)
    return harness.evaluate(lm, loaded, bootstrap_iters=0)


def ask(lm, pairs):
    """Log-likelihoods and whether greedy, one request after the other in the harness's own form."""
    return lm.loglikelihood([SimpleNamespace(args=pair, task_name="") for pair in pairs], disable_tqdm=True)


def pairs():
    return [(context, more) for context in CONTEXTS for more in CONTINUATIONS]


def reference(model, tokenizer, pairs, with_prompt):
    """Our own scorer, one row alone: the tokens before the first label are the query."""
    rows = []
    for context, more in pairs:
        before = tokenizer(context)["input_ids"]
        after = tokenizer(more, add_special_tokens=False)["input_ids"]
        rows.append((before + after, [IGNORED_LABEL] * len(before) + after))
    with torch.inference_mode():
        scored = log_likelihoods(model, rows, PAD, batch_size=1, with_prompt=with_prompt)
    return [row.sum().item() for row in scored]


# --- what it must equal -----------------------------------------------------------------------------------------------


def test_one_memory_alone_has_the_scores_of_plain_hflm_exactly(load, tokenizer, woven, tasks):
    base = run(HFLM(load(), tokenizer=tokenizer, batch_size=3), tasks)
    with woven.use_memory("original"):
        original = run(TwinweaveLM(woven, tokenizer=tokenizer, batch_size=3), tasks)
    interwoven = run(TwinweaveLM(woven, tokenizer=tokenizer, batch_size=3), tasks)
    assert set(base["results"]) == set(TASKS)
    assert original["results"] == base["results"]
    answers = [{t: [doc["resps"] for doc in r["samples"][t]] for t in TASKS} for r in (base, original, interwoven)]
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]
    assert interwoven["results"]["tiny_text"] != base["results"]["tiny_text"]


def test_the_enhanced_memory_has_the_scores_of_plain_peft_exactly(load, tokenizer, woven, tasks, make_peft):
    plain = get_peft_model(load(), make_peft())
    for own, other in zip(plain.base_model.parameters(), woven.base_model.parameters(), strict=True):
        own.data.copy_(other.data)
    expected = run(HFLM(plain.eval(), tokenizer=tokenizer, batch_size=3), tasks)
    with woven.use_memory("enhanced"):
        found = run(TwinweaveLM(woven, tokenizer=tokenizer, batch_size=3), tasks)
    through_bridge = run(TwinweaveLM(plain, tokenizer=tokenizer, batch_size=3), tasks)
    assert found["results"] == through_bridge["results"] == expected["results"]


# --- the query --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, "auto"])
def test_the_context_is_the_query(woven, tokenizer, batch_size):
    asked = [pair for pair in pairs() if pair[0]]
    lm = TwinweaveLM(woven, tokenizer=tokenizer, batch_size=batch_size, max_batch_size=4)
    found = [score for score, _ in ask(lm, asked)]
    assert found == pytest.approx(reference(woven, tokenizer, asked, with_prompt=True), abs=1e-4)
    leaking = reference(woven, tokenizer, asked, with_prompt=False)
    apart = [abs(a - b) for a, b in zip(found, leaking, strict=True) if a != pytest.approx(b, abs=1e-3)]
    assert len(apart) > len(asked) / 2, "this model's gate does not look at the query: the test shows nothing"


@pytest.mark.parametrize("lm_class", [TwinweaveLM, HFLM])
def test_no_continuation_reaches_the_gate_as_a_query(woven, tokenizer, lm_class):
    """The gate is given the same query at every token of every continuation; with plain HFLM it is not."""
    seen = []
    hook = woven.gate.register_forward_pre_hook(lambda gate, args: seen.append(args[2]))
    lm = lm_class(woven, tokenizer=tokenizer, batch_size=1)
    ask(lm, [("copy a b :", more) for more in CONTINUATIONS])
    hook.remove()
    assert len(seen) == len(CONTINUATIONS)
    length = 5  # of the context, with the start of text
    queries = torch.cat([query[0, length - 1 :] for query in seen])  # where a continuation is predicted
    assert len(queries) == 1 + 2 + 4
    spread = (queries - queries[0]).abs().max()
    if lm_class is TwinweaveLM:
        assert spread < 1e-6
    else:
        assert spread > 1e-2


def test_contexts_that_end_elsewhere_share_nothing(woven, tokenizer):
    """The harness computes requests with the same tokens once, wherever their contexts end."""
    asked = [("copy a", " b c"), ("copy a b", " c"), ("copy a b", " d"), ("copy", " a b e")]
    lm = TwinweaveLM(woven, tokenizer=tokenizer, batch_size=2)
    together = [score for score, _ in ask(lm, asked)]
    assert together == pytest.approx([ask(lm, [pair])[0][0] for pair in asked], abs=1e-5)
    assert together == pytest.approx(reference(woven, tokenizer, asked, with_prompt=True), abs=1e-4)
    assert lm.logits_cache


def test_long_contexts_lose_their_start(woven, tokenizer):
    lm = TwinweaveLM(woven, tokenizer=tokenizer, batch_size=2)
    letters = "abcdefghij" * 6
    found = ask(lm, [(" ".join(letters), " copy a"), ("b", " copy")])[0][0]
    read, more = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" ".join(letters), "copy a"))
    rows = [(read[-47:] + more, [IGNORED_LABEL] * 47 + more)]
    with torch.inference_mode():
        expected = log_likelihoods(woven, rows, PAD, batch_size=1, with_prompt=True)[0].sum().item()
    assert found == pytest.approx(expected, abs=1e-4)


def test_without_a_context_everything_read_is_the_query(woven, tokenizer):
    lm = TwinweaveLM(woven, tokenizer=tokenizer, batch_size=2)
    asked = [("", more.strip()) for more in CONTINUATIONS]
    expected = reference(woven, tokenizer, asked, with_prompt=False)
    assert [score for score, _ in ask(lm, asked)] == pytest.approx(expected, abs=1e-4)
    texts = [SimpleNamespace(args=(more.strip(),)) for more in CONTINUATIONS]
    rows = [[BOS, *tokenizer(more)["input_ids"]] for more in CONTINUATIONS]  # the harness puts one more before the text
    with torch.inference_mode():
        labelled = [(ids, [IGNORED_LABEL, *ids[1:]]) for ids in rows]
        scored = log_likelihoods(woven, labelled, PAD, batch_size=1, with_prompt=False)
    expected = [row.sum().item() for row in scored]
    assert lm.loglikelihood_rolling(texts, disable_tqdm=True) == pytest.approx(expected, abs=1e-4)


def test_generation_in_left_padded_batches(woven, tokenizer):
    prompts = [context for context in CONTEXTS if context]
    settings = {"until": ["?"], "max_gen_toks": 5, "do_sample": False}
    asked = [SimpleNamespace(args=(prompt, settings)) for prompt in prompts]
    found = TwinweaveLM(woven, tokenizer=tokenizer, batch_size=3).generate_until(asked, disable_tqdm=True)
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    alone = generate_texts(woven, tokenizer, ids, max_new_tokens=5, stop=["?"], batch_size=1)
    assert [text.strip() for text in found] == alone
    with woven.use_memory("original"):
        assert alone != generate_texts(woven, tokenizer, ids, max_new_tokens=5, stop=["?"], batch_size=1)


def test_an_unknown_order_of_requests_is_refused(woven, tokenizer, monkeypatch):
    monkeypatch.setattr("twinweave.evaluation.lm_eval._longest_first", lambda request: request[2])
    lm = TwinweaveLM(woven, tokenizer=tokenizer, batch_size=2)
    with pytest.raises(Exception, match="orders requests unlike"):
        ask(lm, pairs())


# --- the ways in ------------------------------------------------------------------------------------------------------


def test_by_its_registered_name(woven, tokenizer, tasks, world):
    woven.save_pretrained(world / "saved")
    manager = find_tasks(TASKS, str(tasks))
    arguments = {"pretrained": str(world / "saved"), "tokenizer": str(world / "base")}
    named = harness.simple_evaluate(
        "twinweave", arguments, tasks=["tiny_text"], task_manager=manager, batch_size=4, device="cpu", bootstrap_iters=0
    )
    made = run(TwinweaveLM(woven, tokenizer=tokenizer, batch_size=4), tasks)
    assert named["results"]["tiny_text"] == made["results"]["tiny_text"]


def test_scores(woven, tokenizer, tasks, capsys):
    scores = score_lm_tasks(woven, tokenizer, TASKS, find_tasks(TASKS, str(tasks)), batch_size=4, limit=4)
    assert capsys.readouterr().out == ""
    found = {(score.task, score.metric): score for score in scores}
    assert len(found) == len(scores)
    assert set(found) == {
        *((TASKS[0], f"{name},none") for name in ("acc", "acc_norm", "brier_score")),
        *((TASKS[1], f"{name},none") for name in ("word_perplexity", "bits_per_byte")),
        (TASKS[2], "exact_match,none"),
    }
    assert {score.count for score in scores} == {4}
    accuracy, loss = found[TASKS[0], "acc,none"], found[TASKS[1], "bits_per_byte,none"]
    assert accuracy.value in (0.0, 0.25, 0.5, 0.75, 1.0)
    assert accuracy.stderr is not None
    assert (accuracy.higher_is_better, loss.higher_is_better, loss.stderr) == (True, False, None)
    json.dumps([score.to_dict() for score in scores], allow_nan=False)


def test_tasks_that_cannot_be_scored(woven, tokenizer, tasks, world, monkeypatch):
    without_defaults = partial(TaskManager, include_defaults=False)  # reading thousands of tasks takes a while
    monkeypatch.setattr("twinweave.evaluation.lm_eval.TaskManager", lambda **given: without_defaults(**given))
    with pytest.raises(UsageError, match=r"'tiny_chioce'.*'tiny_choice'"):
        find_tasks(["tiny_chioce"], str(tasks))
    (world / "choices.jsonl").unlink()
    with pytest.raises(DataError, match=r"tiny_choice.*choices\.jsonl"):
        score_lm_tasks(woven, tokenizer, ["tiny_choice"], find_tasks(["tiny_choice"], str(tasks)))


def test_without_the_harness(monkeypatch):
    real = builtins.__import__

    def no_harness(name, *args, **kwargs):
        if name.startswith("lm_eval"):
            raise ImportError(f"No module named '{name}'")
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "twinweave.evaluation.lm_eval")
    monkeypatch.setattr(builtins, "__import__", no_harness)
    with pytest.raises(UsageError, match=r"pip install 'twinweave\[eval\]'"):
        importlib.import_module("twinweave.evaluation.lm_eval")
