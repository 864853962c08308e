"""SLIM in a whole model: it is a PeftModel like any other."""

import copy
import json
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments

from twinweave.errors import BaseMismatchError, DamagedFileError, UnsupportedModelError, UsageError
from twinweave.slim import SlimConfig, get_slim_model
from twinweave.slim.clustering import SlidingClusters
from twinweave.slim.layer import SlimLayer
from twinweave.slim.router import Router, watch_identity

SMALL = {"r": 2, "num_experts": 3, "num_clusters": 2, "cluster_rate": 0.2, "router_init_std": 0.1}


def small(**changes):
    return SlimConfig(**SMALL | changes)


@pytest.fixture
def make(make_base, perturb, tokens):
    """A model as in the middle of its training, in evaluation mode."""

    def make_slim(arch="llama", steps=2, base=None, **changes):
        torch.manual_seed(5)
        model = get_slim_model(make_base(arch) if base is None else base, small(**changes))
        perturb(model)
        model.train()
        with torch.no_grad():
            for seed in range(steps):
                model(input_ids=tokens(2, 9, seed=seed))
        model.state_dict()  # takes the last batch in
        return model.eval()

    return make_slim


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def clusters_of(model):
    return [m for m in model.modules() if isinstance(m, SlidingClusters)]


def of_adapter(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "slim_" in name}


def equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)


# --- as a PeftModel ----------------------------------------------------------------------------------------------


def test_pefts_own_function_makes_the_same(make_base, tokens):
    models = []
    for function in (get_peft_model, get_slim_model):
        torch.manual_seed(0)
        models.append(function(make_base(), small(task_type="CAUSAL_LM")))
    assert type(models[0]) is type(models[1])
    assert equal(of_adapter(models[0]), of_adapter(models[1]))
    assert equal({"": logits(models[0].eval(), tokens(2, 7))}, {"": logits(models[1].eval(), tokens(2, 7))})


def test_only_the_experts_and_the_routers_of_the_feed_forwards_learn(make, arch):
    model = make(arch)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("mlp" in name and "slim_" in name for name in trained)
    hidden, wide, gpt2 = 32, 128 if arch == "gpt2" else 48, arch == "gpt2"
    into, out_of = (3 * 2 * (hidden + wide),) * 2
    routers = 5 * hidden + 5 * wide
    expected = 2 * ((1 if gpt2 else 2) * into + out_of + routers)
    assert model.get_nb_trainable_parameters()[0] == sum(p.numel() for p in trained.values()) == expected


def test_a_fresh_one_is_the_base_bit_for_bit(make_base, tokens, arch):
    ids = tokens(2, 7)
    base = logits(make_base(arch), ids)
    model = get_slim_model(make_base(arch), small())
    assert torch.equal(logits(model.eval(), ids), base)


def test_switched_off_it_is_the_base_bit_for_bit(make, make_base, tokens, arch):
    ids = tokens(2, 7)
    base, model = make_base(arch), make(arch)
    before, trained = logits(model, ids), {n for n, p in model.named_parameters() if p.requires_grad}
    state = of_adapter(model)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(base, ids))
        if arch == "llama":  # the others have dropout, or are slow
            model.train()
            assert torch.equal(logits(model, ids), logits(base, ids))
            model.eval()
    assert torch.equal(logits(model, ids), before)
    assert not torch.allclose(before, logits(base, ids))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    assert equal(of_adapter(model), state)


