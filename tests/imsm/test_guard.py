"""The domain guard: nothing changes for queries like those of the training data, others go to the original memory."""

import copy
import json
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from twinweave import GuardSettings, IMSMModel, fit_guard
from twinweave.errors import DamagedFileError, DataError, UsageError
from twinweave.imsm.fitting import _border
from twinweave.imsm.guard import DomainGuard

PROMPT, LENGTH = 6, 10
NEAR, FAR = 3, 33  # the lowest token of the training prompts, of 6 in a row, and of strange ones
FUSIONS = ("query_gate", "gate", "average", "enhanced")


def batch_of(rows, seed, lowest=NEAR):
    """Prompts of 6 and answers of 4 tokens."""
    ids = torch.randint(lowest, lowest + 6, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def guarded(model, **changes):
    """The model with a guard, calibrated on 200 rows so that `fresh` ones are within its border or not by chance."""
    options = {"directions": 24} | changes
    fit_guard(
        model,
        [batch_of(50, seed) for seed in range(8)],
        [batch_of(50, seed) for seed in range(100, 104)],
        GuardSettings(**options),
    )
    return model


@pytest.fixture(scope="module")
def models(make_imsm):
    """One guarded model of each fusion, and one per token; the tests only read them."""
    models = {fusion: guarded(make_imsm(fusion=fusion)) for fusion in FUSIONS}
    return models | {"token": guarded(make_imsm(), per="token")}


@pytest.fixture(params=[*FUSIONS, "token"])
def model(request, models):
    model = models[request.param]
    yield model
    model.plan = "auto"


@torch.no_grad()
def strangeness_of(model, batch):
    """At every label of the batch, [N]."""
    frozen = model.frozen_states(**batch)
    if model.guard.reads_query:
        return model.guard.strangeness(model.guard.project(frozen.queries)).flatten().repeat_interleave(LENGTH - PROMPT)
    return model.guard.strangeness(model.guard.project(frozen.states)).flatten()


@torch.no_grad()
def both(model, batch, **options):
    """What the model gives with its guard and without."""
    with_guard = model(**batch, output_gate=True, **options)
    guard, model.guard = model.guard, None
    try:
        return with_guard, model(**batch, output_gate=True, **options)
    finally:
        model.guard = guard


def at_labels(values):
    return values[:, PROMPT - 1 : LENGTH - 1].flatten(0, 1)


def strange(model):
    """The model's guard, so far from everything that only the base answers."""
    guard = copy.deepcopy(model.guard)
    guard.centres += 1e4
    return guard


# --- what it does -------------------------------------------------------------------------------------------------


def test_nothing_changes_to_the_bit_within_the_border_and_the_gate_opens_beyond(model):
    for lowest in (NEAR, FAR):
        batch = batch_of(40, 7, lowest)
        strangeness, (found, plain) = strangeness_of(model, batch), both(model, batch)
        inside = strangeness == 0
        assert torch.equal(at_labels(found.logits)[inside], at_labels(plain.logits)[inside])
        assert torch.equal(at_labels(found.gate)[inside], at_labels(plain.gate)[inside])
        opened, before = at_labels(found.gate)[~inside], at_labels(plain.gate)[~inside]
        assert (opened >= before).all()
        expected = before + (1 - before) * strangeness[~inside].unsqueeze(-1)
        torch.testing.assert_close(opened, expected, atol=1e-5, rtol=1e-5)
        share = inside.float().mean()
        assert share > 0.9 if lowest == NEAR else share < 0.2, share


@torch.no_grad()
def test_far_away_the_answer_is_the_base_s_own(model):
    batch, guard = batch_of(4, 7), model.guard
    with model.use_memory("original"):
        base = model(**batch).logits
    model.guard = strange(model)
    try:
        strangeness = strangeness_of(model, batch)
        assert (strangeness == 1).all()
        assert torch.equal(at_labels(model(**batch).logits), at_labels(base))
    finally:
        model.guard = guard


@pytest.mark.parametrize("retention", [float("inf"), float("-inf")])
def test_an_infinite_retention_still_selects_one_memory(model, retention):
    guard, before = model.guard, model.retention
    model.guard, model.retention = strange(model), retention
    try:
        batch = batch_of(3, 7, FAR)
        with torch.no_grad():
            found = model(**batch).logits
            with model.use_memory("original" if retention > 0 else "enhanced"):
                assert torch.equal(found, model(**batch).logits)
    finally:
        model.guard, model.retention = guard, before


def test_training_and_rehearsal_do_without(models):
    model, batch = models["query_gate"], batch_of(6, 7, FAR)
    assert strangeness_of(model, batch).max() > 0
    model.train()
    try:
        found, plain = both(model, batch)
        assert torch.equal(found.logits, plain.logits)
        found, plain = both(model, batch, logits_at_labels=True)
        assert torch.equal(found.loss, plain.loss)
    finally:
        model.eval()
    found, plain = both(model, batch, rehearse="gate")
    assert torch.equal(found.loss, plain.loss)
    assert not any(name.startswith("guard.") for name, _ in model.named_parameters())


@pytest.mark.parametrize("memory", ["original", "enhanced"])
def test_one_memory_alone_has_no_guard(model, memory):
    with model.use_memory(memory):
        found, plain = both(model, batch_of(3, 7, FAR))
    assert torch.equal(found.logits, plain.logits)


# --- every way of running it ---------------------------------------------------------------------------------------


def test_logits_at_labels_equal_the_full_forward(model):
    batch = batch_of(12, 7, FAR)
    assert strangeness_of(model, batch).max() > 0
    with torch.no_grad():
        full = model(**batch, output_gate=True)
        for frozen in (None, model.frozen_states(**batch)):
            found = model(**batch, logits_at_labels=True, frozen=frozen, output_gate=True)
            torch.testing.assert_close(found.logits[0], at_labels(full.logits), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(found.gate[0], at_labels(full.gate), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(found.loss, full.loss)


@given(seed=st.integers(0, 1000), changed=st.integers(1, LENGTH - 1), labelled=st.booleans(), lowest=st.integers(3, 33))
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("name", ["query_gate", "average", "token"])
def test_no_logit_depends_on_a_later_token(models, name, seed, changed, labelled, lowest):
    batch = batch_of(2, seed, lowest)
    if not labelled:
        del batch["labels"]
    other = batch["input_ids"].clone()
    other[:, changed] = (other[:, changed] - 3 + 29) % 58 + 3
    with torch.no_grad():
        before, after = models[name](**batch).logits, models[name](**batch | {"input_ids": other}).logits
    torch.testing.assert_close(before[:, :changed], after[:, :changed], atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, side):
    batch = batch_of(8, 7, FAR)
    pads = (3, 0) if side == "left" else (0, 3)

    def padded(values, fill):
        return torch.nn.functional.pad(values, pads, value=fill)

    wide = {
        "input_ids": padded(batch["input_ids"], 0),
        "attention_mask": padded(batch["attention_mask"], 0),
        "labels": padded(batch["labels"], -100),
    }
    wide["position_ids"] = (wide["attention_mask"].cumsum(1) - 1).clamp(min=0)
    columns = slice(pads[0], pads[0] + LENGTH)
    with torch.no_grad():
        found = model(**wide).logits[:, columns]
        torch.testing.assert_close(found, model(**batch).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("plan", ["stacked", "two_pass"])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}, {"num_beams": 2, "num_return_sequences": 2}], ids=str
)
def test_generation_with_a_cache_equals_generation_without(model, plan, options):
    ids = torch.cat([batch_of(2, 7, lowest)["input_ids"] for lowest in (NEAR, FAR)])
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    ids = ids.where(mask.bool(), 0)
    common = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "no_repeat_ngram_size": 1}
    model.plan = plan
    found = model.generate(input_ids=ids, **common, **options)
    model.plan = "two_pass"
    uncached = {name: value for name, value in options.items() if name != "prefill_chunk_size"}
    assert torch.equal(found, model.generate(input_ids=ids, **common, **uncached, use_cache=False))


