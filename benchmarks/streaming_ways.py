"""The ways to keep up with a stream of documents that are compared: what each keeps, how it takes in more, and answers.

Knows nothing about where documents and questions come from, or how answers are scored.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from sklearn.feature_extraction.text import TfidfVectorizer
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from twinweave import GenerativeAdapter, MemoryModel
from twinweave.data.collator import attention_mask_of, pad_rows
from twinweave.data.encode import bos_ids, text_ids

from .answering_ways import MAX_NEW_TOKENS, Question, ask

BATCH = 20
EPOCHS, RATE = 15, 3e-3  # the best of four settings on the first hundred documents of another stream


@dataclass(frozen=True)
class StreamWay:
    """`start`: nothing -> what is kept before the first document. `add`: that and more documents -> what is kept then.
    `answer`: what is kept and questions -> answers. `size`: its bytes."""

    name: str
    start: Callable[[], Any]
    add: Callable[[Any, Sequence[str]], Any]
    answer: Callable[[Any, Sequence[Question]], list[str]]
    size: Callable[[Any], int] = lambda kept: 0


def _bytes_of(texts: Sequence[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def plain_ways(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[StreamWay]:
    """Those of the base as it is; the texts are kept."""

    def way(name: str, context: Callable[[list[str], Sequence[Question]], Sequence[str]]) -> StreamWay:
        def answer(kept: list[str], questions: Sequence[Question]) -> list[str]:
            pairs = zip(context(kept, questions), questions, strict=True)
            return ask(base, tokenizer, [f"{text} {question.text}".strip() for text, question in pairs])

        return StreamWay(name, list, lambda kept, more: [*kept, *more], answer, _bytes_of)

    def retrieved(kept: list[str], questions: Sequence[Question]) -> list[str]:
        vectorizer = TfidfVectorizer()
        matrix = vectorizer.fit_transform(kept)
        scores = vectorizer.transform([question.text for question in questions]) @ matrix.T
        return [kept[index] for index in scores.toarray().argmax(1)]

    def window(kept: list[str], questions: Sequence[Question]) -> list[str]:
        """The newest documents, as many as there is room for in front of the longest question."""
        room = base.config.max_position_embeddings - MAX_NEW_TOKENS - 24
        sizes = itertools.accumulate(len(text_ids(tokenizer, text)) for text in reversed(kept))
        count = sum(size <= room for size in sizes)
        return [" ".join(kept[len(kept) - count :])] * len(questions)

    return [
        way("nothing", lambda kept, questions: [""] * len(questions)),
        way("prompt (the newest that fit)", window),
        way("right document", lambda kept, questions: [kept[question.document] for question in questions]),
        way("retrieval", retrieved),
    ]


def fine_tuned(load: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerBase, seed: int) -> StreamWay:
    """One LoRA (r 16, all linear layers), trained on every part of the stream as it comes: online fine-tuning."""

    def start() -> Any:
        torch.manual_seed(seed)
        config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model: Any = get_peft_model(load(), config)
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)

    def add(kept: Any, more: Sequence[str]) -> Any:
        model, optimizer = kept
        rows = [[*bos_ids(tokenizer), *text_ids(tokenizer, text), tokenizer.eos_token_id] for text in more]
        model.train()
        for part in _parts(rows, 50):
            for _ in range(EPOCHS):
                for chosen in torch.randperm(len(part)).split(8):
                    batch = [part[index] for index in chosen]
                    ids, labels = pad_rows(batch, int(tokenizer.pad_token_id)), pad_rows(batch, -100)
                    logits = model(input_ids=ids, attention_mask=attention_mask_of(batch)).logits[:, :-1]
                    cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()
                    optimizer.step()
                    optimizer.zero_grad()
        model.eval()
        return kept

    def answer(kept: Any, questions: Sequence[Question]) -> list[str]:
        return ask(kept[0], tokenizer, [question.text for question in questions])

    def size(kept: Any) -> int:
        return sum(p.numel() * p.element_size() for p in kept[0].parameters() if p.requires_grad)

    return StreamWay("online LoRA", start, add, answer, size)


def _parts(rows: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def generated(reader: GenerativeAdapter) -> StreamWay:
    """The state of all documents, and answers from its adapter."""

    def add(state: Any, more: Sequence[str]) -> Any:
        for text in more:
            state = state + reader.read(text)
        return state

    def answer(state: Any, questions: Sequence[Question]) -> list[str]:
        with reader.adapted(state):
            return ask(reader.base, reader.tokenizer, [question.text for question in questions])

    def size(state: Any) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in state.sums.values())

    return StreamWay("GenerativeAdapter", reader.empty_state, add, answer, size)


def remembered(name: str, model: MemoryModel, folder: Path, top_k: int | None = None, **settings: Any) -> StreamWay:
    """A bank of the documents. `top_k`: 0 for every memory there is; `settings`: of the model, while it answers."""
    numbers = itertools.count()

    def start() -> Path:
        return folder / f"{re.sub('[^A-Za-z]+', '-', name)}-{next(numbers)}.lance"

    def add(bank: Path, more: Sequence[str]) -> Path:
        model.open_bank(bank)
        model.memorize(more, batch_size=64)
        return bank

    def answer(bank: Path, questions: Sequence[Question]) -> list[str]:
        model.open_bank(bank)
        count = max(model.bank.memories, 1) if top_k == 0 else top_k
        before = {key: getattr(model.settings, key) for key in settings}
        try:
            for key, value in settings.items():
                setattr(model.settings, key, value)
            answers: list[str] = []
            for start in range(0, len(questions), BATCH):
                part = [question.text for question in questions[start : start + BATCH]]
                answers += model.generate(part, top_k=count, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            return answers
        finally:
            for key, value in before.items():
                setattr(model.settings, key, value)

    def size(bank: Path) -> int:
        model.open_bank(bank)
        return int(model.bank.stats()["bytes"])

    return StreamWay(name, start, add, answer, size)