def test_all_identity_is_the_base_and_needs_no_expert(make, make_base, tokens):
    ids = tokens(2, 7)
    model = make()
    for clusters in clusters_of(model):
        clusters.centres.fill_(1e5)
    assert torch.equal(logits(model, ids), logits(make_base(), ids))
    with torch.no_grad():
        for layer in (m for m in model.modules() if isinstance(m, SlimLayer)):
            layer.slim_A["default"].fill_(torch.nan)
    assert torch.equal(logits(model, ids), logits(make_base(), ids))


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("name", ["default", "other"])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_saved_and_loaded_it_is_the_same(arch, name, low_memory, make, make_base, tokens, tmp_path):
    model = make(arch, mask_seed=11)
    ids = tokens(2, 7)
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)
    loaded = PeftModel.from_pretrained(make_base(arch), tmp_path, adapter_name=name, low_cpu_mem_usage=low_memory)
    assert torch.equal(logits(loaded.eval(), ids), logits(model, ids))
    found = {n.replace(f".{name}", ".default"): t for n, t in of_adapter(loaded).items()}
    assert equal(found, of_adapter(model))
    assert loaded.peft_config[name].mask_seed == 11
    assert not any(p.requires_grad for p in loaded.parameters())
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 200_000  # nothing of the base


def test_training_goes_on_from_what_was_saved(make, make_base, tokens, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(), tmp_path, is_trainable=True)
    results = []
    for one in (model, loaded):
        torch.manual_seed(3)
        loss = one.train()(input_ids=tokens(2, 9, seed=8), labels=tokens(2, 9, seed=8)).loss
        loss.backward()
        grads = {n: p.grad for n, p in one.named_parameters() if p.requires_grad}
        results.append({"loss": loss, **grads, **of_adapter(one)})
    assert equal(*results)
    assert clusters_of(loaded)[0].batches == 3


def test_another_base_is_refused(make, make_base, tmp_path):
    make().save_pretrained(tmp_path)
    for other in (make_base(seed=1), make_base(num_hidden_layers=1), make_base("mistral")):
        with pytest.raises(BaseMismatchError, match="another base"):
            PeftModel.from_pretrained(other, tmp_path)
    recorded = json.loads((tmp_path / "adapter_config.json").read_text())["base_fingerprint"]
    assert recorded


def test_several_adapters(make, make_base, perturb, tokens):
    ids = tokens(2, 7)
    model = make()
    first = logits(model, ids)
    model.add_adapter("other", small(r=3, num_experts=2, masking_ratio=0.0, router_sharing="layer"))
    assert torch.equal(logits(model, ids), first)
    model.set_adapter("other")
    assert torch.equal(logits(model, ids), logits(make_base(), ids))
    perturb(model, seed=4)
    second = logits(model, ids)
    assert not torch.allclose(second, first)
    model.set_adapter("default")
    assert torch.equal(logits(model, ids), first)
    model.base_model.set_adapter(["default", "other"])
    model.eval()
    both = logits(model, ids)
    assert not torch.allclose(both, first)
    assert not torch.allclose(both, second)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    x = layer.slim_clusters["default"].centres + 0.01 * torch.randn(2, 48)  # elsewhere all may be identity
    added = [layer._added(x, name) for name in ("default", "other")]
    torch.testing.assert_close(layer(x), layer.base_layer(x) + added[0] + added[1])
    model.set_adapter("default")
    kept = len(model.base_model.passing.clusters)
    model.delete_adapter("other")
    assert len(model.base_model.passing.clusters) == kept - 6
    assert torch.equal(logits(model, ids), first)
    assert not any("other" in name for name in model.state_dict())
    model.train()(input_ids=ids)
    model.train()(input_ids=ids)


def test_only_the_active_adapters_clusters_move(make, tokens):
    model = make()
    model.add_adapter("other", small())
    model.train()
    moved = []
    for name in ("default", "other"):
        model.set_adapter(name)
        before = of_adapter(model)
        for seed in range(2):
            model(input_ids=tokens(2, 9, seed=seed))
        after = of_adapter(model)
        moved.append({n for n in after if not torch.equal(after[n], before[n])})
    assert moved[0]
    assert all(".default." in n and "clusters" in n for n in moved[0])
    assert moved[1]
    assert all(".other." in n and "clusters" in n for n in moved[1])


def test_a_saved_adapter_is_loaded_beside_another(make, make_base, tokens, tmp_path):
    ids, model = tokens(2, 7), make()
    model.save_pretrained(tmp_path)
    host = get_slim_model(make_base(), small())
    host.load_adapter(tmp_path, "loaded")
    host.set_adapter("loaded")
    assert torch.equal(logits(host.eval(), ids), logits(model, ids))


