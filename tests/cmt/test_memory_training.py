"""A training call: its loss by hand, where its gradients go, and what changes none of them."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers.modeling_layers import GradientCheckpointingLayer

from twinweave.cmt.aggregator import pooled
from twinweave.cmt.model import Found
from twinweave.errors import UnsupportedModelError


def gradients(model, **batch):
    model.zero_grad()
    torch.manual_seed(0)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def by_hand(model, base, batch, alpha, beta, separation):
    """The loss of a batch, from answers' logits and a loop over questions and documents."""
    ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"]
    memories = model.compressor(batch["context_ids"], batch["context_mask"])
    question = model.compressor(ids[:, :6], mask[:, :6])
    seen = torch.ones(len(ids), len(memories), dtype=torch.bool)
    found = Found(question, memories[None].expand(len(ids), -1, -1, -1), seen, seen.any(1))
    other = copy.copy(model)
    object.__setattr__(other, "_retrieved", lambda *_: found)
    with_memory = other(input_ids=ids, attention_mask=mask, labels=None, query_mask=labels == -100).logits[:, 5:-1]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    without = base(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, 5:-1]
    loss = cross_entropy(((1 + alpha) * with_memory - alpha * without).flatten(0, 1), ids[:, 6:].flatten())
    q, m = pooled(question), pooled(memories)
    per = len(ids) // len(memories)
    terms = []
    for i in range(len(ids)):
        own = i // per
        others = [torch.exp(-((m[own] - m[j]) ** 2).sum()) for j in range(len(m)) if j != own]
        terms.append(-(q[i] @ m[own]) + (separation * torch.stack(others).sum().log() if others else 0.0))
    return loss + beta * torch.stack(terms).mean()


@pytest.mark.parametrize(("alpha", "beta", "documents"), [(0.0, 0.0, 2), (0.5, 0.1, 2), (1.5, 0.7, 4), (0.5, 0.1, 1)])
def test_the_loss_by_hand(make_memory, make_base, step, alpha, beta, documents):
    model = make_memory(memory_aware_weight=alpha, self_matching_weight=beta, separation_weight=0.3)
    batch = step(documents=documents)
    with torch.no_grad():
        expected = by_hand(model, make_base(), batch, alpha, beta, 0.3)
        assert float(model(**batch).loss) == pytest.approx(float(expected), rel=1e-4)
        frozen = model.frozen_states(batch["input_ids"], batch["attention_mask"], batch["labels"])
        assert torch.equal(model(**batch, frozen=frozen).loss, model(**batch).loss)


def test_every_trained_parameter_gets_a_gradient_and_no_other(make_memory, arch, step):
    model = make_memory(arch, similarity_bias=True).train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    _, grads = gradients(model, **step())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert grads.keys() == trained, "data-parallel training stops at a parameter without a gradient"
    if arch != "mistral":  # whose window ends before the answer, in the layer that is nearest to it
        assert all(grad.any() for grad in grads.values())
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed <= trained
    assert changed == trained or arch == "mistral"


def test_only_a_share_of_the_documents_carries_a_gradient(make_memory, step):
    model, batch = make_memory(gradient_share=0.5, self_matching_weight=0.0), step(documents=4)
    whole = make_memory(self_matching_weight=0.0)
    assert torch.equal(model(**batch).loss, whole(**batch).loss), "in evaluation the share means nothing"
    seen = []
    compress = model.compressor.forward

    def watched(ids, mask):
        made = compress(ids, mask)
        seen.append((len(ids), made.requires_grad))
        return made

    model.compressor.forward = watched
    loss, grads = gradients(model.train(), **batch)
    assert seen == [(2, False), (2, True), (4, True)], "documents without, documents with, questions"
    torch.testing.assert_close(loss, gradients(whole.train(), **batch)[0])
    torch.manual_seed(0)
    learned = torch.randperm(4)[:2]
    model.compressor.forward = compress
    made = compress(batch["context_ids"], batch["context_mask"])
    fixed = torch.stack([row if n in learned else row.detach() for n, row in enumerate(made)])
    model._compress_documents = lambda ids, mask: fixed
    _, expected = gradients(model, **batch)
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-4)


