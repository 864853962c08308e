"""SLIM written literally is SLIM, and the systems it is measured beside are what they are said to be."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import slim
from benchmarks.literal_slim import LiteralLayer, distance, literal_l1
from benchmarks.slim_systems import SlimSystems, build_slim, routed, routers, summary
from twinweave.slim.layer import SlimLayer

SHARED = ["--shape", "tiny", "--threads", "1", "--repeats", "1"]
IDS = torch.randint(3, 256, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=[0.0, 1.0], ids=["no yielding", "yielding"])
def systems(request: pytest.FixtureRequest) -> SlimSystems:
    return build_slim("tiny", "cpu", "float32", 0, request.param)


def clusters_of(systems: SlimSystems) -> list[Any]:
    return [routing.clusters for routing in {r: None for m in slim_layers(systems) for r in m.routings.values()}]


def slim_layers(systems: SlimSystems) -> list[SlimLayer]:
    return [m for m in systems.slim.modules() if isinstance(m, SlimLayer)]


def test_the_literal_model_answers_as_slim_does(systems: SlimSystems) -> None:
    for system in slim.SYSTEMS:
        systems.model(system).eval()
    with torch.no_grad():
        logits = {system: systems.model(system)(input_ids=IDS).logits for system in slim.SYSTEMS}
    torch.testing.assert_close(logits["slim"], logits["slim_literal"], atol=1e-5, rtol=1e-4)
    assert (logits["slim"] - logits["base"]).abs().max() > 100 * (logits["slim"] - logits["slim_literal"]).abs().max()


def test_the_literal_training_step_has_the_loss_and_the_gradients_of_slims(systems: SlimSystems) -> None:
    losses, gradients = {}, {}
    started = [copy.deepcopy(clusters.state_dict()) for clusters in clusters_of(systems)]
    for system in ("slim", "slim_literal"):
        for clusters, state in zip(clusters_of(systems), started, strict=True):
            clusters.load_state_dict(state)
            clusters._sums = None
        model = systems.model(system).train()
        torch.manual_seed(5)  # the same masks
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        losses[system] = loss + literal_l1(model) if system == "slim_literal" else loss
        losses[system].backward()
        gradients[system] = [
            parameter.grad.clone()
            for layer in slim_layers(systems)
            for part in (layer.slim_A, layer.slim_B, layer.slim_router)
            for parameter in part.parameters()
        ]
        systems.slim.zero_grad()
    torch.testing.assert_close(losses["slim"], losses["slim_literal"])
    assert len(gradients["slim"]) == 4 * (3 * 2 + 2)
    for one, other in zip(gradients["slim"], gradients["slim_literal"], strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * one.abs().max().item())


def test_a_literal_feed_forward_is_slims_on_any_input(systems: SlimSystems) -> None:
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(2)) * 3
    literal = next(m for m in systems.literal.modules() if isinstance(m, LiteralLayer))
    for training in (False, True):
        literal.train(training)
        torch.manual_seed(4)
        expected = literal.slim(x)
        torch.manual_seed(4)
        literal.routing._kept = None
        torch.testing.assert_close(literal(x), expected, atol=1e-5, rtol=1e-4)
    literal.eval()


def test_one_token_reads_the_experts_it_chose_only_and_gets_the_same(systems: SlimSystems) -> None:
    x = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(6), requires_grad=True)
    for layer in slim_layers(systems)[:3]:
        layer.eval()
        tokens = x if layer.in_features == 64 else torch.cat((x, x), -1)
        whole = layer(tokens)
        for token in range(40):
            alone = layer(tokens[:, token : token + 1])
            torch.testing.assert_close(alone, whole[:, token : token + 1], atol=1e-6, rtol=1e-4)
        chosen = layer.routings["default"](tokens[:, 0]).count_nonzero()
        (gradient,) = torch.autograd.grad(
            layer(tokens[:, :1]).sum(), layer.slim_A["default"], allow_unused=True, materialize_grads=True
        )
        assert gradient.flatten(1).any(1).sum() == chosen <= 2


def test_distances_and_sliding_of_the_clusters_are_the_same(systems: SlimSystems) -> None:
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(3))
    one, other = (copy.deepcopy(clusters_of(systems)[0]).train() for _ in range(2))
    one.forget()
    before = one.centres.clone()
    torch.testing.assert_close(one(x, gather=True), distance(x, other, training=True), rtol=1e-4, atol=1e-5)
    one.share()
    one.update()
    assert not torch.allclose(one.centres, before)
    torch.testing.assert_close(one.centres, other.centres, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(one.variances, other.variances, atol=1e-6, rtol=1e-4)


def test_lora_has_as_many_parameters_as_slims_experts(systems: SlimSystems) -> None:
    trained = {
        name: sum(p.numel() for n, p in systems.model(name).named_parameters() if p.requires_grad and "router" not in n)
        for name in ("lora", "slim")
    }
    assert trained["lora"] == trained["slim"] > 0
    embeddings = {model.get_input_embeddings().weight.data_ptr() for model in (systems.lora, systems.slim)}
    assert embeddings == {systems.base.get_input_embeddings().weight.data_ptr()}


def test_tokens_reach_lora_experts_and_yielding_sends_some_away() -> None:
    found = {}
    for yielding in (0.0, 1.0):
        systems = build_slim("tiny", "cpu", "float32", 0, yielding)
        with torch.no_grad(), routed(systems.slim) as weights:
            systems.slim(input_ids=IDS)
        assert len(weights) == len(routers(systems.slim)) == 8
        found[yielding] = summary(weights)
    assert 0.1 < found[0.0].to_identity < 0.3  # two experts of ten
    assert found[0.0].only_identity < 0.1
    assert found[1.0].to_identity != found[0.0].to_identity


def test_the_summary_counts_tokens_and_calls() -> None:
    found = summary([torch.tensor([0.0, 0.5]), torch.zeros(1), torch.ones(1)])
    assert (found.to_identity, found.only_identity) == (0.625, 0.5)
    assert found.skipped == pytest.approx(1 / 3)


def test_the_script_measures_every_kind_of_work(tmp_path: Path) -> None:
    flags = ["--size", "2x6", "--prompt", "1x4", "--batch", "1", "2", "--context", "4", "--new-tokens", "2"]
    result = slim.main([*SHARED, *flags, "--out", str(tmp_path / "slim.json")])
    assert result["complete"]
    assert [row["case"]["work"] for row in result["rows"]] == ["training", "decode", "decode", "prefill", "layers"]
    for row in result["rows"]:
        assert set(row["samples"]) == {"lora", "slim", "slim_literal"}
        assert set(row["ratios"]) == {"slim/lora", "slim_literal/slim"}
        assert all(row["case"][name].endswith("%") for name in ("to_identity", "only_identity", "skipped"))
