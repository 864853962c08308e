"""General text of random tokens for the tiny models, and a batch of a task."""

import pytest
import torch

import tiny_runs
from twinweave.data import CompletionCollator
from twinweave.rehearsal import Materials, RehearsalRows, RehearsalSettings, Written, make_rows


def make_materials(tokens, weight=1.0, count=6, **settings):
    settings = RehearsalSettings(positions=5, **settings)
    written = [Written(tokens(1, 6 + i, seed=i)[0].tolist()) for i in range(count)]
    rows = RehearsalRows(make_rows(written, settings), CompletionCollator(tiny_runs.word_tokenizer()), settings, 2)
    return Materials(seed=0, steps=10, weight=weight, rehearsal=rows)


@pytest.fixture
def materials(tokens):
    return lambda **changes: make_materials(tokens, **changes)


@pytest.fixture
def task(tokens):
    """A padded batch of a task, labels behind the prompts."""
    ids = tokens(3, 9, seed=5)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    labels = ids.clone()
    labels[:, :5] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
