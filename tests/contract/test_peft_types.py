"""A slice of the contract over PEFT's types: two checks of every one, all that matter of those that differ most.

`make contract` has every check of every type.
"""

import pytest
from peft import PeftType

from contract import checks, peft_types

REFUSED = {
    "XLORA": "runs the whole model twice",
    "LORA: LoftQ": "quantised copy",
    "LORA: KaSA": "kasa_config",
    "LORA: bias of the base": "bias='all'",
    "LORA: the head": "lm_head",
    "LORA: modules_to_save, the head": "lm_head",
    "LORA: layer_replication": "layer_replication",
}
DIFFERENT = ("PROMPT_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "SHADOW")
CHECKED = (
    "memories differ",
    "padding left",
    "cached greedy",
    "cached, guarded",
    "left-padded batch",
    "gradient",
    "at labels",
    "rehearsal",
    "saved",
    "saved for PEFT",
    "bf16",
)


def failures(subject, names):
    results = {name: checks.run_check(name, subject) for name in names}
    return {name: result for name, result in results.items() if result.status == "fail"}


def test_every_type_is_there():
    assert set(peft_types.TYPES) == {kind.value for kind in PeftType} | {"SLIM"}


@pytest.mark.parametrize("name", [name for name in peft_types.TYPES if name not in REFUSED])
def test_every_type_is_one_of_two_memories(name):
    subject = peft_types.subject(name)
    assert checks.refusal(subject) is None
    results = {name: checks.run_check(name, subject) for name in ("original after training", "enhanced is plain PEFT")}
    assert all(result.status == "pass" for result in results.values()), results


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_with_the_reason(name):
    assert REFUSED[name] in (checks.refusal(peft_types.subject(name)) or "")


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_most(name):
    assert not failures(peft_types.subject(name), CHECKED)


def test_lily_reads_the_whole_batch_in_plain_peft_too():
    """It mixes its experts by their mean over all rows and columns: no twin can make that causal."""
    subject = peft_types.subject("LILY")
    results = {name: checks.run_check(name, subject) for name in ("causal", "padding left", "cached greedy")}
    assert {result.status for result in results.values()} == {"n/a"}
    assert all(result.note.startswith("upstream: plain PEFT") for result in results.values()), results