def test_merging_is_refused_and_leaves_the_model_as_it_was(make, tokens):
    model, ids = make(), tokens(2, 7)
    before = logits(model, ids)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(UnsupportedModelError, match="cannot be merged"):
            merge()
        assert torch.equal(logits(model, ids), before)
    assert len(of_adapter(model)) > 0
    state = of_adapter(model)
    model.train()
    for _ in range(2):
        model(input_ids=ids)  # the clusters still follow
    assert not equal(of_adapter(model), state)


def test_unloading_gives_the_base_back(make, make_base, tokens, arch):
    base = make(arch).unload()
    assert torch.equal(logits(base, tokens(2, 7)), logits(make_base(arch), tokens(2, 7)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    assert not any(isinstance(m, SlimLayer) for m in base.modules())
    assert {n: p.shape for n, p in base.named_parameters()} == {
        n: p.shape for n, p in make_base(arch).named_parameters()
    }


def test_a_copy_is_a_model_of_its_own(make, perturb, make_base, tokens):
    model, ids = make(), tokens(2, 7)
    before, state = logits(model, ids), of_adapter(model)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other, ids), before)
    perturb(other, seed=9)
    other.train()
    for _ in range(3):
        other(input_ids=ids)
    assert other.base_model.passing is not model.base_model.passing
    assert torch.equal(logits(model, ids), before)
    assert equal(of_adapter(model), state)
    assert clusters_of(other)[0].batches > clusters_of(model)[0].batches
    base = other.unload()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    assert torch.equal(logits(base.eval(), ids), logits(make_base(), ids))
    assert torch.equal(logits(model, ids), before)


def test_further_modules_are_saved_with_it(make_base, perturb, tokens, tmp_path):
    model = get_slim_model(make_base(), small(modules_to_save=["lm_head"])).eval()
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(), tmp_path).eval()
    assert torch.equal(logits(loaded, tokens(2, 7)), logits(model, tokens(2, 7)))
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens(2, 7)), logits(make_base(), tokens(2, 7)))


def adapted(model):
    return {n.removeprefix("base_model.model.model.") for n, m in model.named_modules() if isinstance(m, SlimLayer)}


def test_which_layers(make_base):
    up_and_down = {f"layers.{i}.mlp.{p}_proj" for i in range(2) for p in ("gate", "up", "down")}
    for changes, expected in (
        ({}, up_and_down),
        ({"layers_to_transform": [1]}, {n for n in up_and_down if "layers.1" in n}),
        ({"layers_to_transform": 0}, {n for n in up_and_down if "layers.0" in n}),
        ({"exclude_modules": ["gate_proj"]}, {n for n in up_and_down if "gate" not in n}),
        ({"target_modules": ["q_proj"]}, {f"layers.{i}.self_attn.q_proj" for i in range(2)}),
        ({"target_modules": r".*0.*(up|down)_proj"}, {"layers.0.mlp.up_proj", "layers.0.mlp.down_proj"}),
    ):
        assert adapted(get_slim_model(make_base(), small(**changes))) == expected, changes


def test_what_it_does_not_fit_is_our_error(make_base):
    with pytest.raises(UsageError, match="LoraConfig"):
        get_slim_model(make_base(), LoraConfig())
    with pytest.raises(UnsupportedModelError, match="Linear"):
        get_slim_model(nn.Linear(2, 2), small())
    with pytest.raises(UnsupportedModelError, match="nothing"):
        get_slim_model(make_base(), small(target_modules=["nothing"]))
    with pytest.raises(UnsupportedModelError, match="Embedding"):
        get_slim_model(make_base(), small(target_modules=["embed_tokens"]))
    with pytest.raises(UnsupportedModelError, match=r"7.*blocks 0 to 1"):
        get_slim_model(make_base(), small(layers_to_transform=7))


