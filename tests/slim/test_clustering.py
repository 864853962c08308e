"""The sliding clusters against their equations, computed literally."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import kmeans_plusplus
from torch.utils.checkpoint import checkpoint

from twinweave.slim import SlimConfig, get_slim_model
from twinweave.slim.clustering import SlidingClusters


def make_clusters(channels=4, clusters=3, **changes):
    return SlidingClusters(channels, SlimConfig(num_clusters=clusters, **changes)).train()


def started(channels, clusters, generator, **changes):
    """Clusters with values as of the middle of a training."""
    made = make_clusters(channels, clusters, **changes)
    made.centres.copy_(2 * torch.randn(clusters, channels, generator=generator))
    made.variances.copy_(torch.rand(clusters, channels, generator=generator) + 0.2)
    made.batches.fill_(5)
    return made


def take_in(clusters, x, attended=None):
    clusters(x, attended, gather=True)
    clusters.share()
    clusters.update()


def buffers(clusters):
    return {name: b.clone() for name, b in clusters.named_buffers()}


def same(found, expected):
    return all(torch.equal(found[name], expected[name]) for name in expected)


def literal_nearest(x, centres, variances, metric):
    """Index of each token's cluster by loops, and by how much the second nearest is farther."""
    chosen, gaps = [], []
    for token in x.double():
        apart = [(token - c.double()) ** 2 for c in centres]
        if metric == "mahalanobis":
            apart = [a / v.double() for a, v in zip(apart, variances, strict=True)]
        sums = torch.stack([a.sum() for a in apart])
        chosen.append(int(sums.argmin()))
        gaps.append(float(sums.sort().values[:2].diff()[0]) if len(sums) > 1 else 1.0)
    return torch.tensor(chosen), min(gaps)


DRAWN = {
    "seed": st.integers(0, 10_000),
    "channels": st.integers(1, 9),
    "count": st.integers(1, 5),
    "tokens": st.integers(1, 30),
    "metric": st.sampled_from(["euclidean", "mahalanobis"]),
    "distance": st.sampled_from(["max", "rms"]),
}


@given(**DRAWN)
@settings(max_examples=40, deadline=None)
def test_distance_and_update_are_the_equations(seed, channels, count, tokens, metric, distance):
    generator = torch.Generator().manual_seed(seed)
    clusters = started(channels, count, generator, cluster_metric=metric, distance=distance, cluster_rate=0.1)
    x = 3 * torch.randn(tokens, channels, generator=generator)
    attended = torch.rand(tokens, generator=generator) > 0.3
    before = buffers(clusters)
    nearest, gap = literal_nearest(x, before["centres"], before["variances"], metric)
    if gap < 1e-3:
        return  # a tie, which rounding decides
    found = clusters(x, attended, gather=True)
    scaled = (x - before["centres"][nearest]).abs() / before["variances"][nearest].sqrt()
    expected = (scaled.amax(1) if distance == "max" else scaled.square().mean(1).sqrt()) - 1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert same(buffers(clusters), before)  # not before `update`
    clusters.share()
    clusters.update()
    for n in range(count):
        members = x[(nearest == n) & attended]
        centre, variance = before["centres"][n], before["variances"][n]
        if len(members):
            variance = 0.9 * variance + 0.1 * ((members - centre) ** 2).mean(0)
            centre = 0.9 * centre + 0.1 * members.mean(0)
        torch.testing.assert_close(clusters.centres[n], centre, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(clusters.variances[n], variance, atol=1e-5, rtol=1e-4)
    assert clusters.batches == 6
    clusters.update()
    assert clusters.batches == 6  # each batch once


@given(seed=st.integers(0, 10_000), places=st.lists(st.integers(0, 12), max_size=8), first=st.booleans())
@settings(max_examples=40, deadline=None)
def test_padding_changes_nothing_wherever_it_is_and_whatever_it_holds(seed, places, first):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 4, generator=generator)
    rows = [(row, True) for row in x]
    for i, place in enumerate(places):
        rows.insert(place, (torch.full((4,), (1e4, float("nan"), float("inf"))[i % 3]), False))
    padded, attended = torch.stack([row for row, _ in rows]), torch.tensor([real for _, real in rows])
    results = []
    for tokens, mask in ((x, None), (padded, attended)):
        clusters = make_clusters() if first else started(4, 3, torch.Generator().manual_seed(seed))
        take_in(clusters, tokens, mask)
        results.append((buffers(clusters), clusters.eval()(tokens)))
    (expected, distances), (found, all_distances) = results
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
    torch.testing.assert_close(all_distances[attended], distances)


