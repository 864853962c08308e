"""LwF, L2-SP, EWC and the rehearsed terms: against naive formulas, and what they must leave alone."""

from copy import deepcopy

import pytest
import torch
from peft import get_peft_model

from twinweave.baselines import adapter_rehearsal, ewc, l2_sp, lwf, replay
from twinweave.baselines.penalties import diagonal_fisher
from twinweave.baselines.weight_change import adapted_weights, weight_change
from twinweave.errors import RecipeError, UnsupportedModelError
from twinweave.imsm.adapters import adapter_layers
from twinweave.rehearsal import Materials

TERMS = {"lwf": lwf, "l2": l2_sp, "ewc": ewc, "rehearsal": adapter_rehearsal, "replay": replay}
CHANGES_NOTHING = ["lwf", "l2", "ewc", "rehearsal"]
LINEAR_KINDS = ["lora", "dora", "ia3", "adalora", "oft", "loha", "vera"]


@pytest.fixture
def adapted(make_base, make_peft, perturb):
    def make(kind="lora", arch="llama", trained=True, **changes):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model = get_peft_model(make_base(arch), make_peft(kind, arch, **changes)).eval()
        if trained:
            perturb(model)
        return model

    return make


def value(term, model, task, step=0):
    return term(model, task, model(**task), step)


def dense_changes(model):
    """Merged minus base weight of each adapted layer, by PEFT's own merging."""
    weights = {id(w): w.detach().clone() for _, w in adapted_weights(model)}
    merged = deepcopy(model)
    layers = [layer for layer, _ in adapted_weights(merged)]
    for layer in layers:
        layer.merge()
    after = [layer.get_base_layer().weight.detach() for layer in layers]
    return [a - w for a, w in zip(after, weights.values(), strict=True)], list(weights.values())


def state_of(model):
    flags = [layer._disable_adapters for layer in adapter_layers(model)]
    return flags, [m.training for m in model.modules()], {n: p.requires_grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["lora", "ia3", "oft", "adalora"])
@pytest.mark.parametrize("name", CHANGES_NOTHING)
def test_an_untouched_adapter_costs_nothing(name, kind, adapted, materials, task):
    model = adapted(kind, trained=False)
    cost = value(TERMS[name](model, materials()), model, task)
    assert abs(cost.item()) < 1e-8
    if kind == "lora":
        assert cost.item() == 0
    cost.backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            assert parameter.grad.abs().max() < 1e-5  # a number, and zero but for rounding


@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_the_change_of_weights_is_what_merging_adds(kind, adapted):
    model = adapted(kind)
    changes, _ = dense_changes(model)
    for (layer, weight), expected in zip(adapted_weights(model), changes, strict=True):
        assert expected.abs().max() > 1e-3
        assert weight_change(layer).shape == weight.shape
        assert torch.allclose(weight_change(layer), expected, atol=1e-5)


