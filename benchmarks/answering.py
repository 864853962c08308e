"""Ways to answer questions about documents, side by side on the same questions about people of the pocket world whom
neither the base nor the readers have ever met: docs/genadapter-results.md.

    python -m benchmarks.answering READER READER READER     # a reader for each seed: folders of saved generators
    python -m benchmarks.answering --page                   # only writes the page
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from twinweave import GenerativeAdapter, IMSMConfig, IMSMModel, get_imsm_model, pocket
from twinweave.data import CompletionCollator
from twinweave.data.encode import bos_ids, text_ids
from twinweave.evaluation import evaluate_tasks
from twinweave.evaluation.metrics import score_texts
from twinweave.evaluation.tasks import Task
from twinweave.files import write_json_atomic, write_text_atomic
from twinweave.pocket import language
from twinweave.pocket.world import RELATIONS, Person, make_world
from twinweave.progress import say, track
from twinweave.rehearsal import RehearsalSettings, self_rehearsal

from .answering_page import page
from .answering_ways import Question, Way, fine_tuned, generated, plain_ways, put_in, woven
from .measure import provenance

FOLDER = Path(__file__).parent / "answering"
DOCUMENTS = (1, 2, 4, 8, 16, 32)
QUESTIONS = 16
KEPT_OF = 16  # documents that are read before the base's own knowledge is asked for
REHEARSED = "GenerativeAdapter, rehearsed"
GATE_STEPS, GATE_RATE = 300, 5e-3

Context = tuple[list[str], list[Question]]


def load_base() -> PreTrainedModel:
    # attention written out, since torch's counter of operations does not know the fused kernels of a CPU
    folder = pocket.base_dir()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def make_context(people: Sequence[Person], rng: random.Random) -> Context:
    """A document about each person, and at most 16 questions about them."""
    asked = [(index, relation) for index in range(len(people)) for relation in RELATIONS]
    questions = [
        Question(language.question(r, people[i].name, rng.randrange(2)), people[i].facts[r], i)
        for i, r in rng.sample(asked, min(len(asked), QUESTIONS))
    ]
    return [language.document([person], rng) for person in people], questions


def contexts(documents: int, seed: int) -> list[Context]:
    """About 128 questions on people drawn from those of the pocket world's documents."""
    rng = random.Random(f"answering {documents} {seed}")
    count = max(6, 128 // min(QUESTIONS, 4 * documents))
    return [make_context(rng.sample(make_world().document_people, documents), rng) for _ in range(count)]


def measured(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """What `run` gives, its seconds, and its floating-point operations, from another run since counting takes time."""
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    with FlopCounterMode(display=False) as counter:
        run()
    return result, seconds, float(counter.get_total_flops())


def score_way(way: Way, found: Sequence[Context]) -> dict[str, float]:
    """Accuracy over all questions; seconds and floating-point operations per document and per question; bytes kept."""
    used = found[: max(3, 48 // len(found[0][1]))] if way.costly else found
    right: list[float] = []
    spent = dict.fromkeys(("document_seconds", "document_flops", "question_seconds", "question_flops"), 0.0)
    for documents, questions in used:
        kept, seconds, flops = measured(partial(way.prepare, documents))
        spent["document_seconds"] += seconds / len(documents) / len(used)
        spent["document_flops"] += flops / len(documents) / len(used)
        answers, seconds, flops = measured(partial(way.answer, kept, questions))
        spent["question_seconds"] += seconds / len(questions) / len(used)
        spent["question_flops"] += flops / len(questions) / len(used)
        right += score_texts("exact_match", answers, [(question.answer,) for question in questions])[1]
    return {"accuracy": sum(right) / len(right), "questions": len(right), "bytes": way.size(kept), **spent}


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, found: Sequence[Context]) -> int:
    """The most tokens that all documents of a context have together."""
    return max(len(text_ids(tokenizer, " ".join(documents))) for documents, _ in found)


def retained(model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Accuracy on what the base knows: task -> exact match."""
    tasks = [
        Task(**{k: v for k, v in t.items() if k != "role"}, limit=100) for t in pocket.TASKS if t["role"] == "retained"
    ]
    return {name: s.score for name, s in evaluate_tasks(model, tokenizer, tasks, batch_size=100).items()}


def train_gate(reader: GenerativeAdapter, seed: int) -> IMSMModel:
    """IMSM over the layers of the reader's adapters, its gate trained over many of them: on questions about strangers,
    while it rehearses what the base writes itself."""
    torch.manual_seed(seed)
    rng, world, tokenizer = random.Random(f"gate {seed}"), make_world(), reader.tokenizer
    names = [target.name for target in reader.targets]
    lora = LoraConfig(
        r=reader.settings.rank, lora_alpha=reader.settings.rank, target_modules=names, task_type="CAUSAL_LM"
    )
    model = get_imsm_model(load_base(), lora, IMSMConfig(gate_rank=8))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("gate."))
    settings = RehearsalSettings(sequences=2000, length=96, adapter_weight=0.0)
    term = self_rehearsal(model, tokenizer, settings, steps=GATE_STEPS, batch_size=16, seed=seed)
    optimizer = torch.optim.AdamW(model.gate.parameters(), lr=GATE_RATE)
    collate = CompletionCollator(tokenizer)
    model.train()
    for step in track(range(GATE_STEPS), "The gate learns"):
        people: list[Person] = []
        for _ in range(rng.choice((1, 2, 4, 8, 16))):
            people.append(world.stranger(rng, frozenset(person.name for person in people)))
        documents, questions = make_context(people, rng)
        put_in(model, reader, generated(reader).prepare(documents))
        rows = []
        for question in questions:
            asked = [*bos_ids(tokenizer), *text_ids(tokenizer, question.text)]
            answer = [*text_ids(tokenizer, question.answer), int(tokenizer.eos_token_id)]
            rows.append({"input_ids": asked + answer, "labels": [-100] * len(asked) + answer})
        batch = collate(rows)
        output = model(**batch, output_gate=True, logits_at_labels=True)
        inputs = {**batch, "logits_at_labels": torch.tensor(True)}
        loss = output.loss + (term(model, inputs, output, step) or 0.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def one_seed(path: Path, seed: int, args: Any) -> dict[str, Any]:
    """Every way at every number of documents, and what is left of the base's own knowledge."""
    base = load_base()
    tokenizer = AutoTokenizer.from_pretrained(pocket.base_dir())
    reader = GenerativeAdapter.from_pretrained(path, base, tokenizer=tokenizer)
    imsm = train_gate(reader, seed)
    tuned = fine_tuned(load_base, tokenizer, args.rate, args.epochs, seed)
    ways = [*plain_ways(base, tokenizer), tuned, generated(reader), woven(reader, imsm)]
    rehearsed = None
    if (place := seed - args.first_seed) < len(args.rehearsed):
        rehearsed = GenerativeAdapter.from_pretrained(args.rehearsed[place], base, tokenizer=tokenizer)
        ways.append(replace(generated(rehearsed), name=REHEARSED))
    for way in ways:  # the first calls of anything take longer
        score_way(way, contexts(1, seed)[:2])
    curve, tokens = [], {}
    for documents in args.documents:
        found = contexts(documents, seed)
        tokens[str(documents)] = prompt_tokens(tokenizer, found)
        for way in ways:
            curve.append({"way": way.name, "documents": documents, **score_way(way, found)})
            say(f"seed {seed}, {documents} documents, {way.name}: {curve[-1]['accuracy']:.1%}")
    texts = contexts(KEPT_OF, seed)[0][0]
    state = generated(reader).prepare(texts)
    kept = {"base": retained(base, tokenizer)}
    with reader.adapted(state):
        kept["GenerativeAdapter"] = retained(base, tokenizer)
    if rehearsed is not None:
        with rehearsed.adapted(generated(rehearsed).prepare(texts)):
            kept[REHEARSED] = retained(base, tokenizer)
    put_in(imsm, reader, state)
    kept["GenerativeAdapter + IMSM"] = retained(imsm, tokenizer)
    kept["LoRA on the documents"] = retained(tuned.prepare(texts), tokenizer)
    window = base.config.max_position_embeddings
    return {"seed": seed, "window": window, "prompt_tokens": tokens, "curve": curve, "retained": kept}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.answering", description=__doc__)
    parser.add_argument("readers", type=Path, nargs="*", help="folders of saved generators, one for each seed")
    parser.add_argument("--rehearsed", type=Path, nargs="+", default=[], help="readers that rehearsed, for the seeds")
    parser.add_argument("--first-seed", type=int, default=0, help="the first reader's; results of others are kept")
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument("--documents", type=int, nargs="+", default=list(DOCUMENTS))
    parser.add_argument("--rate", type=float, default=1e-2, help="of the LoRA on the documents")
    parser.add_argument("--epochs", type=int, default=40, help="of the LoRA on the documents")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=FOLDER / "pocket.json")
    args = parser.parse_args(argv)
    if args.readers:
        args.kind, args.device, args.argv = "answering", "cpu", list(sys.argv[1:] if argv is None else argv)
        torch.set_num_threads(args.threads)
        made = provenance(args)
        for seed, path in enumerate(args.readers, start=args.first_seed):
            found = one_seed(path, seed, args)
            known = json.loads(args.out.read_text(encoding="utf-8"))["seeds"] if args.out.is_file() else []
            seeds = sorted([found, *(other for other in known if other["seed"] != seed)], key=lambda s: s["seed"])
            write_json_atomic(args.out, {"schema": 1, "provenance": made, "seeds": seeds})
    write_text_atomic(FOLDER.parents[1] / "docs" / "genadapter-results.md", page(FOLDER))


if __name__ == "__main__":
    main()
