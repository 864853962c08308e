"""A slice of the contract, one architecture of a kind; `make contract` has all of them and every check."""

import pytest
import torch
from peft import LoraConfig
from torch import nn

from contract import architectures, checks, table
from contract.subject import Subject
from twinweave import get_imsm_model
from twinweave.decoder import decoder_of
from twinweave.errors import UnsupportedModelError
from twinweave.imsm.anatomy import examine

KINDS = {
    "dense": "qwen3",
    "mixture of experts": "mixtral",
    "state space": "mamba2",
    "hybrid": "qwen3_next",
    "soft-capped": "gemma2",
    "logit-scaled": "cohere2",
    "multi-query": "gpt_bigcode",
    "latent attention": "deepseek_v3",
    "decoder of an encoder-decoder": "bart",
    "head of another width": "rembert",
}
# what the kinds differ in; the other checks are those of tests/imsm, on four architectures
CHECKED = (
    "base runs",
    "memories differ",
    "step 0 is the base",
    "original after rehearsal",
    "enhanced is plain PEFT",
    "causal",
    "cached greedy",
    "cached, guarded",
    "stacked",
    "loss",
    "at labels",
    "rehearsal",
)


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def subject(request):
    return architectures.subject(request.param)


def test_a_slice_of_the_contract(subject):
    assert checks.refusal(subject) is None
    results = {name: checks.run_check(name, subject) for name in CHECKED}
    assert all(r.status == "pass" for r in results.values()), results


def test_every_name_has_a_config():
    for name in architectures.NAMES:
        if name != "gemma4_assistant":  # its own default config is invalid
            assert architectures.tiny_config(name).get_text_config(decoder=True).vocab_size <= 256, name


class Leaky(nn.Module):
    """A gate that reads the last position at every position."""

    def __init__(self, gate):
        super().__init__()
        self.own = gate

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "own" else getattr(self.own, name)

    def forward(self, original, enhanced, *args):
        fused, share = self.own(original, enhanced, *args)
        return fused + 0.1 * fused[:, -1:], share


def test_a_broken_promise_fails_and_is_not_put_down_to_the_base():
    broken = architectures.subject("qwen3")
    model = broken.moved()
    assert checks.run_check("causal", broken).status == "pass"
    model.gate = Leaky(model.gate)
    result = checks.run_check("causal", broken)
    assert result.status == "fail"
    assert "before a changed token" in result.note


def test_what_the_base_breaks_by_itself_does_not_apply():
    def seeing_ahead(**changes):
        base = architectures.tiny_model("qwen3", **changes)
        base.model.layers[0].register_forward_hook(lambda m, a, out: out + out.mean(1, keepdim=True))
        return base

    subject = Subject("ahead", seeing_ahead, architectures.adapter, architectures.VOCAB, architectures.FIRST)
    result = checks.run_check("causal", subject)
    assert result.status == "n/a"
    assert result.note.startswith("upstream: the base alone")


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("rwkv", {"rescale_every": 6}, "rescale_every=0"),
        ("recurrent_gemma", {}, "in its own modules"),
        ("prophetnet", {}, "do not come from the last hidden states"),
    ],
)
def test_bases_that_are_refused(name, changes, words):
    base = architectures.tiny_model(name, **changes)
    before = {n: p.clone() for n, p in base.named_parameters()}
    with pytest.raises(UnsupportedModelError, match=words):
        get_imsm_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    assert {n: torch.equal(p, before[n]) for n, p in base.named_parameters()} == dict.fromkeys(before, True)


@pytest.mark.parametrize(
    ("name", "decoder", "width", "shifted"),
    [("mllama", "model", 64, True), ("modernbert-decoder", "model", 64, True), ("bart", "model.decoder", 64, False)],
)
def test_the_decoder_is_found(name, decoder, width, shifted):
    base = architectures.tiny_model(name)
    anatomy = examine(base, decoder_of(base))
    assert anatomy.decoder is base.get_submodule(decoder)
    assert (anatomy.width, anatomy.shifted) == (width, shifted)
    assert not anatomy.decoder._forward_hooks


def test_a_base_without_weights_is_taken_at_its_word():
    base = architectures.tiny_model("qwen3").to("meta")
    anatomy = examine(base, decoder_of(base))
    assert (anatomy.width, anatomy.shifted) == (64, True)


def test_the_table_says_what_was_found():
    ok, no = {"status": "pass", "note": ""}, {"status": "n/a", "note": "upstream: no | cache"}
    rows = {
        "good": {"checks": {"base runs": ok, "causal": ok}},
        "some": {"checks": {"base runs": ok, "causal": no, "stacked": no}},
        "ours": {"checks": {"base runs": ok, "causal": {"status": "fail", "note": "logits differ"}}},
        "theirs": {"checks": {"base runs": no}},
        "refused": {"refused": "is an encoder-decoder"},
    }
    text = table.page({"versions": {"torch": "2"}, "architectures": rows}, {"architectures": 6})
    assert "5 of 6 done: 2 pass, 1 refused, 1 not checked, 1 fail." in text
    assert "| some | pass | causal, stacked n/a (upstream: no \\| cache) |" in text
    assert "| ours | fail | causal: logits differ |" in text
    assert "| refused | refused | is an encoder-decoder |" in text
