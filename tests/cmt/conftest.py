"""Memory models over tiny bases with random weights, away from their start, and texts for them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig

from twinweave.cmt import CMTConfig, MemoryModel
from twinweave.cmt.model import Found

SETTINGS = {
    "memory_tokens": 4,
    "document_tokens": 32,
    "aggregator_layers": 2,
    "aggregator_heads": 2,
    "aggregator_head_size": 8,
    "prefix_rank": 7,
}
TEXTS = ("ada was born in rome.", "bob has a red boat", "the letter after q is r", "it rains in the north, often.")


@pytest.fixture(scope="session")
def texts() -> tuple[str, ...]:
    return TEXTS


@pytest.fixture(scope="session")
def make_memory(make_base: Any, tokenizer: Any) -> Callable[..., MemoryModel]:
    def make(
        arch: str = "llama", *, base: Any = None, adapter: Any = None, bank: Any = None, seed: int = 7, **settings: Any
    ) -> MemoryModel:
        base = make_base(arch) if base is None else base
        linear = ["c_attn", "c_proj"] if arch == "gpt2" else ["q_proj", "v_proj", "down_proj"]
        adapter = adapter or LoraConfig(r=4, lora_alpha=8, target_modules=linear, task_type="CAUSAL_LM")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = MemoryModel(base, CMTConfig(**{**SETTINGS, **settings}), adapter, tokenizer=tokenizer)
            with torch.no_grad():
                for name, parameter in model.compressor.own_parameters():
                    if name != "tokens":
                        parameter.add_(0.2 * torch.randn_like(parameter))
                for parameter in (*model.aggregator.parameters(), *model.prefix.parameters()):
                    if parameter.ndim == 1:
                        parameter.add_(0.2 * torch.randn_like(parameter))
        if bank is not None:
            model.open_bank(bank)
        return model.eval()

    return make


@pytest.fixture
def given(make_memory: Any) -> Callable[..., MemoryModel]:
    """A memory model that finds the same memories for every question, without a bank."""

    def make(arch: str = "llama", memories: int = 3, **more: Any) -> MemoryModel:
        model = make_memory(arch, **more)
        width = model.compressor.tokens.shape[1]
        blocks = torch.randn(memories, model.settings.memory_tokens, width, generator=torch.Generator().manual_seed(3))

        def retrieved(ids: Any, mask: Any, *_: Any) -> Any:
            seen = torch.ones(len(ids), memories, dtype=torch.bool)
            return Found(
                model.reader.compressed(ids, mask), blocks[None].expand(len(ids), -1, -1, -1), seen, seen.any(1)
            )

        model._retrieved = retrieved
        return model

    return make


@pytest.fixture(scope="session")
def step(tokens: Any) -> Callable[..., dict[str, torch.Tensor]]:
    """A batch as in training: `rows` questions with answers of four tokens, `documents` documents, both padded."""

    def make(rows: int = 4, documents: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
        ids, context = tokens(rows, 10, seed), tokens(documents, 12, seed + 50)
        mask, context_mask = torch.ones_like(ids), torch.ones_like(context)
        mask[0, :2] = 0
        context_mask[-1, -3:] = 0
        labels = torch.where(torch.arange(10) >= 6, ids, -100)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            "context_ids": context,
            "context_mask": context_mask,
        }

    return make