def test_compiled(models):
    model, ids = models["query_gate"], batch_of(3, 7, FAR)["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    expected = model.generate(input_ids=ids, **options)
    base = model.get_base_model()
    plain = base.forward
    base.forward = torch.compile(plain, backend="eager")
    try:
        assert torch.equal(model.generate(input_ids=ids, **options), expected)
    finally:
        base.forward = plain
        torch._dynamo.reset()


@pytest.mark.parametrize("plan", ["stacked", "two_pass"])
def test_a_query_that_is_over_is_judged_once(models, plan, monkeypatch):
    model, ids = models["query_gate"], batch_of(2, 7, NEAR)["input_ids"]
    judged, strangeness = [], model.guard.strangeness
    monkeypatch.setattr(model.guard, "strangeness", lambda features: judged.append(features) or strangeness(features))
    model.plan = plan
    model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    assert [tuple(features.shape[:2]) for features in judged] == [ids.shape, (len(ids), 1)]  # the prompt, the answer
    judged.clear()
    model.generate(input_ids=ids.flip(1), max_new_tokens=6, do_sample=False)
    assert len(judged) == 2  # another query, judged anew


def test_the_guard_decides_what_is_generated(models):
    """Otherwise the test above could not fail."""
    model, ids = models["query_gate"], batch_of(20, 7, FAR)["input_ids"][:, :PROMPT]
    found = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    guard, model.guard = model.guard, None
    try:
        assert not torch.equal(found, model.generate(input_ids=ids, max_new_tokens=6, do_sample=False))
    finally:
        model.guard = guard


@torch.no_grad()
def test_chunks_and_plans_give_the_same_gates(model):
    batch = batch_of(4, 7, FAR)
    mask = batch["attention_mask"].clone()
    mask[0, :3] = 0
    ids = batch["input_ids"].where(mask.bool(), 0)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = {}
    for plan in ("two_pass", "stacked"):
        for chunks in (((0, LENGTH),), ((0, 4), (4, 5), (5, LENGTH))):
            model.plan, cache, parts = plan, DynamicCache(config=model.get_base_model().config), []
            for start, end in chunks:
                out = model(
                    input_ids=ids[:, start:end],
                    attention_mask=mask[:, :end],
                    position_ids=positions[:, start:end],
                    past_key_values=cache,
                    use_cache=True,
                    output_gate=True,
                )
                cache = out.past_key_values
                parts.append(out.gate)
            found[plan, len(chunks)] = torch.cat(parts, dim=1)[mask.bool()]
    first = found.pop(("two_pass", 1))
    for other in found.values():
        torch.testing.assert_close(other, first, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_cache_is_not_continued_with_another_guard(models):
    model, ids = models["query_gate"], batch_of(1, 7)["input_ids"]
    cache = model(input_ids=ids, use_cache=True).past_key_values
    guard, model.guard = model.guard, None
    try:
        with pytest.raises(UsageError, match="begun with another domain guard"):
            model(input_ids=ids[:, :1], past_key_values=cache)
    finally:
        model.guard = guard


# --- fitting ------------------------------------------------------------------------------------------------------


@given(
    distances=st.lists(st.floats(0, 1e4, width=32), min_size=1, max_size=400),
    affected=st.floats(0.005, 0.5),
)
@settings(max_examples=200, deadline=None)
def test_at_most_the_stated_share_of_the_calibration_queries_is_affected(distances, affected):
    distances = np.array(distances)
    threshold, spread = _border(distances, affected).tolist()
    assert (distances > threshold).mean() <= affected
    assert spread > 0
    if len(distances) < 1 / affected - 1:
        assert threshold >= distances.max()


def test_fresh_queries_are_affected_as_seldom_as_was_asked(make_imsm):
    for affected in (0.01, 0.2):
        model = guarded(make_imsm(), affected=affected)
        share = torch.cat([strangeness_of(model, batch_of(100, 500 + i)) > 0 for i in range(10)]).float().mean().item()
        assert share < 2.5 * affected + 0.01, share
        assert affected < 0.1 or share > 0.08  # and not because nothing ever is


def test_the_distance_is_mahalanobis(make_imsm):
    """With one cluster and as many directions as channels, it is the textbook's distance, whatever the directions."""
    model = make_imsm()
    train = [batch_of(100, seed) for seed in range(30)]
    fit_guard(model, train, [batch_of(150, 100)], GuardSettings(clusters=1, directions=32))
    queries = torch.cat([model.frozen_states(**batch).queries for batch in train]).double()
    probe = model.frozen_states(**batch_of(20, 7, FAR)).queries.double()
    centred = probe - queries.mean(0)
    expected = (centred @ torch.linalg.inv(torch.cov(queries.T)) * centred).sum(1).sqrt()
    found = model.guard.distance(model.guard.project(probe.float()))
    torch.testing.assert_close(found, expected.float(), rtol=0.05, atol=0)  # it is shrunk a little


def test_clusters_are_found(make_imsm):
    """Two kinds of training queries far apart: what lies between them is strange to two clusters, not to one."""
    model, between = make_imsm(), {}
    kinds = [batch_of(60, seed, lowest) for seed in range(6) for lowest in (3, 41)]
    for clusters in (1, 2):
        guard = fit_guard(model, kinds, kinds[:4], GuardSettings(clusters=clusters, directions=8))
        assert len(guard.centres) == clusters
        middle = guard.project(torch.cat([model.frozen_states(**batch).queries for batch in kinds]).mean(0))
        between[clusters] = guard.distance(middle) / guard.border[0]
    assert between[2] > 2 * between[1]


def test_the_same_rows_give_the_same_guard_and_leave_the_random_state_alone(make_imsm):
    torch.manual_seed(3)
    np.random.seed(3)
    first = guarded(make_imsm()).guard.state_dict()
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    again = guarded(make_imsm(trained=False)).guard.state_dict()  # nor do adapter and gate matter
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
    guard_only = make_imsm()
    torch.set_rng_state(state[0])
    guarded(guard_only)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])


