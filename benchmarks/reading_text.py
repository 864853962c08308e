"""Real English: what a generated adapter is worth for saying a text again and for going on with it, against nothing
read and against the text in the prompt. It needs a base and text that are not shipped: docs/genadapter.md.

    python -m benchmarks.reading_text prepare --wiki WIKI.jsonl --ropes TRAIN.jsonl --out FOLDER
    twinweave train recipes/genadapter/small-en.yaml base=BASE train.data=FOLDER/train.jsonl output=RUN
    python -m benchmarks.reading_text score RUN/best --base BASE --text FOLDER/test.jsonl
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from twinweave import GenerativeAdapter
from twinweave.data.encode import bos_ids
from twinweave.evaluation.statistics import bootstrap_ci95
from twinweave.files import write_json_atomic, write_text_atomic
from twinweave.progress import say, track
from twinweave.text import chunks_of

from .measure import provenance

RESULT = Path(__file__).parent / "reading-text" / "small-en.json"
TESTED = 5  # every so many articles of Wikipedia is kept for the test
SHORTEST = 16  # tokens of a chunk that is scored
FEWEST = 20  # texts of a mean that is shown
Key = tuple[str, int, str]


def prepare(args: Any) -> None:
    """Wikipedia and the articles of ROPES as rows {text}; every fifth text of Wikipedia is for the test alone."""
    lines = args.wiki.read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines if line.strip()]
    articles: dict[str, None] = {}
    for line in args.ropes.read_text(encoding="utf-8").splitlines():
        found = re.search(r"Article: (.*?)\n", json.loads(line)["prompt"], re.DOTALL)
        if found:
            articles[found.group(1)] = None
    train = [text for index, text in enumerate(texts) if index % TESTED] + list(articles)
    for name, rows in (("train", train), ("test", texts[::TESTED])):
        write_text_atomic(args.out / f"{name}.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in rows))
        say(f"{args.out / name}.jsonl: {len(rows)} texts, {sum(map(len, rows)):,} characters")


@torch.no_grad()
def loss(model: Any, before: Sequence[int], said: Sequence[int]) -> float:
    """Nats per token of `said` behind `before`, of which there is at least the start of text."""
    ids = torch.tensor([[*before, *said]])
    logits = model(input_ids=ids).logits[0, len(before) - 1 : -1].float()
    return float(cross_entropy(logits, torch.tensor(said)))


def losses_of(text: str, other: str, reader: GenerativeAdapter, most: int) -> dict[Key, float]:
    """Mean loss in nats per token of the chunk that was read last, and of the one behind it, after 1 to `most` chunks:
    (what is said, chunks read, how they were read) -> loss. `other`: a text to read in the place of this one, since an
    adapter may help because it is in the style of any such text, and not because of what it has read."""
    found: dict[Key, float] = {}
    stranger = reader.read(other)
    chunks = [ids for ids, _ in chunks_of([text], reader.tokenizer, reader.chunk_size)]
    start = bos_ids(reader.tokenizer) or [int(reader.tokenizer.eos_token_id)]
    texts = [chunk[len(bos_ids(reader.tokenizer)) :] for chunk in chunks]
    state, read = reader.empty_state(), list(start)
    for number in range(1, min(len(chunks), most + 1)):
        state = state + reader.read_ids([chunks[number - 1]])
        read += texts[number - 1]
        for kind, said in (("reconstruction", texts[number - 1]), ("completion", texts[number])):
            if len(said) < SHORTEST:
                continue
            with reader.adapted(state):
                found[kind, number, "adapter"] = loss(reader.base, start, said)
            with reader.adapted(stranger):
                found[kind, number, "adapter of another text"] = loss(reader.base, start, said)
            found[kind, number, "nothing"] = loss(reader.base, start, said)
            found[kind, number, "prompt"] = loss(reader.base, read, said)
    return found


def score(args: Any) -> None:
    """The losses over all texts, with bootstrap intervals."""
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32).eval()
    reader = GenerativeAdapter.from_pretrained(args.reader, base, tokenizer=tokenizer)
    losses: dict[Key, list[float]] = {}
    texts = [json.loads(line)["text"] for line in args.text.read_text(encoding="utf-8").splitlines()]
    for text, other in track(list(zip(texts, texts[1:] + texts[:1], strict=True)), "scoring"):
        for key, value in losses_of(text, other, reader, args.chunks).items():
            losses.setdefault(key, []).append(value)
    rows = []
    for (kind, number, way), values in sorted(losses.items()):
        if len(values) < FEWEST:
            continue
        gains, beside = (
            [value - bare for value, bare in zip(values, losses[kind, number, other], strict=True)]
            for other in ("nothing", "adapter of another text")
        )
        row = {"kind": kind, "chunks": number, "way": way, "texts": len(values)}
        row |= {"loss": mean(values), "ci95": bootstrap_ci95(values, seed=0)}
        row |= {"against_nothing": mean(gains), "against_nothing_ci95": bootstrap_ci95(gains, seed=0)}
        row |= {"against_another_text": mean(beside), "against_another_text_ci95": bootstrap_ci95(beside, seed=0)}
        rows.append(row)
        gain = f"{row['loss']:.3f} nats ({row['against_nothing']:+.3f})"
        say(f"{kind}, {number} chunks, {way}: {gain}, {len(values)} texts")
    args.kind, args.device, args.argv = "reading_text", "cpu", args.given
    write_json_atomic(args.out, {"schema": 1, "provenance": provenance(args), "rows": rows})
    say(f"Written to {args.out}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reading_text", description=__doc__)
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("prepare")
    first.set_defaults(run=prepare)
    first.add_argument("--wiki", type=Path, required=True)
    first.add_argument("--ropes", type=Path, required=True)
    first.add_argument("--out", type=Path, required=True)
    second = commands.add_parser("score")
    second.set_defaults(run=score)
    second.add_argument("reader", type=Path)
    second.add_argument("--base", type=Path, required=True)
    second.add_argument("--text", type=Path, required=True)
    second.add_argument("--chunks", type=int, default=2, help="the most that are read")
    second.add_argument("--threads", type=int, default=2)
    second.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args(argv)
    args.given = list(sys.argv[1:] if argv is None else argv)
    args.run(args)


if __name__ == "__main__":
    main()
