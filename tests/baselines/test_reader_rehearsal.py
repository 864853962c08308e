"""What a generator of adapters rehearses: that general text is said under its adapters as without them."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import kl_div

from twinweave.baselines import reader_rehearsal
from twinweave.genadapter import GenerativeAdapter, GenerativeAdapterConfig
from twinweave.rehearsal import Materials


@pytest.fixture
def reader(make_base):
    torch.manual_seed(0)
    settings = GenerativeAdapterConfig(state_size=6, rank=6, scale=1.0, chunk_size=8)
    return GenerativeAdapter(make_base("llama"), settings).train()


@pytest.fixture
def reading(task, tokens):
    """Three contexts of four chunks, a row for each."""
    reads = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    return task | {
        "context_ids": tokens(4, 8, seed=9),
        "context_mask": torch.ones(4, 8, dtype=torch.long),
        "reads": reads,
    }


def moved(reader):
    with torch.no_grad():
        for generator in reader.generators:
            generator.output.normal_()
    return reader


def test_a_generator_that_says_nothing_costs_nothing(reader, materials, reading):
    assert abs(reader_rehearsal(reader, materials())(reader, reading, None, 0).item()) < 1e-6


def test_the_divergence_under_what_was_read(reader, materials, reading):
    given = materials(weight=1.0)
    found = reader_rehearsal(moved(reader), given)(reader, reading, None, 0)
    batch = given.rehearsal.batch(0, 0)  # two rows, so two states
    assert len(batch["input_ids"]) == 2
    total, count = 0.0, 0
    for row in range(2):
        ids, mask = batch["input_ids"][row : row + 1], batch["attention_mask"][row : row + 1]
        read = reading["reads"][row].bool()
        with torch.no_grad():
            base = reader.base(input_ids=ids, attention_mask=mask).logits[0, :-1].log_softmax(-1)
            context = {"context_ids": reading["context_ids"][read], "reads": torch.ones(1, int(read.sum()))}
            other = reader(input_ids=ids, attention_mask=mask, **context).logits[0, :-1].log_softmax(-1)
        at = batch["labels"][row, 1:] != -100
        total += kl_div(other[at], base[at], log_target=True, reduction="sum").item()
        count += int(at.sum())
    assert found.item() == pytest.approx(total / count, rel=2e-2)  # the iteration grows rounding a little
    assert found > 0.01
    twice = reader_rehearsal(reader, replace(given, weight=2.0))(reader, reading, None, 0)
    assert twice.item() == pytest.approx(2 * found.item())


def test_only_the_generator_learns_from_it(reader, materials, reading):
    reader_rehearsal(moved(reader), materials())(reader, reading, None, 0).backward()
    assert all(p.grad is not None and p.grad.any() for n, p in reader.named_parameters() if n.startswith("generators."))
    assert all(p.grad is None for p in reader.base.parameters())


def test_without_text_there_is_no_term(reader):
    assert reader_rehearsal(reader, Materials(0, 10)) is None