def test_few_rows(make_imsm):
    model = make_imsm()
    with pytest.raises(DataError, match="no query"):
        fit_guard(model, [], [batch_of(4, 1)])
    assert model.guard is None
    for train, validation in (([batch_of(1, 1)], []), ([batch_of(3, 1)], [batch_of(1, 2)]), ([batch_of(40, 1)], [])):
        with pytest.warns(UserWarning, match="to calibrate on"):
            guard = fit_guard(model, train, validation)  # fewer rows than directions
        assert all(tensor.isfinite().all() for tensor in guard.state_dict().values())
        assert strangeness_of(model, batch_of(30, 9, FAR)).isfinite().all()
    assert strangeness_of(model, batch_of(1, 1)).max() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # training queries help validation out
        fit_guard(model, [batch_of(500, 1)], [batch_of(4, 2)])


def test_one_prompt_for_all_is_a_domain_too(make_imsm):
    model, batch = make_imsm(), batch_of(1, 1)
    same = {name: tensor.expand(150, -1) for name, tensor in batch.items()}
    fit_guard(model, [same], [same])
    assert strangeness_of(model, same).max() == 0
    assert strangeness_of(model, batch).max() == 0
    assert strangeness_of(model, batch_of(3, 2)).min() > 0.99


def test_a_model_in_half_precision(make_base, make_imsm):
    model = guarded(make_imsm(base=make_base().bfloat16()))
    assert model.guard.map.dtype == torch.float32
    found, plain = both(model, batch_of(40, 7))
    assert found.logits.dtype == torch.bfloat16
    same = (found.gate == plain.gate).all(-1)[:, PROMPT:].float().mean()
    assert same > 0.9
    assert strangeness_of(model, batch_of(40, 7, FAR)).max() > 0


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(make_imsm, tmp_path):
    model = guarded(make_imsm(), strength=7.0)
    model.guard.strength = 3.0
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved", model


