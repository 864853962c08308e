"""Gradients, losses, checkpointing and failures in the middle of a call."""

import pytest
import torch
from torch.nn.functional import cross_entropy


@pytest.fixture
def batch(tokens):
    ids, mask = tokens(3, 10), torch.ones(3, 10, dtype=torch.long)
    mask[2, 7:] = 0
    labels = ids.clone()
    for row, start in enumerate((4, 6, 3)):
        labels[row, :start] = -100
    labels[mask == 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def step(model, batch, lr=0.05, **options):
    loss = model(**batch, **options).loss
    model.zero_grad()
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= lr * p.grad
    return loss.detach()


def is_ours(name):
    return name.startswith("gate.") or any(mark in name for mark in ("lora_", "ia3_", "oft_", "hada_", "vera_", "ln_"))


def test_gradients_reach_the_adapter_and_the_gate_and_nothing_else(arch, make_imsm, batch):
    model = make_imsm(arch, trained=False)  # without dropout, which would tell the memories apart
    model(**batch).loss.backward()
    first = gradients(model)
    assert all(is_ours(name) for name in first)
    assert all(not p.requires_grad for n, p in model.named_parameters() if not is_ours(n))
    # equal memories: there is nothing to choose between yet
    assert all((first[f"gate.{name}"] == 0).all() for name in ("w_a", "w_b"))
    assert any(g.abs().max() > 0 for n, g in first.items() if "lora_B" in n)
    for _ in range(3):
        step(model, batch)
    model.zero_grad()
    model(**batch).loss.backward()
    later = gradients(model)
    assert set(later) == set(first) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(g.abs().max() > 0 for g in later.values())


def test_gradients_for_every_adapter(peft_kind, make_imsm, batch):
    model = make_imsm("llama", peft_kind, trained=False).train()
    for _ in range(4):
        step(model, batch)
    found = gradients(model)
    assert set(found) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(is_ours(n) for n in found)
    assert any(g.abs().max() > 0 for n, g in found.items() if not n.startswith("gate."))
    assert all(g.abs().max() > 0 for n, g in found.items() if n.startswith("gate."))


def test_the_loss_falls(arch, make_imsm, batch):
    model = make_imsm(arch, trained=False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(40):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_no_gradient_flows_into_the_frozen_pass(make_imsm, batch):
    """The tuned branch's gradient carries the factor 1 - g: it vanishes when only the original memory is heard."""
    model = make_imsm()
    model.retention = float("inf")
    model(**batch).loss.backward()
    assert all((g == 0).all() for g in gradients(model).values())


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("when", ["before wrapping", "after wrapping"])
def test_gradient_checkpointing_changes_nothing(arch, reentrant, when, make_base, make_imsm, batch):
    def run(model):
        torch.manual_seed(11)  # dropout of GPT-2 must fall alike
        loss = model.train()(**batch).loss
        loss.backward()
        return loss.detach(), gradients(model)

    loss, grads = run(make_imsm(arch))
    settings = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    base = make_base(arch)
    if when == "before wrapping":
        base.gradient_checkpointing_enable(**settings)
        model = make_imsm(arch, base=base)
    else:
        model = make_imsm(arch, base=base)
        model.gradient_checkpointing_enable(**settings)
        model.enable_input_require_grads()
    loss_again, grads_again = run(model)
    torch.testing.assert_close(loss_again, loss, atol=1e-6, rtol=1e-6)
    assert set(grads) == set(grads_again)
    for name, grad in grads.items():
        torch.testing.assert_close(grads_again[name], grad, atol=1e-5, rtol=1e-4)


def test_loss_is_the_mean_over_labels_and_scales_with_num_items(arch, make_imsm, batch):
    model = make_imsm(arch)
    out = model(**batch)
    shifted = batch["labels"][:, 1:]
    total = cross_entropy(out.logits[:, :-1].transpose(1, 2), shifted, ignore_index=-100, reduction="sum")
    count = (shifted != -100).sum()
    torch.testing.assert_close(out.loss, total / count)
    torch.testing.assert_close(model(**batch, num_items_in_batch=torch.tensor(40)).loss, total / 40)


def test_gradient_accumulation_adds_up_to_the_whole_batch(make_imsm, batch):
    whole, parts = make_imsm(), make_imsm()
    items = (batch["labels"][:, 1:] != -100).sum()
    whole(**batch, num_items_in_batch=items).loss.backward()
    for row in range(3):
        parts(**{k: v[row : row + 1] for k, v in batch.items()}, num_items_in_batch=items).loss.backward()
    expected = gradients(whole)
    for name, grad in gradients(parts).items():
        torch.testing.assert_close(grad, expected[name], atol=1e-5, rtol=1e-4)


def test_the_original_memory_has_no_dropout_while_training(make_base, make_imsm, tokens):
    model, ids = make_imsm("gpt2").train(), tokens(2, 8)
    model.retention = float("inf")
    assert torch.equal(model(input_ids=ids).logits, make_base("gpt2")(input_ids=ids).logits)
    model.retention = float("-inf")
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    assert all(m.training for m in model.modules())
    model.eval()
    model(input_ids=ids)
    assert not any(m.training for m in model.modules())


def test_gate_dropout_only_while_training(make_imsm, tokens):
    model, ids = make_imsm(gate_dropout=0.5), tokens(2, 8)
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    model.train()
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_training_under_autocast(make_imsm, batch):
    model = make_imsm().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), make_imsm()(**batch).loss.detach(), atol=0.1, rtol=0.05)
    assert all(torch.isfinite(g).all() for g in gradients(model).values())
    assert model.gate.w_b.grad.dtype == torch.float32


