"""The same base is recognised in another precision; another base is told apart, in words."""

import copy

import pytest
import torch
from torch import nn

from twinweave.fingerprint import BaseFingerprint, fingerprint


def test_the_same_model_twice(arch, make_base):
    assert fingerprint(make_base(arch)) == fingerprint(make_base(arch))
    assert not fingerprint(make_base(arch)).differences(fingerprint(make_base(arch)))


@pytest.mark.parametrize("seed", range(5))
def test_a_bf16_checkpoint_in_every_precision(seed, make_base):
    source = make_base(seed=seed, initializer_range=0.02).to(torch.bfloat16)
    with torch.no_grad():  # real weights have many values near zero, where fp16 has fewer digits
        for parameter in source.parameters():
            parameter.mul_(torch.rand(parameter.shape) ** 4)
    expected = fingerprint(source)
    for dtype in (torch.float32, torch.float16, torch.float64):
        assert fingerprint(copy.deepcopy(source).to(dtype)) == expected


def test_an_fp32_checkpoint_loaded_as_bf16(arch, make_base):
    assert fingerprint(make_base(arch).to(torch.bfloat16)) == fingerprint(make_base(arch))


def test_what_differs_is_said(make_base):
    mine = fingerprint(make_base())
    cases = {
        "architecture or sizes": make_base(num_attention_heads=8, num_key_value_heads=8),
        "number of parameters": make_base(tie_word_embeddings=True),
        "the weights themselves": make_base(seed=1),
    }
    for words, other in cases.items():
        assert any(words in sentence for sentence in mine.differences(fingerprint(other)))
        assert mine != fingerprint(other)


def test_training_a_little_is_noticed(make_base):
    base = make_base()
    before = fingerprint(base)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1.02)
    assert "the weights themselves" in before.differences(fingerprint(base))[0]


def test_taking_it_changes_nothing(make_base):
    base = make_base()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    fingerprint(base)
    fingerprint(base.to(torch.bfloat16).float())
    base = make_base()
    fingerprint(base)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_weights_that_cannot_be_read(make_base):
    base = make_base()
    expected = fingerprint(base)
    base.lm_head.weight = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)  # as bitsandbytes packs
    quantised = fingerprint(base)
    assert quantised.weights is None
    assert quantised.differences(expected) == expected.differences(quantised) == []
    assert fingerprint(make_base().to("meta")).weights is None


def test_a_module_without_a_config_or_weights():
    assert fingerprint(nn.Linear(2, 3)).parameters == 9
    assert fingerprint(nn.Identity()) == BaseFingerprint(fingerprint(nn.Linear(2, 3)).config, 0, None)


def test_plain_values_and_text(make_base):
    found = fingerprint(make_base())
    assert BaseFingerprint(**found.to_dict()) == found
    assert str(found.parameters) in str(found)
