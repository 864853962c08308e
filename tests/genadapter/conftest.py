"""A tiny Llama with random weights, and a generator that is away from its start."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from twinweave.genadapter import GenerativeAdapter, GenerativeAdapterConfig


@pytest.fixture(scope="session")
def make_reader(make_base: Any, tokenizer: Any) -> Callable[..., GenerativeAdapter]:
    def make(
        *, moved: bool = True, seed: int = 7, base: Any = None, arch: str = "llama", **settings: Any
    ) -> GenerativeAdapter:
        values = {"state_size": 12, "rank": 5, "scale": 0.5, "chunk_size": 8} | settings
        base = make_base(arch) if base is None else base
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = GenerativeAdapter(base, GenerativeAdapterConfig(**values), tokenizer)
            if moved:
                for generator in model._generators:
                    torch.nn.init.normal_(generator.output, std=0.5)
        return model.eval()

    return make


@pytest.fixture
def reader(make_reader: Any) -> GenerativeAdapter:
    return make_reader()