# --- sharing a router ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sharing", "routers"), [("input", 2), ("layer", 3)])
def test_one_router_for_each_input_or_each_layer(sharing, routers, make, tokens, monkeypatch):
    model = make(router_sharing=sharing)
    assert sum(isinstance(m, Router) for m in model.modules()) == 2 * routers
    assert len(clusters_of(model)) == 2 * routers
    calls = []
    forward = Router.forward
    monkeypatch.setattr(Router, "forward", lambda self, *args: (calls.append(id(self)), forward(self, *args))[1])
    for mode in (True, False):
        calls.clear()
        model.train(mode)(input_ids=tokens(2, 7))
        assert len(calls) == len(set(calls)) == 2 * routers
    with torch.inference_mode():
        calls.clear()
        model(input_ids=tokens(2, 7))
        assert len(calls) == 2 * routers


class TwoInputs(nn.Module):
    """A feed-forward whose two projections have the same sizes and read different things."""

    def __init__(self, own):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = own.gate_proj, own.up_proj, own.down_proj

    def forward(self, x):
        return self.down_proj(self.gate_proj(x).sigmoid() * self.up_proj(x.roll(1, -1)))


def test_a_shared_router_routes_different_inputs_each_by_itself(make_base, perturb, tokens):
    base = make_base()
    for block in base.model.layers:
        block.mlp = TwoInputs(block.mlp)
    model = get_slim_model(base, small(num_experts=2)).train()
    perturb(model)
    for _ in range(2):
        model(input_ids=tokens(2, 9))
    model.eval()
    block = model.base_model.model.model.layers[0].mlp
    x = torch.randn(2, 5, 32)
    router, clusters = block.gate_proj.slim_router["default"], block.gate_proj.slim_clusters["default"]
    assert "default" not in block.up_proj.slim_router
    with torch.no_grad():
        for layer, read in ((block.gate_proj, x), (block.up_proj, x.roll(1, -1))):
            shares = router(read.view(-1, 32), clusters(read.view(-1, 32)))
            a, b = layer.slim_A["default"], layer.slim_B["default"]
            columns, rows = layer._masks("default", a)
            every = torch.einsum("ne,ero,eo,eri,ei,ni->no", shares, b, rows, a, columns, read.view(-1, 32))
            block(x)
            torch.testing.assert_close(layer(read), layer.base_layer(read) + every.view(2, 5, -1))


# --- what it computes --------------------------------------------------------------------------------------------


def test_a_token_sees_nothing_of_later_ones(make, tokens, arch):
    model, ids = make(arch), tokens(2, 9)
    changed = ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 7) % 50 + 3
    torch.testing.assert_close(logits(model, ids)[:, :6], logits(model, changed)[:, :6], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3"])
def test_padding_and_company_in_the_batch_change_nothing(arch, make, tokens):
    model, ids = make(arch), tokens(2, 6)
    alone = logits(model, ids[:1])
    for left, right in ((3, 0), (0, 3)):
        padded = nn.functional.pad(ids, (left, right))
        mask = nn.functional.pad(torch.ones_like(ids), (left, right))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            found = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(found[:1, left : left + 6], alone, atol=2e-5, rtol=1e-4)


def test_generation_with_and_without_a_cache(make, tokens, arch):
    model, ids = make(arch), tokens(2, 5)
    found = [
        model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, use_cache=use, pad_token_id=0)
        for use in (True, False)
    ]
    assert torch.equal(*found)
    assert found[0].shape == (2, 11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base(dtype, make, make_base, tokens, tmp_path):
    model = make(base=make_base().to(dtype))
    assert {c.centres.dtype for c in clusters_of(model)} == {torch.float32}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert all(c.batches == 2 for c in clusters_of(model))
    found = logits(model, tokens(2, 7))
    assert found.dtype == dtype
    assert found.isfinite().all()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base().to(dtype), tmp_path).eval()
    assert equal(of_adapter(loaded), of_adapter(model))
    assert torch.equal(logits(loaded, tokens(2, 7)), found)


