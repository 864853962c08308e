"""The ways to answer questions about documents that are compared: what each keeps of the documents, and how it answers.

Knows nothing about where documents and questions come from, or how answers are scored.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from sklearn.feature_extraction.text import TfidfVectorizer
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from twinweave import GenerativeAdapter, IMSMModel
from twinweave.data import encode_prompt
from twinweave.data.collator import attention_mask_of, pad_rows
from twinweave.data.encode import bos_ids, text_ids
from twinweave.evaluation.generate import generate_texts

MAX_NEW_TOKENS = 6


@dataclass(frozen=True)
class Question:
    """`document`: which of the documents holds the answer."""

    text: str
    answer: str
    document: int


@dataclass(frozen=True)
class Way:
    """`prepare`: documents -> what is kept of them. `answer`: that and questions -> answers. `size`: its bytes."""

    name: str
    prepare: Callable[[Sequence[str]], Any]
    answer: Callable[[Any, Sequence[Question]], list[str]]
    size: Callable[[Any], int] = lambda kept: 0
    costly: bool = False
    """So slow to prepare that a few contexts have to do."""


def ask(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """Greedy answers, sixteen rows at a time; a prompt is never cut."""
    ids = [encode_prompt(prompt, tokenizer, max_length=1 << 20)[0] for prompt in prompts]
    return generate_texts(model, tokenizer, ids, max_new_tokens=MAX_NEW_TOKENS, batch_size=16)


def plain_ways(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Way]:
    """Those of the base as it is: no context, every document, the right one, and the one that retrieval finds."""

    def with_context(texts: Sequence[str], questions: Sequence[Question]) -> list[str]:
        pairs = zip(texts, questions, strict=True)
        return ask(base, tokenizer, [f"{text} {question.text}".strip() for text, question in pairs])

    def cached(documents: Sequence[str]) -> int:
        config: Any = base.config
        width = config.num_key_value_heads * config.head_dim
        tokens = sum(len(text_ids(tokenizer, text)) for text in documents)
        return 2 * config.num_hidden_layers * width * tokens * next(base.parameters()).element_size()

    def stored(documents: Sequence[str]) -> int:
        return sum(len(text.encode()) for text in documents)

    def found(kept: tuple[Any, Any, Sequence[str]], questions: Sequence[Question]) -> list[str]:
        vectorizer, matrix, documents = kept
        scores = vectorizer.transform([question.text for question in questions]) @ matrix.T
        best = scores.toarray().argmax(1)
        return with_context([documents[index] for index in best], questions)

    def index(documents: Sequence[str]) -> tuple[Any, Any, Sequence[str]]:
        vectorizer = TfidfVectorizer()
        return vectorizer, vectorizer.fit_transform(documents), documents

    return [
        Way("nothing", list, lambda kept, questions: with_context([""] * len(questions), questions)),
        Way("prompt", list, lambda kept, questions: with_context([" ".join(kept)] * len(questions), questions), cached),
        Way("right document", list, lambda kept, asked: with_context([kept[q.document] for q in asked], asked), stored),
        Way("retrieval", index, found, lambda kept: stored(kept[2])),
    ]


def fine_tuned(
    load: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerBase, rate: float, epochs: int, seed: int
) -> Way:
    """LoRA (r 16, all linear layers) trained on the documents as text."""
    base = load()

    def prepare(documents: Sequence[str]) -> Any:
        torch.manual_seed(seed)
        config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model: Any = get_peft_model(copy.deepcopy(base), config).train()
        rows = [[*bos_ids(tokenizer), *text_ids(tokenizer, text), tokenizer.eos_token_id] for text in documents]
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
        for _ in range(epochs):
            for chosen in torch.randperm(len(rows)).split(8):
                batch = [rows[index] for index in chosen]
                labels = pad_rows(batch, -100)
                ids = pad_rows(batch, int(tokenizer.pad_token_id))
                logits = model(input_ids=ids, attention_mask=attention_mask_of(batch)).logits[:, :-1]
                cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()
                optimizer.step()
                optimizer.zero_grad()
        return model.eval()

    def size(model: Any) -> int:
        return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)

    return Way(
        "LoRA on the documents",
        prepare,
        lambda model, questions: ask(model, tokenizer, [question.text for question in questions]),
        size,
        costly=True,
    )


def generated(reader: GenerativeAdapter) -> Way:
    """A state of the documents, and answers from its adapter."""

    def prepare(documents: Sequence[str]) -> Any:
        state = reader.empty_state()
        for text in documents:
            state = state + reader.read(text)
        with reader.adapted(state):  # the decomposition belongs to the reading
            return state

    def answer(state: Any, questions: Sequence[Question]) -> list[str]:
        with reader.adapted(state):
            return ask(reader.base, reader.tokenizer, [question.text for question in questions])

    def size(state: Any) -> int:
        rank = reader.settings.rank
        return sum(rank * (t.in_features + t.out_features) * 4 for t in reader.targets)

    return Way("GenerativeAdapter", prepare, answer, size)


def woven(reader: GenerativeAdapter, model: IMSMModel) -> Way:
    """The generated adapter as the enhanced memory of IMSM, whose gate has learned over many of them."""

    def answer(state: Any, questions: Sequence[Question]) -> list[str]:
        put_in(model, reader, state)
        return ask(model, reader.tokenizer, [question.text for question in questions])

    whole = generated(reader)
    return Way("GenerativeAdapter + IMSM", whole.prepare, answer, whole.size)


@torch.no_grad()
def put_in(model: IMSMModel, reader: GenerativeAdapter, state: Any) -> None:
    """Give the LoRA of `model`, on the same layers as the reader's, the weights that `state` stands for."""
    layers: dict[str, Any] = dict(model.get_base_model().named_modules())
    for name, (a, b) in reader.lora_factors(state).items():
        layers[name].lora_A["default"].weight.copy_(a)
        layers[name].lora_B["default"].weight.copy_(b)