def test_it_starts_among_the_first_batchs_tokens():
    generator = torch.Generator().manual_seed(0)
    places = torch.tensor([[10.0, 0, 0, 0], [0, 10, 0, 0], [0, 0, 10, 0]])
    x = (places.repeat(8, 1) + 0.1 * torch.randn(24, 4, generator=generator)).contiguous()
    clusters = make_clusters()
    assert clusters(x, gather=True) is None  # nothing is far from clusters that do not exist
    clusters.share()
    clusters.update()
    assert clusters.batches == 1
    chosen, _ = kmeans_plusplus(x.numpy(), 3, random_state=0)
    groups = torch.cdist(x, torch.from_numpy(chosen)).argmin(1)
    centres = torch.stack([x[groups == n].mean(0) for n in range(3)])
    torch.testing.assert_close(clusters.centres, centres)
    pooled = (x - centres[groups]).square().mean(0)
    torch.testing.assert_close(clusters.variances, pooled.expand(3, -1), rtol=1e-3, atol=1e-6)
    found = torch.cdist(clusters.centres, places)
    assert found.min(0).values.max() < 0.2  # one for each of the groups
    assert found.min(1).values.max() < 0.2


@pytest.mark.parametrize("count", [255, 256, 300, 511, 512, 3000])
def test_a_large_first_batch_is_read_from_end_to_end(count):
    clusters = make_clusters(channels=2, clusters=2)
    x = torch.zeros(count, 2)
    x[-count // 3 :] = 50.0  # the last third is elsewhere
    x += 0.1 * torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
    take_in(clusters, x)
    assert sorted(round(float(v), -1) for v in clusters.centres[:, 0]) == [0, 50]


def test_too_few_tokens_wait_for_the_next_batch():
    clusters = make_clusters()
    for tokens in (0, 1, 3):
        take_in(clusters, torch.randn(tokens, 4))
        assert clusters.batches == 0
        assert clusters(torch.randn(2, 4)) is None
    take_in(clusters, torch.randn(6, 4), torch.tensor([True] + [False] * 5))
    assert clusters.batches == 0
    take_in(clusters, torch.randn(6, 4), torch.tensor([True] + [False] * 5))
    assert clusters.batches == 1


def test_more_clusters_than_are_kept_of_the_first_tokens_usually_start_too():
    clusters = SlidingClusters(4, SlimConfig(num_clusters=150))
    take_in(clusters, torch.randn(400, 4))
    assert clusters.batches == 1


def test_numbers_that_have_run_over_do_not_spoil_the_clusters():
    clusters = make_clusters()
    bad = torch.randn(20, 4)
    bad[3, 1] = torch.inf
    take_in(clusters, bad)
    assert clusters.batches == 1
    before = clusters.centres.clone()
    take_in(clusters, bad)
    assert torch.equal(clusters.centres, before)
    take_in(clusters, torch.randn(20, 4))
    assert clusters.centres.isfinite().all()
    assert not torch.equal(clusters.centres, before)


def test_sums_follow_the_clusters_to_another_device():
    clusters = make_clusters()
    take_in(clusters, torch.randn(20, 4))
    clusters(torch.randn(20, 4), gather=True)
    clusters.share()
    clusters.to("meta")
    clusters.update()
    assert clusters.centres.is_meta


def test_equal_tokens_first_and_others_later_give_numbers():
    clusters = make_clusters(distance="max")
    take_in(clusters, torch.ones(20, 4))
    found = clusters(torch.tensor([[1.0] * 4, [2.0] * 4, [1e4] * 4]), gather=True)
    assert found.isfinite().all()
    assert found[0] <= 0 < found[1] < found[2]


@pytest.mark.parametrize("distance", ["max", "rms"])
@pytest.mark.parametrize("metric", ["euclidean", "mahalanobis"])
def test_a_far_token_is_far(distance, metric):
    generator = torch.Generator().manual_seed(0)
    clusters = make_clusters(channels=64, distance=distance, cluster_metric=metric)
    for _ in range(3):
        take_in(clusters, torch.randn(200, 64, generator=generator))
    inside, outside = clusters(torch.randn(50, 64, generator=generator)), clusters(torch.full((1, 64), 30.0))
    assert outside > 20 > 6 > inside.max()
    if distance == "rms":
        assert inside.abs().max() < 1  # the maximum over channels is large inside the domain too
    else:
        assert inside.min() > 0.5


def test_evaluation_and_untracked_training_never_move_them():
    x = torch.randn(20, 4)
    for fresh in (make_clusters(), started(4, 3, torch.Generator().manual_seed(0))):
        before = buffers(fresh)
        fresh.eval()
        take_in(fresh, x)
        fresh.train()
        fresh.track_running_stats = False
        take_in(fresh, x)
        fresh.track_running_stats = True
        fresh(x)  # nor without being asked to gather
        fresh.share()
        fresh.update()
        assert same(buffers(fresh), before)
        take_in(fresh, x)
        assert not same(buffers(fresh), before)


def test_saving_takes_in_what_is_gathered_and_loading_forgets_it():
    clusters = started(4, 3, torch.Generator().manual_seed(0))
    other = started(4, 3, torch.Generator().manual_seed(1))
    x = torch.randn(20, 4)
    for made in (clusters, other):
        made(x, gather=True)
        made.share()
    saved = {name: b.clone() for name, b in clusters.state_dict().items()}
    assert saved["batches"] == 6
    other.load_state_dict(saved)
    other.update()
    assert same(buffers(other), saved)
    other(x, gather=True)
    other.load_state_dict(make_clusters().state_dict())  # of a model that was never trained
    assert other(x) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_they_stay_in_single_precision(dtype):
    clusters = started(4, 3, torch.Generator().manual_seed(0))
    before = buffers(clusters)
    clusters.to(dtype)
    assert same(buffers(clusters), before)
    assert clusters.centres.dtype == clusters.variances.dtype == torch.float32
    clusters.to("meta")
    assert clusters.centres.device.type == "meta"
    assert clusters.centres.dtype == torch.float32


def test_mixed_precision_does_not_reach_them():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 4, generator=generator)
    results = []
    for enabled in (False, True):
        clusters = make_clusters()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            take_in(clusters, x)
            take_in(clusters, x + 0.3)
            results.append((buffers(clusters), clusters(x)))
    assert same(results[1][0], results[0][0])
    assert torch.equal(results[1][1], results[0][1])