class Stop(RuntimeError):
    """What the tests throw into a running model."""


def fail_at_call(module, n):
    """Make the module's n-th forward from now raise."""
    calls = iter(range(1, 10_000))

    def hook(*_):
        if next(calls) == n:
            raise Stop

    return module.register_forward_pre_hook(hook)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("train", [False, True])
def test_a_failure_in_either_pass_leaves_the_model_as_it_was(arch, n, train, make_imsm, batch):
    model = make_imsm(arch)
    expected = model(**batch).logits
    with model.use_memory("enhanced"):
        enhanced = model(**batch).logits
    model.train(train)
    modes = [m.training for m in model.modules()]
    last = next(m for m in reversed(list(model.base_model.modules())) if hasattr(m, "lora_A"))
    handle = fail_at_call(last, n)
    with pytest.raises(Stop):
        model(**batch, output_gate=True)
    handle.remove()
    assert [m.training for m in model.modules()] == modes
    model.eval()
    assert torch.equal(model(**batch).logits, expected)
    with model.use_memory("enhanced"):
        assert torch.equal(model(**batch).logits, enhanced)


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_a_failure_while_generating_leaves_the_model_as_it_was(n, make_imsm, tokens):
    model, ids = make_imsm(), tokens(2, 6)
    expected, plain = model.generate(input_ids=ids, max_new_tokens=6), model(input_ids=ids).logits
    last = next(m for m in reversed(list(model.base_model.modules())) if hasattr(m, "lora_A"))
    handle = fail_at_call(last, n)
    with pytest.raises(Stop):
        model.generate(input_ids=ids, max_new_tokens=6, query_mask=torch.tensor([[1, 1, 0, 0, 0, 0]] * 2))
    handle.remove()
    # nothing that was said about the failed call reaches a trainer that calls the model below ours
    assert torch.equal(model.get_base_model()(input_ids=ids).logits, plain)
    assert torch.equal(model(input_ids=ids).logits, plain)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=6), expected)


def test_a_failure_inside_a_memory_block_ends_the_block(make_imsm, tokens):
    model, ids = make_imsm(), tokens(2, 6)
    expected = model(input_ids=ids).logits
    for memory in ("original", "enhanced"):
        handle = fail_at_call(model.get_output_embeddings(), 1)
        with pytest.raises(Stop), model.use_memory(memory):
            model(input_ids=ids)
        handle.remove()
        assert torch.equal(model(input_ids=ids).logits, expected)