def test_checkpointing_runs_blocks_again_and_changes_no_gradient(make_memory, arch, step):
    model, batch = make_memory(arch).train(), step()
    calls = []
    for block in model.modules():
        if isinstance(block, GradientCheckpointingLayer):
            attention = next(m for n, m in block.named_children() if "attn" in n)
            attention.register_forward_pre_hook(lambda module, args: calls.append(module))
    loss, expected = gradients(model, **batch)
    usual = len(calls)
    model.gradient_checkpointing_enable()
    found, grads = gradients(model, **batch)
    assert len(calls) - usual > usual, "compression ran again in the backward pass"
    torch.testing.assert_close(found, loss)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_parts_of_a_step_add_up(make_memory, step, beta):
    """Cross-entropy adds up exactly; the self-matching of a part is that of the part's own documents, by its share."""
    model, batch = make_memory(self_matching_weight=beta, separation_weight=0.0).train(), step(rows=4, documents=2)
    reads = torch.eye(2)
    count = int((batch["labels"] != -100).sum())
    context = {name: batch[name] for name in ("context_ids", "context_mask")}
    whole, expected = gradients(model, **batch, reads=reads, num_items_in_batch=count)
    torch.testing.assert_close(whole, gradients(model, **batch, reads=reads)[0])
    model.zero_grad()
    total = 0.0
    for part in (slice(0, 2), slice(2, 4)):
        rows = {n: batch[n][part] for n in ("input_ids", "attention_mask", "labels")}
        line = reads[part.start // 2 : part.start // 2 + 1]
        loss = model(**rows, **context, reads=line, num_items_in_batch=count).loss
        loss.backward()
        total += float(loss)
    assert total == pytest.approx(float(whole), rel=1e-4)
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)


def test_no_distractors_is_each_document_alone(make_memory, step):
    model, batch = make_memory(self_matching_weight=0.0).train(), step(rows=4, documents=4)
    model.distractors = 0.0
    alone = []
    for n in range(4):
        one = {name: tensor[n : n + 1] for name, tensor in batch.items()}
        alone.append(model(**one).loss)
    torch.testing.assert_close(model(**batch).loss, torch.stack(alone).mean())
    model.distractors = 1.0
    with_others = model(**batch).loss
    assert not torch.allclose(with_others, torch.stack(alone).mean())
    model.distractors = 0.0
    assert torch.equal(model.eval()(**batch).loss, with_others), "in evaluation all are seen"


def test_rows_that_only_fill_a_batch_up_count_for_nothing(make_memory, step):
    model, batch = make_memory().train(), step(rows=2, documents=2)
    filled = {n: torch.cat((t, t)) for n, t in batch.items() if not n.startswith("context")}
    filled["labels"] = torch.cat((batch["labels"], torch.full_like(batch["labels"], -100)))
    context = {n: t for n, t in batch.items() if n.startswith("context")}
    torch.testing.assert_close(
        model(**filled, **context, reads=torch.cat((torch.eye(2), torch.zeros(2, 2)))).loss, model(**batch).loss
    )
    empty = batch | {"labels": torch.full_like(batch["labels"], -100)}
    assert float(model(**empty).loss) == 0.0


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "adalora", "oft", "loha", "vera", "ln_tuning"])
def test_other_adapters_compress_and_leave_the_base_alone(
    make_memory, make_base, make_peft, tokens, step, kind, tmp_path
):
    model, ids = make_memory(adapter=make_peft(kind)), tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(model.base(input_ids=ids).logits, make_base()(input_ids=ids).logits)
        with model.compressor.active():
            assert not torch.equal(model.base(input_ids=ids).logits, make_base()(input_ids=ids).logits)
    _, grads = gradients(model.train(), **step())
    assert grads.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved", make_base(), is_trainable=True)
    assert again.fingerprint() == model.fingerprint()
    with torch.no_grad():
        assert torch.equal(again.eval()(**step()).loss, model.eval()(**step()).loss)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (lambda p: p.PromptTuningConfig(num_virtual_tokens=2), "of type PROMPT_TUNING"),
        (lambda p: p.PrefixTuningConfig(num_virtual_tokens=2), "of type PREFIX_TUNING"),
        (lambda p: p.AdaptionPromptConfig(adapter_len=2, adapter_layers=1), "of type ADAPTION_PROMPT"),
        (lambda p: p.LoraConfig(modules_to_save=["lm_head"]), "with modules_to_save"),
        (lambda p: p.LoraConfig(layer_replication=[[0, 2], [0, 2]]), "with layer_replication"),
        (lambda p: p.LoraConfig(bias="all"), "bias='all' trains biases of the base"),
        (lambda p: p.LoraConfig(init_lora_weights="pissa"), "changes the base's own weights"),
        (lambda p: p.LoraConfig(init_lora_weights="olora"), "changes the base's own weights"),
    ],
)
def test_adapters_that_are_not_beside_the_layers_are_refused(make_memory, make_base, config, why):
    import peft

    base = make_base()
    before = copy.deepcopy(base.state_dict())
    adapter = config(peft)
    adapter.task_type = "CAUSAL_LM"
    with pytest.raises(UnsupportedModelError, match=why):
        make_memory(base=base, adapter=adapter)
    assert before.keys() == base.state_dict().keys(), "the base is as it was"
