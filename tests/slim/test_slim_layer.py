"""A layer against a loop over tokens and experts that builds each masked product B'A' as it is written."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from twinweave.errors import UnsupportedModelError
from twinweave.slim import SlimConfig
from twinweave.slim.layer import SlimLayer
from twinweave.slim.router import Passing

NAME = "default"


def make_layer(base=None, name="model.layers.0.mlp.down_proj", dtype=torch.float64, **changes):
    """A layer as after some training, in evaluation mode."""
    torch.manual_seed(0)
    config = SlimConfig(**{"r": 2, "num_experts": 3, "router_init_std": 1.0, "num_clusters": 2} | changes)
    layer = SlimLayer(nn.Linear(6, 5) if base is None else base, name, NAME)
    layer.update_layer(NAME, config, Passing())
    layer.to(dtype)
    with torch.no_grad():
        layer.slim_B[NAME].normal_()
    if config.yields:
        layer.slim_clusters[NAME].batches.fill_(1)
    return layer.eval()


def masks_of(layer):
    masks = layer._masks(NAME, layer.slim_A[NAME])
    a = layer.slim_A[NAME].detach()
    return masks if masks is not None else (torch.ones_like(a[:, 0]), torch.ones_like(layer.slim_B[NAME][:, 0]))


def literal(layer, x, masks):
    """The layer's output by the formula: x [N, C_in] -> [N, C_out]."""
    columns, rows = masks
    a, b = layer.slim_A[NAME], layer.slim_B[NAME]
    shares = layer.routings[NAME](x)
    outputs = []
    for token, share in zip(x, shares, strict=True):
        output = layer.base_layer(token)
        for i in range(len(a)):
            product = (b[i].T @ a[i]) * torch.outer(rows[i], columns[i])  # [C_out, C_in]
            output = output + share[i] * (product @ token)
        outputs.append(output)
    return torch.stack(outputs)


@given(
    seed=st.integers(0, 10_000),
    sizes=st.tuples(st.integers(1, 8), st.integers(2, 8)),
    experts=st.integers(1, 5),
    identities=st.integers(0, 2),
    rank=st.integers(1, 4),
    ratio=st.sampled_from([0.0, 0.5, 0.9]),
    training=st.booleans(),
    rescale=st.booleans(),
    shape=st.sampled_from([(1,), (7,), (2, 3), (1, 1), (2, 2, 2)]),
)
@settings(max_examples=50, deadline=None)
def test_output_and_gradients_are_those_of_the_loop(
    seed, sizes, experts, identities, rank, ratio, training, rescale, shape
):
    layer = make_layer(
        nn.Linear(*sizes), num_experts=experts, num_identity_experts=identities, r=rank, masking_ratio=ratio,
        rescale_merging=rescale, top_k=min(2, experts + identities),
    ).train(training)  # fmt: skip
    torch.manual_seed(seed)
    x = torch.randn(*shape, sizes[0], dtype=torch.float64, requires_grad=True)
    weights = {n: p for n, p in layer.named_parameters() if "slim_" in n}
    into = torch.randn(*shape, sizes[1], dtype=torch.float64)
    results = []
    for run in (
        lambda: layer(x),
        lambda: literal(layer, x.reshape(-1, sizes[0]), masks_of(layer)).view(*shape, sizes[1]),
    ):
        torch.manual_seed(seed)  # of the masks
        output = run()
        grads = torch.autograd.grad((output * into).sum(), [x, *weights.values()], allow_unused=True)
        results.append([output, *(torch.zeros(()) if g is None else g for g in grads)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected.expand_as(found).to(found), atol=1e-9, rtol=1e-7)
    assert results[0][0].shape == into.shape


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
def test_the_kept_fraction_of_the_product_averages_one_minus_p(ratio):
    layer = make_layer(nn.Linear(40, 30), masking_ratio=ratio).train()
    kept, axes = [], []
    for _ in range(200):
        columns, rows = masks_of(layer)
        assert set(columns.unique().tolist()) <= {0.0, 1.0}
        kept.append(torch.einsum("ei,eo->eio", columns, rows).mean())
        axes.append(columns.mean())
    assert float(torch.stack(kept).mean()) == pytest.approx(1 - ratio, abs=0.015)
    assert float(torch.stack(axes).mean()) == pytest.approx(math.sqrt(1 - ratio), abs=0.015)


def test_rescaled_masks_keep_the_product_on_average():
    layer = make_layer(nn.Linear(40, 30), rescale_merging=True).train()
    products = [torch.einsum("ei,eo->eio", *masks_of(layer)) for _ in range(200)]
    assert float(torch.stack(products).mean()) == pytest.approx(1, abs=0.03)
    nonzero = products[0][products[0] > 0]
    assert torch.allclose(nonzero, torch.full_like(nonzero, 2.0))  # 1 / (1 - p)


def test_training_draws_new_masks_and_each_expert_has_its_own():
    layer = make_layer(nn.Linear(40, 30)).train()
    (columns, rows), (others, _) = masks_of(layer), masks_of(layer)
    assert not torch.equal(columns, others)
    assert not torch.equal(columns[0], columns[1])
    assert not torch.equal(rows[0], rows[1])


def test_masks_of_inference_are_fixed_by_seed_and_layer():
    def drawn(**changes):
        return torch.cat(masks_of(make_layer(nn.Linear(40, 30), **changes)), 1)

    first = drawn()
    torch.manual_seed(99)
    assert torch.equal(drawn(), first)
    assert not torch.equal(drawn(name="model.layers.1.mlp.down_proj"), first)
    assert not torch.equal(drawn(mask_seed=1), first)
    layer = make_layer(nn.Linear(40, 30))
    x = torch.randn(3, 40, dtype=torch.float64)
    expected = layer(x)
    layer.train()(x)
    assert torch.equal(layer.eval()(x), expected)
    state = torch.get_rng_state()
    make_layer(nn.Linear(40, 30))  # seeds by itself
    torch.set_rng_state(state)
    layer._drawn.clear()
    assert torch.equal(layer(x), expected)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's numbers are used up


def test_masks_follow_the_precision_of_the_weights():
    layer = make_layer(nn.Linear(40, 30))
    before = masks_of(layer)
    layer.float()
    after = masks_of(layer)
    assert {m.dtype for m in after} == {torch.float32}
    assert all(torch.equal(a.double(), b) for a, b in zip(after, before, strict=True))
    assert layer(torch.randn(2, 40)).dtype == torch.float32


def test_no_merging():
    for changes in ({"masking_ratio": 0.0}, {"merging_at_inference": False}):
        layer = make_layer(**changes)
        assert layer._masks(NAME, layer.slim_A[NAME]) is None
    layer.train()
    assert layer._masks(NAME, layer.slim_A[NAME]) is not None


@pytest.mark.parametrize("training", [False, True])
def test_without_b_the_output_is_the_base_layers(training):
    layer = make_layer(dtype=torch.float32).train(training)
    with torch.no_grad():
        layer.slim_B[NAME].zero_()
    x = torch.randn(4, 3, 6)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_what_is_all_identity_is_the_base_and_costs_no_product():
    layer = make_layer(dtype=torch.float32, router_init_std=0.02)
    near, far = torch.randn(4, 6), torch.full((4, 6), 1e4)
    assert not torch.equal(layer(near), layer.base_layer(near))
    layer.train()
    assert torch.equal(layer(far), layer.base_layer(far))
    layer.eval()
    with torch.no_grad():
        layer.slim_A[NAME].fill_(torch.nan)
    assert torch.equal(layer(far), layer.base_layer(far))
    assert layer(near).isnan().any()
    assert layer(torch.cat((near, far))).isnan().any()


def test_training_gives_every_parameter_a_gradient_even_so():
    layer = make_layer(dtype=torch.float32, router_init_std=0.02).train()
    layer(torch.full((4, 6), 1e4)).sum().backward()
    assert all(p.grad is not None for n, p in layer.named_parameters() if "slim_" in n)


def test_a_conv1d():
    torch.manual_seed(0)
    layer = make_layer(Conv1D(5, 6))
    assert (layer.in_features, layer.out_features) == (6, 5)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    expected = literal(layer, x.view(-1, 6), masks_of(layer)).view(2, 4, 5)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (6,)])
