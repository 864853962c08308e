"""`forward(rehearse=…)`: the divergence of the interwoven from the original memory, and who learns from it."""

import pytest
import torch

from twinweave.errors import UsageError

LENGTH = 10


def batch_of(tokens, rows=3, places=4, seed=0):
    """Rows of different lengths, with query masks that end within, at the end and at once."""
    generator = torch.Generator().manual_seed(seed)
    ids = tokens(rows, LENGTH, seed)
    lengths = torch.tensor([LENGTH, LENGTH - 3, LENGTH - 1])[:rows]
    ends = torch.tensor([4, LENGTH, 1])[:rows]
    columns = torch.arange(LENGTH)
    mask = columns < lengths[:, None]
    labels = torch.full_like(ids, -100)
    for row, length in enumerate(lengths):
        chosen = 1 + torch.randperm(int(length) - 1, generator=generator)[:places]
        labels[row, chosen] = ids[row, chosen]
    query = (columns < ends[:, None]) & mask
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels, "query_mask": query.long()}


def naive(model, batch, memory="interwoven"):
    """The divergence of a memory from the original one, from whole logits of both."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    wanted = batch["labels"][:, 1:] != -100
    with model.use_memory("original"):
        original = model(**inputs).logits[:, :-1][wanted].double()
    with model.use_memory(memory):
        woven = model(**inputs, query_mask=batch["query_mask"]).logits[:, :-1][wanted].double()
    p, q = original.softmax(-1), woven.softmax(-1)
    return (p * (p / q).log()).sum(-1).mean()


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


@pytest.mark.parametrize("fusion", ["query_gate", "gate"])
def test_the_loss_is_the_divergence(arch, fusion, make_imsm, tokens):
    model, batch = make_imsm(arch, fusion=fusion), batch_of(tokens)
    out = model(**batch, rehearse="gate")
    with torch.no_grad():
        expected = naive(model, batch)
    assert expected > 0.01
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-4, atol=1e-6)
    places = int((batch["labels"][:, 1:] != -100).sum())
    assert out.logits.shape[:2] == (1, places)
    out = model(**batch, rehearse="both")
    with torch.no_grad():
        expected = expected + naive(model, batch, "enhanced")
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-4, atol=1e-6)
    assert out.divergences.shape == (2,)
    assert torch.equal(out.divergences.sum(), out.loss)
    assert out.logits.shape[:2] == (1, places)
    out = model(**batch, rehearse="gate", output_gate=True)
    assert out.gate.shape[:2] == (1, places)


def test_the_values_of_the_labels_count_for_nothing(make_imsm, tokens):
    model, batch = make_imsm(), batch_of(tokens)
    others = batch | {"labels": torch.where(batch["labels"] == -100, -100, 5)}
    assert torch.equal(model(**batch, rehearse="gate").loss, model(**others, rehearse="gate").loss)


def test_only_the_gate_learns_from_its_rehearsal(arch, peft_kind, make_imsm, tokens):
    if arch == "gpt2" and peft_kind in ("oft", "loha"):
        pytest.skip("PEFT has none for Conv1D")
    model, batch = make_imsm(arch, peft_kind), batch_of(tokens)
    model.train()
    model(**batch, rehearse="gate").loss.backward()
    assert set(gradients(model)) == {"gate.w_a", "gate.w_b"}
    gate = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad(set_to_none=True)
    model.eval()
    model(**batch, rehearse="both").loss.backward()
    assert any("gate." not in name for name in gradients(model))
    for name, grad in gate.items():  # what reaches the gate does not depend on who else learns
        torch.testing.assert_close(grad, gradients(model)[name], rtol=1e-4, atol=1e-7)


def test_gradients_of_the_gate_are_those_of_the_whole_formula(make_imsm, tokens):
    model, batch = make_imsm(), batch_of(tokens)
    model(**batch, rehearse="both").loss.backward()
    found = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad(set_to_none=True)
    naive(model, batch).backward()
    gate = {name: grad.clone() for name, grad in gradients(model).items() if name.startswith("gate.")}
    model.zero_grad(set_to_none=True)
    naive(model, batch, "enhanced").backward()
    expected = gate | gradients(model)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-6, msg=name)


def test_an_adapter_that_has_learned_nothing_diverges_by_nothing(make_imsm, tokens):
    model, batch = make_imsm(trained=False), batch_of(tokens)
    assert model(**batch, rehearse="gate").loss == 0


def test_frozen_states_replace_the_frozen_pass(make_imsm, tokens, monkeypatch):
    model, batch = make_imsm(), batch_of(tokens)
    frozen = model.frozen_states(**batch)
    expected = model(**batch, rehearse="gate").loss
    monkeypatch.setattr(model._twin, "frozen_pass", lambda *args: pytest.fail("a frozen pass was run"))
    torch.testing.assert_close(model(**batch, rehearse="gate", frozen=frozen).loss, expected)


def test_dropout_plays_no_part_in_the_gates_rehearsal(make_imsm, tokens):
    model, batch = make_imsm(peft_changes={"lora_dropout": 0.5}), batch_of(tokens)
    still = model(**batch, rehearse="gate").loss
    model.train()
    assert torch.equal(model(**batch, rehearse="gate").loss, still)
    assert not torch.equal(model(**batch, rehearse="both").loss, still)
    assert all(module.training for module in model.modules())


def test_nothing_is_left_behind_by_an_error(make_imsm, tokens, monkeypatch):
    model, batch = make_imsm(), batch_of(tokens)
    layer = model._twin.decoder.layers[1]
    monkeypatch.setattr(layer, "forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch, rehearse="gate")
    monkeypatch.undo()
    assert torch.is_grad_enabled()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert model(**inputs, labels=batch["labels"]).loss.requires_grad
    with torch.no_grad():
        assert not model(**batch, rehearse="gate").loss.requires_grad
        assert not torch.is_grad_enabled()


def test_what_cannot_be_rehearsed_is_said(make_imsm, tokens):
    model, batch = make_imsm(), batch_of(tokens)
    with pytest.raises(UsageError, match=r"'gat'.*'gate'"):
        model(**batch, rehearse="gat")
    with pytest.raises(UsageError, match="labels"):
        model(input_ids=batch["input_ids"], rehearse="gate")
    with model.use_memory("enhanced"), pytest.raises(UsageError, match="enhanced"):
        model(**batch, rehearse="gate")


def test_it_works_under_gradient_checkpointing_and_in_half_precision(make_imsm, tokens):
    model, batch = make_imsm(), batch_of(tokens)
    expected = model(**batch, rehearse="gate").loss
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    out = model(**batch, rehearse="gate", use_cache=False)
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    assert set(gradients(model)) == {"gate.w_a", "gate.w_b"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(**batch, rehearse="gate", use_cache=False)
    assert half.loss.dtype == torch.float32
    torch.testing.assert_close(half.loss, expected, rtol=0.2, atol=0.02)
