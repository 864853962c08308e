"""A slice of the contract for memories, one architecture of a kind; `make contract` has all of them."""

import pytest

from contract import cmt_checks

LAYERS = {
    "gpt2": "",
    "bloom": "",  # no positions, but a slope
    "mixtral": "",
    "gemma2": "",  # sliding and full attention in turn
    "deepseek_v3": "",  # keys of another size than values
    "opt": "",  # positions from the mask
    "qwen3_next": "in layers [1] of 2",
    "gemma3n_text": "in layers [0, 1] of 4",  # the others read the same keys and values
    "rembert": "",  # embeddings of another size than states
}
CHECKED = ("empty is the base", "prefix is plain", "cached", "batch", "loss")


@pytest.mark.parametrize("name", LAYERS)
def test_a_slice_of_the_contract(name):
    subject = cmt_checks.subject(name)
    assert cmt_checks.refusal(subject) is None
    assert cmt_checks.run_check("layers found", subject).note == LAYERS[name]
    results = {check: cmt_checks.run_check(check, subject) for check in CHECKED}
    assert all(r.status == "pass" or r.note.startswith(("upstream", "tokens in front")) for r in results.values())


def test_checkpointed_blocks_that_are_not_all_of_the_base():
    """Of gemma3n, what lies between the blocks is adapted too: it must not lose the adapter when a block ends."""
    assert cmt_checks.run_check("checkpointing", cmt_checks.subject("gemma3n_text")).status == "pass"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mamba", "keeps no keys and values"),
        ("rwkv", ""),
        ("deepseek_v32", "keeps more than a key and a value"),
        ("cpmant", "keeps more than a key and a value"),
        ("prophetnet", "does not go on from keys and values"),
    ],
)
def test_bases_without_a_place_for_a_prefix_are_refused(name, why):
    assert why in str(cmt_checks.refusal(cmt_checks.subject(name)))