@pytest.mark.parametrize(("kind", "arch"), [*((kind, "llama") for kind in LINEAR_KINDS), ("lora", "gpt2")])
def test_l2_is_the_squared_change_in_units_of_the_weights(kind, arch, adapted, materials, task):
    model = adapted(kind, arch)
    changes, weights = dense_changes(model)
    expected = 2.5 * sum((c**2).sum() for c in changes) / sum((w**2).sum() for w in weights)
    found = value(l2_sp(model, Materials(0, 10, weight=2.5)), model, task)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def naive_fisher(base, rows, names):
    """Row by row with backward on a model of its own."""
    for parameter in base.parameters():
        parameter.requires_grad_(True)
    sums = dict.fromkeys(names, 0.0)
    for row in rows:
        base.zero_grad()
        logs = base(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        picked = [logs[t - 1, token] for t, token in enumerate(row["labels"]) if token != -100]
        torch.stack(picked).sum().backward()
        for name in names:
            sums[name] = sums[name] + base.get_parameter(name).grad.double() ** 2
    return {name: total / len(rows) for name, total in sums.items()}


@pytest.mark.parametrize(("kind", "arch"), [("lora", "llama"), ("lora", "gpt2"), ("ia3", "llama")])
def test_fisher_and_penalty_against_a_loop_over_rows(kind, arch, adapted, make_base, materials, task):
    model, given = adapted(kind, arch), materials(weight=3.0)
    model.train()  # GPT-2 has dropout: the Fisher is the base's, without it
    before, weights = state_of(model), [w for _, w in adapted_weights(model)]
    layers = [n for n, m in model.named_modules() if m in [layer for layer, _ in adapted_weights(model)]]
    names = [f"{n.removeprefix('base_model.model.')}.weight" for n in layers]
    naive = naive_fisher(make_base(arch), list(given.rehearsal.rows), names)
    for found, name in zip(diagonal_fisher(model, weights, given.rehearsal), names, strict=True):
        assert torch.allclose(found.double(), naive[name], rtol=1e-3, atol=1e-6)
    term = ewc(model, given)
    assert state_of(model) == before
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    changes, bases = dense_changes(model)
    mean = sum(f.sum() for f in naive.values()) / sum(f.numel() for f in naive.values())
    expected = sum((naive[n] / mean * c.double() ** 2).sum() for n, c in zip(names, changes, strict=True))
    expected = 3.0 * expected / sum((w.double() ** 2).sum() for w in bases)
    assert value(term, model, task).item() == pytest.approx(expected.item(), rel=1e-3)


def naive_kl(base, other):
    p, q = base.double().softmax(-1), other.double().softmax(-1)
    return (p * (p / q).log()).sum(-1).mean().item()


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_lwf_is_the_divergence_at_the_labels(arch, adapted, make_base, task):
    model = adapted(arch=arch)
    base = make_base(arch)
    base_logits = base(**task).logits.detach()
    model.train()  # the base's side is without dropout all the same
    outputs = model(**task)
    found = lwf(model, Materials(0, 10, weight=0.5))(model, task, outputs, 0)
    wanted = task["labels"][:, 1:] != -100
    expected = naive_kl(base_logits[:, :-1][wanted], outputs.logits[:, :-1][wanted])
    assert expected > 1e-3
    assert found.item() == pytest.approx(0.5 * expected, rel=1e-4)


def test_adapter_rehearsal_is_the_divergence_in_the_places_of_the_rows(adapted, make_base, materials, task):
    model, given = adapted(), materials(weight=2.0, every=2)
    batch = given.rehearsal.batch(4, 0)
    fields = {name: batch[name] for name in ("input_ids", "attention_mask")}
    wanted = batch["labels"][:, 1:] != -100
    sides = [m(**fields).logits[:, :-1][wanted].detach() for m in (make_base(), model)]
    term = adapter_rehearsal(model, given)
    assert value(term, model, task, step=4).item() == pytest.approx(2.0 * 2 * naive_kl(*sides), rel=1e-4)
    for make in (adapter_rehearsal, replay):
        assert make(model, given)(model, task, None, 3) is None  # no batch, no cost


@pytest.mark.parametrize("name", list(TERMS))
def test_gradient_reaches_the_adapter_and_nothing_else(name, adapted, materials, task):
    model = adapted()
    model.train()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = [p for p in model.parameters() if p.requires_grad]
    before = state_of(model)
    term, optimizer = TERMS[name](model, materials()), torch.optim.AdamW(trained, lr=1e-2)
    costs = []
    for step in range(8):
        optimizer.zero_grad()
        cost = value(term, model, task, step)
        cost.backward()
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
        optimizer.step()
        costs.append(cost.item())
    assert state_of(model) == before
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    if name in ("lwf", "l2", "ewc"):  # these have no batches: minimised, they fall
        assert costs[-1] < 0.9 * costs[0]


@pytest.mark.parametrize("name", list(TERMS))
def test_gradients_are_the_same_with_gradient_checkpointing(name, adapted, materials, task):
    found = []
    for checkpointed in (False, True):
        model = adapted()
        model.train()
        term = TERMS[name](model, materials())
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        outputs = model(**task)
        (outputs.loss + term(model, task, outputs, 0)).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[0][n], found[1][n], atol=1e-6) for n in found[0])


@pytest.mark.parametrize("name", ["lwf", "ewc", "rehearsal", "replay"])
def test_an_exception_leaves_the_adapter_as_it_was(name, adapted, materials, task):
    model, given = adapted(), materials()
    model.train()
    outputs, before = model(**task), state_of(model)

    def fail(*args):
        raise ZeroDivisionError

    hook = model.get_output_embeddings().register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        TERMS[name](model, given)(model, task, outputs, 0)
    hook.remove()
    assert state_of(model) == before


@pytest.mark.parametrize("make", [l2_sp, ewc])
@pytest.mark.parametrize("changes", [{"kind": "ln_tuning"}, {"modules_to_save": ["down_proj"]}])
def test_adapters_without_a_change_of_a_matrix_are_refused(make, changes, adapted, materials):
    with pytest.raises(UnsupportedModelError, match="peft_l2 and peft_ewc"):
        make(adapted(**changes), materials())


@pytest.mark.parametrize("make", [ewc, adapter_rehearsal, replay])
def test_general_text_is_asked_for(make, adapted):
    with pytest.raises(RecipeError, match="rehearsal is off"):
        make(adapted(), Materials(0, 10))
