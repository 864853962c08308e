"""IMSM whose enhanced memory is SLIM."""

import copy
import warnings

import pytest
import torch
from peft import PeftModel

from twinweave import IMSMConfig, IMSMModel, get_imsm_model
from twinweave.imsm.cache import StackedCache
from twinweave.slim import SlimConfig, get_slim_model
from twinweave.slim.clustering import SlidingClusters

SMALL = {"r": 2, "num_experts": 3, "num_clusters": 2, "cluster_rate": 0.2, "router_init_std": 0.1}


def small(**changes):
    return SlimConfig(**SMALL | changes)


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def of_adapter(model):
    """Its weights and clusters, with all that training has gathered so far."""
    return {n: t.clone() for n, t in model.state_dict().items() if "slim_" in n}


def clusters_in(model):
    return {n: t for n, t in of_adapter(model).items() if "clusters" in n}


def equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)


def steps(model, tokens, count=3):
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    losses = []
    for seed in range(count):
        ids = tokens(2, 9, seed=seed)
        loss = model(input_ids=ids, labels=ids.where(torch.arange(9) > 3, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.state_dict()
    return losses


@pytest.fixture
def make(make_base, perturb, tokens):
    def make_woven(arch="llama", trained=True, **changes):
        torch.manual_seed(5)
        model = get_imsm_model(make_base(arch), small(**changes), IMSMConfig(gate_rank=3))
        if trained:
            perturb(model)
            steps(model, tokens)
        return model.eval()

    return make_woven


def test_it_trains_and_both_ends_are_exact(make, make_base, tokens, arch):
    ids = tokens(2, 7)
    model = make(arch, trained=False)
    base = logits(make_base(arch), ids)
    assert torch.equal(logits(model, ids), base)
    before = of_adapter(model)
    gate = model.gate.w_b.detach().clone()
    steps(model, tokens)
    model.eval()
    assert not torch.equal(model.gate.w_b, gate)
    after = of_adapter(model)
    # the LoRA product starts at zero, so only what is behind it moves at first
    assert sum(not torch.equal(after[n], before[n]) for n in after) > len(after) / 2
    assert {int(t) for n, t in after.items() if n.endswith("batches")} == {3}
    with model.use_memory("original"):
        assert torch.equal(logits(model, ids), base)
    plain = get_slim_model(make_base(arch), small())
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if n.startswith("base_model.")})
    with model.use_memory("enhanced"):
        assert torch.equal(logits(model, ids), logits(plain.eval(), ids))
    woven = logits(model, ids)
    assert not torch.allclose(woven, base)
    assert not torch.allclose(woven, logits(plain, ids))


def test_saved_and_loaded_it_is_the_same(make, make_base, tokens, tmp_path):
    model, ids = make(), tokens(2, 7)
    model.save_pretrained(str(tmp_path))
    loaded = IMSMModel.from_pretrained(str(tmp_path), make_base())
    assert equal(of_adapter(loaded), of_adapter(model))
    for memory in ("original", "enhanced", "interwoven"):
        with model.use_memory(memory), loaded.use_memory(memory):
            assert torch.equal(logits(loaded, ids), logits(model, ids))
    enhanced = PeftModel.from_pretrained(make_base(), str(tmp_path)).eval()
    with model.use_memory("enhanced"):
        assert torch.equal(logits(enhanced, ids), logits(model, ids))


@pytest.mark.parametrize("source", ["model", "folder"])
@pytest.mark.parametrize("train_adapter", [True, False])
def test_over_a_slim_that_is_trained_already(source, train_adapter, make_base, perturb, tokens, tmp_path):
    plain = get_slim_model(make_base(), small())
    perturb(plain)
    steps(plain, tokens)
    ids, expected, state = tokens(2, 7), logits(plain.eval(), tokens(2, 7)), of_adapter(plain)
    if source == "folder":
        plain.save_pretrained(tmp_path / "plain")
        model = get_imsm_model(
            make_base(), str(tmp_path / "plain"), IMSMConfig(gate_rank=3), train_adapter=train_adapter
        )
    else:
        model = get_imsm_model(plain, imsm_config=IMSMConfig(gate_rank=3), train_adapter=train_adapter)
    model.eval()
    assert equal(of_adapter(model), state)
    with model.use_memory("enhanced"):
        assert torch.equal(logits(model, ids), expected)
    with model.use_memory("original"):
        assert torch.equal(logits(model, ids), logits(make_base(), ids))
    losses = steps(model, tokens)
    assert all(loss > 0 for loss in losses)
    assert equal(of_adapter(model), state) is (not train_adapter)
    model.save_pretrained(str(tmp_path / "woven"))
    loaded = IMSMModel.from_pretrained(str(tmp_path / "woven"), make_base())
    assert equal(of_adapter(loaded), of_adapter(model))
    assert torch.equal(logits(loaded, ids), logits(model.eval(), ids))


