"""Ways to keep up with a stream of documents, side by side: the first fifty documents and questions about them, while
others come in. People of the pocket world whom neither the base nor what reads or remembers has ever met:
docs/cmt-results.md.

    python -m benchmarks.streaming --seed 0 --cmt FOLDER --plain-loss FOLDER --unmatched FOLDER --reader FOLDER
    python -m benchmarks.streaming --page                   # only writes the page
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from twinweave import GenerativeAdapter, MemoryModel, pocket
from twinweave.evaluation import evaluate_tasks
from twinweave.evaluation.metrics import score_texts
from twinweave.evaluation.tasks import Task
from twinweave.files import write_json_atomic, write_text_atomic
from twinweave.pocket import language
from twinweave.pocket.world import RELATIONS, Person, make_world
from twinweave.progress import say

from .answering_ways import Question
from .measure import provenance
from .streaming_page import page
from .streaming_ways import StreamWay, fine_tuned, generated, plain_ways, remembered

FOLDER = Path(__file__).parent / "streaming"
FIRST = 50
LENGTHS = (50, 100, 200, 500, 1000)
UNRELATED = (0.5, 1.0, 2.0)  # as a share of the first documents
CMT = "CMT"


def load_base() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(pocket.base_dir(), dtype=torch.float32).eval()


def stream(length: int, seed: int) -> tuple[list[str], list[Question]]:
    """So many documents about different people, the first fifty with all four questions about each."""
    rng, world = random.Random(f"stream {seed}"), make_world()
    people: dict[str, Person] = {p.name: p for p in rng.sample(world.document_people, len(world.document_people))}
    while len(people) < length:
        person = world.stranger(rng, frozenset(people))
        people[person.name] = person
    listed = list(people.values())[:length]
    documents = [language.document([person], rng) for person in listed]
    questions = [
        Question(language.question(relation, person.name, rng.randrange(2)), person.facts[relation], index)
        for index, person in enumerate(listed[:FIRST])
        for relation in RELATIONS
    ]
    return documents, questions


def unrelated(count: int, seed: int) -> list[str]:
    """So many texts about anything but people: towns, skills, sums."""
    rng, world = random.Random(f"unrelated {seed}"), make_world()
    towns = [language.town_document(world, town, rng) for town in world.towns]
    others = [row["text"] for row in pocket.rows("text") if not any(p.name in row["text"] for p in world.known)]
    texts = list(dict.fromkeys(rng.sample(towns, len(towns)) + others))
    return texts[:count]


def scores(way: StreamWay, kept: Any, questions: Sequence[Question]) -> dict[str, float]:
    start = time.perf_counter()
    answers = way.answer(kept, questions)
    seconds = (time.perf_counter() - start) / len(questions)
    references = [(question.answer,) for question in questions]
    return {
        "exact_match": score_texts("exact_match", answers, references)[0],
        "f1": score_texts("token_f1", answers, references)[0],
        "question_seconds": seconds,
    }


def growing(way: StreamWay, lengths: Sequence[int], seed: int) -> list[dict[str, Any]]:
    """Scores on the first documents as the stream grows, and what every document costs."""
    documents, questions = stream(max(lengths), seed)
    kept, before, found = way.start(), 0, []
    for length in lengths:
        start = time.perf_counter()
        kept = way.add(kept, documents[before:length])
        seconds = (time.perf_counter() - start) / (length - before)
        found.append(
            {"way": way.name, "documents": length, **scores(way, kept, questions), "document_seconds": seconds,
             "bytes": way.size(kept)}
        )  # fmt: skip
        before = length
        say(f"seed {seed}, {way.name}, {length} documents: {found[-1]['exact_match']:.1%}")
    return found


def mixed(way: StreamWay, seed: int) -> list[dict[str, Any]]:
    """Scores on the first documents with others, about anything else, among them."""
    documents, questions = stream(FIRST, seed)
    found = []
    for share in UNRELATED:
        kept = way.add(way.start(), documents)
        kept = way.add(kept, unrelated(round(share * FIRST), seed))
        found.append({"way": way.name, "unrelated": share, **scores(way, kept, questions)})
    return found


def retained(model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Accuracy on what the base knows: task -> exact match."""
    tasks = [
        Task(**{k: v for k, v in t.items() if k != "role"}, limit=100) for t in pocket.TASKS if t["role"] == "retained"
    ]
    return {name: s.score for name, s in evaluate_tasks(model, tokenizer, tasks, batch_size=100).items()}


