import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from twinweave.data import IGNORED_LABEL
from twinweave.errors import TrainingError
from twinweave.evaluation import forward_logits, log_likelihoods
from twinweave.evaluation.likelihood import batches_by_length
from twinweave.imsm import get_imsm_model

PAD = 1


@st.composite
def labelled_rows(draw):
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        ids = draw(st.lists(st.integers(0, 35), min_size=1, max_size=14))
        first = draw(st.integers(0, len(ids)))
        rows.append((ids, [IGNORED_LABEL] * first + ids[first:]))
    return rows


def plain(model, ids, labels):
    """One row alone, without padding, straight from the definition."""
    with torch.no_grad():
        log_probabilities = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [
        log_probabilities[position - 1, token].item()
        for position, token in enumerate(labels)
        if token != IGNORED_LABEL and position > 0
    ]


@settings(max_examples=30)
@given(rows=labelled_rows(), batch_size=st.integers(1, 4))
def test_equals_a_plain_unbatched_reference(model, rows, batch_size):
    with torch.inference_mode():
        scored = log_likelihoods(model, rows, PAD, batch_size=batch_size, with_prompt=True)
    assert [row.tolist() for row in scored] == [pytest.approx(plain(model, *row), abs=1e-5) for row in rows]
    assert all(row.dtype == torch.float32 for row in scored)


@settings(max_examples=20)
@given(rows=labelled_rows(), pad=st.integers(0, 35))
def test_padding_changes_nothing(model, rows, pad):
    with torch.inference_mode():
        one = log_likelihoods(model, rows, PAD, batch_size=len(rows), with_prompt=False)
        other = log_likelihoods(model, rows, pad, batch_size=len(rows), with_prompt=False)
    for left, right in zip(one, other, strict=True):
        assert torch.equal(left, right)


def test_a_diverged_model_is_not_scored(llama):
    broken = copy.deepcopy(llama)
    broken.lm_head.weight.data[7] = float("nan")
    with pytest.raises(TrainingError, match="facts: the model's output is not a number"):
        log_likelihoods(broken, [([5, 6], [5, 6])], PAD, batch_size=1, with_prompt=False, description="facts")


@given(lengths=st.lists(st.integers(1, 50), max_size=20), batch_size=st.integers(1, 7))
def test_batches_hold_every_row_once(lengths, batch_size):
    batches = list(batches_by_length(lengths, batch_size, "x", progress=False))
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert all(len(batch) <= batch_size for batch in batches)
    assert [lengths[index] for index in order] == sorted(lengths, reverse=True)


@pytest.fixture
def twin():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=36, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"), LlamaForCausalLM(config)
    made = get_imsm_model(config[1], config[0]).eval()
    for parameter in made.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    return made


def test_an_imsm_gate_never_reads_the_continuation(twin):
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 10, 11, 12]])
    mask = torch.ones_like(ids)
    prompt = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 0, 0, 0]]).bool()
    with torch.inference_mode():
        told = forward_logits(twin, ids, mask, prompt)
        untold = forward_logits(twin, ids, mask)
        expected = twin(input_ids=ids, attention_mask=mask, query_mask=prompt).logits
        assert torch.equal(told, expected)
        assert not torch.allclose(told, untold, atol=1e-4)
        rows = [(row, [IGNORED_LABEL] * 2 + row[2:]) for row in ids.tolist()]
        scored = log_likelihoods(twin, rows, PAD, batch_size=2, with_prompt=True)
        exact = expected.log_softmax(-1)
        for index, row in enumerate(ids.tolist()):
            wanted = [exact[index, position - 1, row[position]].item() for position in (2, 3, 4)]
            assert scored[index].tolist() == pytest.approx(wanted, abs=1e-5)
        free = log_likelihoods(twin, rows, PAD, batch_size=2, with_prompt=False)
        assert not torch.allclose(free[0], scored[0], atol=1e-4)
