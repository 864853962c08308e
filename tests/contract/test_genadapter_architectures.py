"""A slice of the contract for generated adapters, one architecture of a kind; `make contract` has all of them."""

import pytest

from contract import architectures, genadapter_checks
from twinweave.errors import UnsupportedModelError
from twinweave.genadapter import GenerativeAdapter

LAYERS = {
    "gpt2": "c_proj",
    "mpt": "out_proj",
    "mixtral": "o_proj",
    "mamba2": "in_proj",  # kernels read past the call of its output projection
    "bart": "out_proj",
    "qwen3_next": "out_proj, o_proj",
    "gemma3n_text": "o_proj",  # whose blocks are given several streams of states
    "dbrx": "out_proj",  # in a module that is called a norm
    "rwkv": "output",  # and no gate of the feed-forward
}
CHECKED = ("batch of states", "exported", "gradients", "context padding")


@pytest.mark.parametrize("name", LAYERS)
def test_a_slice_of_the_contract(name):
    subject = genadapter_checks.subject(name)
    assert genadapter_checks.refusal(subject) is None
    assert genadapter_checks.run_check("layers found", subject).note == LAYERS[name]
    results = {check: genadapter_checks.run_check(check, subject) for check in CHECKED}
    assert all(r.status == "pass" or r.note.startswith("upstream") for r in results.values()), results


@pytest.mark.parametrize("name", ["xlnet", "prophetnet", "cpmant"])
def test_blocks_whose_states_are_not_rows_of_tokens_are_refused(name):
    with pytest.raises(UnsupportedModelError, match="told apart by token"):
        GenerativeAdapter(architectures.tiny_model(name))