def test_an_exception_within_a_pass_leaves_nothing_behind(make, tokens):
    ids = tokens(2, 9, seed=7)
    for error in (ZeroDivisionError, KeyboardInterrupt):
        model, untouched = make(), make()

        def stop(*_, error=error):
            raise error

        hook = model.base_model.model.model.layers[1].mlp.up_proj.base_layer.register_forward_hook(stop)
        model.train()
        with pytest.raises(error):
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
        hook.remove()
        if error is ZeroDivisionError:
            assert model.base_model.passing.entered == []
            assert model.base_model.passing.attention_mask is None
        states = []
        for one in (model, untouched):
            one.train()
            torch.manual_seed(1)
            found = [logits(one, ids), logits(one, ids)]
            states.append(of_adapter(one) | {"logits": torch.stack(found)})
            assert one.base_model.passing.entered == []
        assert equal(*states)
        copy.deepcopy(model)


def test_the_decoder_alone_is_a_pass_too(make, tokens):
    """As some trainers call it."""
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    states = []
    for whole in (True, False):
        model = make().train()
        for _ in range(2):
            (model if whole else model.get_base_model().model)(input_ids=ids, attention_mask=mask)
        states.append(of_adapter(model))
    assert equal(*states)


# --- the loss -----------------------------------------------------------------------------------------------------


def literal_l1(model):
    total = 0.0
    for layer in (m for m in model.modules() if isinstance(m, SlimLayer)):
        for a, b in zip(layer.slim_A["default"], layer.slim_B["default"], strict=True):
            total += b.abs().sum().item() / b.numel() + a.abs().sum().item() / a.numel()
    return 1e-2 * total


