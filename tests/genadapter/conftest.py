"""A tiny Llama with random weights, a tokenizer of single characters, and a generator that is away from its start."""

import string
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from twinweave.genadapter import GenerativeAdapter, GenerativeAdapterConfig

CHARACTERS = string.ascii_lowercase + string.digits + " \n\r.,:?!-'"


def character_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<s>": 1, "<unk>": 2} | {c: i for i, c in enumerate(CHARACTERS, start=3)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>", pad_token="<pad>")


@pytest.fixture(scope="session")
def make_reader(make_base: Any) -> Callable[..., GenerativeAdapter]:
    def make(
        *, moved: bool = True, seed: int = 7, base: Any = None, arch: str = "llama", **settings: Any
    ) -> GenerativeAdapter:
        values = {"state_size": 12, "rank": 5, "scale": 0.5, "chunk_size": 8} | settings
        base = make_base(arch) if base is None else base
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = GenerativeAdapter(base, GenerativeAdapterConfig(**values), character_tokenizer())
            if moved:
                for generator in model._generators:
                    torch.nn.init.normal_(generator.output, std=0.5)
        return model.eval()

    return make


@pytest.fixture
def reader(make_reader: Any) -> GenerativeAdapter:
    return make_reader()
