"""The published loop and IMSM are the same model, and so are plain PEFT and the enhanced memory."""

import pytest
import torch

from benchmarks.published_loop import published_generate
from benchmarks.systems import PLANS, Systems, build, generate, greedy, new_cache, prefill

PROMPT = torch.tensor([[5, 9, 200, 31, 77, 120, 8]])


@pytest.fixture(scope="module", params=["all", "upper"])
def systems(request: pytest.FixtureRequest) -> Systems:
    return build("tiny", "cpu", "float32", 3, request.param, published=True)


def test_greedy_tokens_of_the_published_loop_are_those_of_every_plan(systems: Systems) -> None:
    assert systems.published is not None
    expected = published_generate(systems.published, PROMPT, 24)
    assert expected.shape == (1, PROMPT.shape[1] + 24)
    for plan in PLANS:
        assert torch.equal(generate(systems.model(plan), PROMPT, 24), expected), plan


def test_the_gate_has_a_say_in_the_tokens(systems: Systems) -> None:
    model = systems.model("two_pass")
    logits = {}
    for memory in ("original", "enhanced", "interwoven"):
        with torch.no_grad(), model.use_memory(memory):
            logits[memory] = model(input_ids=PROMPT).logits
    assert not torch.allclose(logits["original"], logits["enhanced"], atol=1e-4)
    assert not torch.allclose(logits["interwoven"], logits["enhanced"], atol=1e-4)


def test_plain_peft_has_the_same_weights_and_no_hooks_of_ours(systems: Systems) -> None:
    model = systems.imsm
    with torch.no_grad(), model.use_memory("enhanced"):
        assert torch.equal(systems.plain(input_ids=PROMPT).logits, model(input_ids=PROMPT).logits)
    plain_base, imsm_base = systems.plain.get_base_model(), model.get_base_model()
    assert plain_base.lm_head.weight is imsm_base.lm_head.weight  # the tensor itself, not an equal one
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in systems.plain.modules())
    assert systems.published is not None
    assert systems.published.frozen.lm_head.weight is imsm_base.lm_head.weight
    assert systems.published.tuned.lm_head.weight is not imsm_base.lm_head.weight


@pytest.mark.parametrize("static", [False, True])
def test_the_timed_loop_generates_what_generate_does(systems: Systems, static: bool) -> None:
    prompt = torch.cat((PROMPT, PROMPT.flip(1)))
    for system in ("plain", *PLANS):
        model = systems.model(system)
        with torch.no_grad():
            cache = new_cache(model, prompt.shape[1] + 8, static)
            first = prefill(model, prompt, cache)
            tokens = torch.cat((first, greedy(model, first, cache, 7)), dim=1)
        assert tokens.shape == (2, 8)
        if system == "plain":  # IMSM's query goes on growing here, since nobody says where the prompt ends
            assert torch.equal(tokens, generate(model, prompt, 8)[:, prompt.shape[1] :])