@torch.no_grad()
def test_a_guard_is_saved_and_loaded(saved, make_base):
    folder, model = saved
    loaded = IMSMModel.from_pretrained(folder, make_base())
    assert isinstance(loaded.guard, DomainGuard)
    assert loaded.guard.settings == model.guard.settings.model_copy(update={"strength": 3.0})
    assert loaded.guard.strength == 3.0
    batch = batch_of(20, 7, FAR)
    assert strangeness_of(loaded, batch).max() > 0
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@torch.no_grad()
def test_without_a_guard_nothing_of_it_is_written_or_read(saved, make_base, make_imsm, tmp_path):
    folder, model = saved
    plain = make_imsm()
    plain.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "imsm_guard.safetensors").exists()
    assert "guard" not in json.loads((tmp_path / "plain" / "imsm_config.json").read_text())
    assert IMSMModel.from_pretrained(tmp_path / "plain", make_base()).guard is None
    plain.load_adapter(str(folder), "default")  # as a trainer loads its best checkpoint
    assert torch.equal(plain.guard.map, model.guard.map)
    model.load_adapter(str(tmp_path / "plain"), "default")
    assert model.guard is None
    model.save_pretrained(folder)  # over the old files
    assert IMSMModel.from_pretrained(folder, make_base()).guard is None


def damage(folder, **tensors):
    file = folder / "imsm_guard.safetensors"
    save_file({**load_file(file), **tensors}, file)


@pytest.mark.parametrize(
    "tensors",
    [
        {"map": torch.zeros(16, 24)},
        {"centres": torch.zeros(4, 5)},
        {"centres": torch.zeros(0, 24)},
        {"centres": torch.zeros(24)},
        {"border": torch.zeros(3)},
        {"border": torch.tensor([float("nan"), 1.0])},
        {"more": torch.zeros(1)},
    ],
    ids=str,
)
def test_a_guard_that_does_not_fit_is_refused(saved, make_base, tensors):
    folder, _ = saved
    damage(folder, **tensors)
    with pytest.raises(DamagedFileError, match=r"imsm_guard\.safetensors holds"):
        IMSMModel.from_pretrained(folder, make_base())


def test_a_missing_or_cut_guard_and_damaged_settings_are_refused(saved, make_base):
    folder, _ = saved
    file, config = folder / "imsm_guard.safetensors", folder / "imsm_config.json"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DamagedFileError, match=r"imsm_guard\.safetensors is damaged"):
        IMSMModel.from_pretrained(folder, make_base())
    file.unlink()
    with pytest.raises(DamagedFileError, match=r"imsm_guard\.safetensors does not exist"):
        IMSMModel.from_pretrained(folder, make_base())
    file.write_bytes(whole)
    values = json.loads(config.read_text())
    values["guard"]["strenght"] = 1
    config.write_text(json.dumps(values))
    with pytest.raises(DamagedFileError, match=r"imsm_config\.json cannot be read"):
        IMSMModel.from_pretrained(folder, make_base())