def test_the_l1_term_is_in_the_loss_of_training_only(make, tokens):
    model, ids = make(masking_ratio=0.0, yielding_strength=0.0), tokens(2, 9)
    plain = model(input_ids=ids, labels=ids).loss
    cross_entropy = nn.functional.cross_entropy(logits(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert plain.item() == pytest.approx(cross_entropy.item(), rel=1e-5)
    model.train()
    expected = plain.item() + literal_l1(model)
    assert model.base_model.l1_loss().item() == pytest.approx(literal_l1(model), rel=1e-5)
    assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(expected, rel=1e-5)
    loss, *rest = model(input_ids=ids, labels=ids, return_dict=False)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(rest[0], model(input_ids=ids).logits)
    assert model(input_ids=ids).loss is None
    with model.disable_adapter():
        assert model(input_ids=ids, labels=ids).loss.item() != pytest.approx(expected, rel=1e-4)
    without = make(masking_ratio=0.0, yielding_strength=0.0, l1_weight=0.0).train()
    assert without(input_ids=ids, labels=ids).loss.item() == pytest.approx(plain.item(), rel=1e-6)


def test_switched_off_there_is_no_l1_term(make, make_base, tokens):
    model, ids = make().train(), tokens(2, 9)
    with model.disable_adapter():
        found = model(input_ids=ids, labels=ids).loss
    assert torch.equal(found, make_base().train()(input_ids=ids, labels=ids).loss)


def test_its_gradient_is_that_of_the_mean_absolute_value(make, tokens):
    model = make()
    model.base_model.l1_loss().backward()
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    b = layer.slim_B["default"]
    torch.testing.assert_close(b.grad, 1e-2 * b.detach().sign() / b[0].numel())


def step_of(model, batches, accumulation, folder):
    """One optimizer step by transformers' Trainer: the logged loss and the gradient that was applied."""
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=len(batches) // accumulation,
        gradient_accumulation_steps=accumulation, learning_rate=1.0, optim="sgd", lr_scheduler_type="constant",
        max_grad_norm=0.0, logging_steps=1, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=batches)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(batches)
    trainer.train()
    moved = {n: before[n] - p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return trainer.state.log_history[0]["loss"], moved


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_accumulated_gradients_have_the_term_once(accumulation, make, tokens, tmp_path):
    ids = tokens(4, 9)
    labels = ids.clone()
    labels[0, :7] = labels[2, :4] = -100  # unequal numbers of labels in the batches
    rows = [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]
    settings = {"masking_ratio": 0.0, "yielding_strength": 0.0, "l1_weight": 0.5}
    model = make(steps=0, **settings)
    expected_model = copy.deepcopy(model).train()
    expected = expected_model(input_ids=ids, labels=labels).loss
    expected.backward()
    loss, moved = step_of(model, rows, accumulation, tmp_path)
    assert loss == pytest.approx(expected.item(), abs=2e-4)  # it is logged with four digits
    for name, parameter in expected_model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(moved[name], parameter.grad, rtol=1e-4, atol=1e-6)


# --- what a review found ------------------------------------------------------------------------------------------


def test_masks_drawn_in_inference_mode_do_for_a_backward_pass(make, tokens):
    model, ids = make(), tokens(2, 5)
    with torch.inference_mode():
        model(input_ids=ids)
    model(input_ids=ids, labels=ids).loss.backward()


def test_with_its_adapter_off_the_loss_has_no_l1_term(make, tokens):
    model, ids = make(l1_weight=1.0).train(), tokens(2, 7)
    assert model.base_model.l1_loss() > 0
    with model.disable_adapter():
        assert model.base_model.l1_loss() == 0
        alone = model(input_ids=ids, labels=ids).loss
    assert torch.equal(alone, model.unload()(input_ids=ids, labels=ids).loss)


def test_a_base_that_carries_slim_is_refused(make, make_base):
    base = make_base("llama")
    make(base=base)
    with pytest.raises(UsageError, match="unload"):
        get_slim_model(base, small(num_experts=2))


def test_nothing_is_kept_behind_a_pass(make, tokens):
    model = make().train()
    gate, up = (model.get_submodule(f"base_model.model.model.layers.0.mlp.{name}_proj") for name in ("gate", "up"))
    up.register_forward_pre_hook(lambda module, args: (args[0] + 1,))  # now the two do not read the same input
    ids = tokens(2, 7)
    model(input_ids=ids, labels=ids).loss.backward()
    assert gate.routings["default"] is up.routings["default"]
    assert gate.routings["default"]._kept is None
    copy.deepcopy(model)


def test_the_clusters_of_a_frozen_adapter_stay(make, make_base, tokens, tmp_path):
    make().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(make_base("llama"), tmp_path).train()
    before = of_adapter(model)
    for seed in range(3):
        model(input_ids=tokens(2, 9, seed=seed))
    assert equal(of_adapter(model), before)


def test_it_can_be_pickled(make, tokens):
    model = make()
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(again, tokens(2, 7)), logits(model, tokens(2, 7)))


def test_an_encoder_decoder_is_refused():
    config = T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4, decoder_start_token_id=0)
    with pytest.raises(UnsupportedModelError, match="no causal"):
        get_slim_model(T5ForConditionalGeneration(config), small())


def test_a_fingerprint_that_cannot_be_read_is_our_error(make, make_base, tmp_path):
    make().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_fingerprint": {"colour": "blue"}}))
    with pytest.raises(DamagedFileError, match="base_fingerprint"):
        PeftModel.from_pretrained(make_base("llama"), tmp_path)


def test_peft_reports_its_type(make):
    assert make().get_model_status().peft_types == {"default": "SLIM"}


@pytest.mark.parametrize(("changes", "share"), [({"num_identity_experts": 0}, 0.0), ({"yielding_strength": 1e6}, 1.0)])
def test_the_lens_reads_what_went_to_identity(make, tokens, changes, share):
    model = make(**changes)
    for clusters in clusters_of(model):  # there are none where nothing yields
        clusters.centres += 100  # every token is far
    with watch_identity(model) as seen:
        logits(model, tokens(1, 6))
    assert len(seen) == 4  # two routers in each of two layers
    for found in seen:
        torch.testing.assert_close(found, torch.full((6,), share))
    with torch.no_grad():
        logits(model, tokens(1, 6))
    assert len(seen) == 4