def test_inputs_of_unusual_shapes(shape, training):
    """No token (an expert that nothing was sent to), and one without a batch."""
    layer = make_layer().train(training)
    layer.routings[NAME].passing.entered = [layer]
    x = torch.randn(shape, dtype=torch.float64)
    output = layer(x)
    assert output.shape == (*shape[:-1], 5)
    if training:
        output.sum().backward()
        assert layer.slim_A[NAME].grad is not None


def test_an_input_that_is_not_contiguous():
    layer = make_layer()
    x = torch.randn(4, 6, 3, dtype=torch.float64).transpose(1, 2)
    assert torch.equal(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_half_precision_base_keeps_its_precision_and_the_adapter_its_own(autocast):
    torch.manual_seed(0)
    layer = make_layer(nn.Linear(6, 5).bfloat16(), dtype=torch.float32)
    layer.base_layer.bfloat16()
    reference = make_layer(nn.Linear(6, 5), dtype=torch.float32)
    reference.load_state_dict(layer.state_dict())
    x = torch.randn(7, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), reference(x.float()), atol=0.1, rtol=0.05)
    assert layer.slim_clusters[NAME].centres.dtype == torch.float32


def test_a_half_precision_base_does_not_halve_what_is_made_for_it():
    layer = SlimLayer(nn.Linear(6, 5).bfloat16(), "mlp", NAME)
    layer.update_layer(NAME, SlimConfig(), Passing())
    assert layer.slim_clusters[NAME].centres.dtype == torch.float32


def test_the_l1_term_is_the_formula():
    layer = make_layer()
    a, b = layer.slim_A[NAME], layer.slim_B[NAME]
    expected = sum(b[i].abs().sum() / (2 * 5) + a[i].abs().sum() / (2 * 6) for i in range(3))
    torch.testing.assert_close(layer.l1_norm(NAME), expected)


def test_it_starts_as_lora_does():
    layer = SlimLayer(nn.Linear(16, 8), "mlp", NAME)
    layer.update_layer(NAME, SlimConfig(r=4), Passing())
    assert not layer.slim_B[NAME].any()
    a = layer.slim_A[NAME].detach()
    assert a.shape == (8, 4, 16)
    assert layer.slim_B[NAME].shape == (8, 4, 8)
    assert 0.9 * 0.25 < a.abs().max() <= 0.25  # Kaiming-uniform with a = √5: 1 / √C_in
    assert float(a.std()) == pytest.approx(0.25 / math.sqrt(3), rel=0.1)
    router = layer.slim_router[NAME].weight
    assert router.shape == (10, 16)
    assert float(router.detach().std()) == pytest.approx(0.02, rel=0.2)


def test_what_cannot_be_done_is_our_error():
    with pytest.raises(UnsupportedModelError, match="Embedding"):
        SlimLayer(nn.Embedding(4, 4), "embed", NAME)
    with pytest.raises(UnsupportedModelError, match="cannot be merged"):
        make_layer().merge()