def one_seed(args: Any, seed: int, folder: Path) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(pocket.base_dir())
    base = load_base()
    models = {
        name: MemoryModel.from_pretrained(path, load_base(), tokenizer=tokenizer)
        for name, path in ((CMT, args.cmt), ("CMT, plain loss", args.plain_loss), ("CMT, unmatched", args.unmatched),
                           ("CMT, as published", args.published))
        if path is not None
    }  # fmt: skip
    reader = GenerativeAdapter.from_pretrained(args.reader or pocket.reader_dir(), load_base(), tokenizer=tokenizer)
    tuned = fine_tuned(load_base, tokenizer, seed)
    ways = [*plain_ways(base, tokenizer), tuned, generated(reader)]
    ways += [remembered(name, model, folder) for name, model in models.items()]
    ways.append(remembered("CMT, no top-K", models[CMT], folder, top_k=0))
    selective = remembered("CMT, min_similarity", models[CMT], folder, min_similarity=args.min_similarity)
    ways.append(selective)
    for way in ways:  # the first calls of anything take longer
        way.answer(way.add(way.start(), stream(4, seed)[0]), stream(4, seed)[1])
    curve = [row for way in ways for row in growing(way, args.documents, seed)]
    robust = [row for way in ways for row in mixed(way, seed)]
    documents, _ = stream(FIRST, seed)
    kept = {"base": retained(base, tokenizer)}
    kept[tuned.name] = retained(tuned.add(tuned.start(), documents)[0], tokenizer)
    state = generated(reader)
    with reader.adapted(state.add(state.start(), documents)):
        kept[state.name] = retained(reader.base, tokenizer)
    model = models[CMT]
    selective.add(selective.start(), documents)
    kept[CMT] = retained(model, tokenizer)
    model.settings.min_similarity = args.min_similarity
    kept[selective.name] = retained(model, tokenizer)
    return {"seed": seed, "curve": curve, "robust": robust, "retained": kept, "min_similarity": args.min_similarity}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming", description=__doc__)
    parser.add_argument("--cmt", type=Path, help="the folder of a trained memory model")
    parser.add_argument("--plain-loss", type=Path, help="that of one without the memory-aware objective")
    parser.add_argument("--unmatched", type=Path, help="that of one without self-matching")
    parser.add_argument("--published", type=Path, help="that of one with nothing beyond the paper")
    parser.add_argument("--reader", type=Path, help="that of a generator of adapters; the shipped one by default")
    parser.add_argument("--min-similarity", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0, help="results of others are kept")
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument("--documents", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=FOLDER / "pocket.json")
    args = parser.parse_args(argv)
    if args.cmt:
        args.kind, args.device, args.argv = "streaming", "cpu", list(sys.argv[1:] if argv is None else argv)
        torch.set_num_threads(args.threads)
        made = provenance(args)
        with tempfile.TemporaryDirectory() as folder:
            found = one_seed(args, args.seed, Path(folder)) | {"provenance": made}
        known = json.loads(args.out.read_text(encoding="utf-8"))["seeds"] if args.out.is_file() else []
        seeds = sorted([found, *(other for other in known if other["seed"] != args.seed)], key=lambda s: s["seed"])
        write_json_atomic(args.out, {"schema": 1, "seeds": seeds})
    write_text_atomic(FOLDER.parents[1] / "docs" / "cmt-results.md", page(FOLDER))


if __name__ == "__main__":
    main()