def test_the_stacked_plan_is_the_two_pass_plan(make, tokens, arch):
    model, ids = make(arch), tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    results = []
    for plan in ("two_pass", "stacked"):
        model.plan = plan
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")  # that it cannot be stacked
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            first = model(
                input_ids=ids[:, :5], attention_mask=mask[:, :5], position_ids=positions[:, :5], use_cache=True
            )
            rest = model(
                input_ids=ids[:, 5:], attention_mask=mask, position_ids=positions[:, 5:],
                past_key_values=first.past_key_values,
            )  # fmt: skip
        results.append(torch.cat((first.logits, rest.logits), 1)[mask.bool()])
    assert isinstance(rest.past_key_values, StackedCache)
    torch.testing.assert_close(*results, atol=2e-5, rtol=1e-4)
    tokens_of = []
    for plan in ("two_pass", "stacked"):
        model.plan = plan
        tokens_of.append(model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=0))
    assert torch.equal(*tokens_of)


def batch_of(tokens, seed=20):
    ids = tokens(3, 9, seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.where(torch.arange(9) > 3, -100)}


@pytest.mark.parametrize("kind", ["gate", "both"])
def test_rehearsal_does_not_move_the_clusters(kind, make, tokens):
    model = make().train()
    before = clusters_in(model)
    for seed in range(3):
        loss = model(**batch_of(tokens, 20 + seed), rehearse=kind).loss
        loss.backward()
        assert loss.isfinite()
    assert equal(clusters_in(model), before)
    model(**batch_of(tokens))
    assert not equal(clusters_in(model), before)


def test_nor_does_it_between_a_forward_and_its_backward(make, tokens):
    """As the trainer does it: the task's loss, the rehearsal's, one backward pass for both, under checkpointing."""
    results = []
    for checkpointing in (False, True):
        model = make()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        torch.manual_seed(2)
        loss = model(**batch_of(tokens), logits_at_labels=True).loss
        loss = loss + model(**batch_of(tokens, 30), rehearse="both").loss
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append({"loss": loss.detach(), **grads, **of_adapter(model)})
    assert results[0].keys() == results[1].keys()
    for name in results[0]:
        torch.testing.assert_close(results[1][name], results[0][name], rtol=1e-4, atol=1e-6, msg=name)


def test_frozen_passes_and_evaluation_do_not_move_them(make, tokens):
    model = make().train()
    before = clusters_in(model)
    model.frozen_states(**batch_of(tokens))
    with model.use_memory("original"):
        model(**batch_of(tokens))
    model.eval()
    model(**batch_of(tokens))
    assert equal(clusters_in(model), before)


def test_each_step_takes_its_tokens_in_once(make, make_base, tokens):
    """The original memory's pass through the same layers is no second time; the clusters are those of plain SLIM."""
    torch.manual_seed(5)
    plain = get_slim_model(make_base(), small()).train()
    torch.manual_seed(5)
    woven = get_imsm_model(make_base(), small(), IMSMConfig(gate_rank=3)).train()
    kept = copy.deepcopy(woven)
    for seed in range(3):
        batch = batch_of(tokens, seed)
        plain(**batch)
        woven(**batch)
        kept(**batch, logits_at_labels=True, frozen=kept.frozen_states(**batch))
    assert {int(c.batches) for c in woven.modules() if isinstance(c, SlidingClusters)} == {2}
    for model in (woven, kept):
        for name, tensor in clusters_in(plain).items():
            torch.testing.assert_close(clusters_in(model)[name], tensor)
    # and where the decoder is called alone
    decoder = kept.get_base_model().get_decoder()
    before = clusters_in(kept)
    batch = batch_of(tokens, 7)
    decoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert {int(t) for n, t in clusters_in(kept).items() if n.endswith("batches")} == {4}
    assert not equal(clusters_in(kept), before)


def test_the_l1_term_is_in_its_loss_however_that_is_computed(make, tokens):
    model, batch = make(masking_ratio=0.0, yielding_strength=0.0), batch_of(tokens)
    plain = model(**batch).loss
    term = model.base_model.l1_loss()
    assert term > 1e-3
    model.train()
    count = int((batch["labels"] != -100).sum())
    for options in ({}, {"logits_at_labels": True}):
        torch.testing.assert_close(model(**batch, **options).loss, plain + term, rtol=1e-5, atol=1e-6)
        half = model(**batch, **options, num_items_in_batch=torch.tensor(2 * count)).loss
        torch.testing.assert_close(half, (plain + term) / 2, rtol=1e-5, atol=1e-6)