# --- in a model ------------------------------------------------------------------------------------------------------


def trained(make_base, tokens, how, steps=3):
    """Losses, gradients and clusters of some steps of training."""
    torch.manual_seed(3)
    model = get_slim_model(make_base(), SlimConfig(r=2, num_experts=3, num_clusters=2, cluster_rate=0.2))
    if how is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": how})
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses, grads = [], []
    for step in range(steps):
        ids = tokens(2, 7, seed=step)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.where(mask.bool(), -100)).loss
        loss.backward()
        losses.append(loss.item())
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
        optimizer.step()
        optimizer.zero_grad()
    state = {n: b.clone() for n, b in model.state_dict().items() if "slim_" in n}
    return losses, grads, state


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant, make_base, tokens, monkeypatch):
    losses, grads, state = trained(make_base, tokens, None)
    calls = []
    forward = SlidingClusters.forward
    monkeypatch.setattr(SlidingClusters, "forward", lambda *a, **k: (calls.append(1), forward(*a, **k))[1])
    found = trained(make_base, tokens, reentrant)
    assert len(calls) == 2 * 3 * 4  # each of the four twice a step: it does run again
    assert found[0] == pytest.approx(losses, rel=1e-6)
    assert {int(b) for n, b in state.items() if n.endswith("batches")} == {3}
    for expected, got in zip([*grads, state], [*found[1], found[2]], strict=True):
        assert got.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-7)


def test_a_repeated_forward_finds_the_clusters_of_the_first_time(make_base, tokens):
    """Also where a pass that is no part of the training comes before the backward pass."""
    model = get_slim_model(make_base(), SlimConfig(r=2, num_clusters=2, cluster_rate=0.5)).train()
    for seed in range(2):
        model(input_ids=tokens(2, 7, seed=seed))
    clusters = [m for m in model.modules() if isinstance(m, SlidingClusters)]
    model(input_ids=tokens(2, 7, seed=3))
    before = [buffers(c) for c in clusters]
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=tokens(2, 7, seed=4))
    layer = model.base_model.model.model.layers[0].mlp
    checkpoint(layer, torch.randn(2, 7, 32, requires_grad=True), use_reentrant=False).sum().backward()
    assert all(same(buffers(c), b) for c, b in zip(clusters, before, strict=True))
    assert all(c.batches == 2 for c in clusters)
    model(input_ids=tokens(2, 7, seed=5))
    assert all(c.batches == 3 for c in clusters)
    model.state_dict()
    assert all(c.batches == 4 for c in clusters)


def test_padding_of_a_batch_is_not_taken_in(make_base, tokens):
    ids = tokens(2, 6)
    states = []
    for left, right in ((0, 0), (2, 0), (0, 3)):
        torch.manual_seed(3)
        model = get_slim_model(make_base(), SlimConfig(r=2, num_clusters=2)).train()
        padded = torch.nn.functional.pad(ids, (left, right))
        mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        for _ in range(2):
            model(input_ids=padded, attention_mask=mask, position_ids=positions)
        states.append({n: b for n, b in model.state_dict().items() if "slim_clusters" in n})
    for state in states[1:]:
        for name, tensor in states[0].items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-5)
