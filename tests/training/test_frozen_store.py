"""The store gives a batch what the frozen pass would, refuses what it was not made for, and survives every end."""

import functools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import tiny_runs
from twinweave.data import CompletionCollator, attention_mask_of, pad_rows
from twinweave.errors import BaseMismatchError, DamagedFileError, DataError, RecipeError, TrainingError, UsageError
from twinweave.imsm import IMSMModel
from twinweave.imsm.labels import find_places
from twinweave.imsm.twin import Twin
from twinweave.methods import get_method
from twinweave.training import FrozenStore, fit, frozen_choice, load_base, load_recipe, load_tokenizer
from twinweave.training import load_training_data as load_data
from twinweave.training.frozen_rows import plan_rows, sizes
from twinweave.training.frozen_store import identity_of, stored_bytes, tokenizer_digest
from twinweave.training.trainer import TwinweaveTrainer

SMALL = 3_000  # bytes of a shard: a few rows


def make_rows(count=20):
    """Rows of many lengths, with one turn or two; the last two are the same."""
    rows = []
    for i in range(count - 1):
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(3, 61, (7 + i % 7,), generator=generator).tolist()
        start = 1 + i % 4
        labels = [-100] * start + ids[start:]
        if i % 3 == 0:
            labels[start + 2] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return [*rows, rows[-1]]


ROWS = make_rows()
TOKENIZER = tiny_runs.word_tokenizer()
COLLATOR = CompletionCollator(TOKENIZER)


@pytest.fixture(scope="module")
def model(make_imsm):
    return make_imsm()


@pytest.fixture(scope="module")
def identity(model):
    return identity_of(model, TOKENIZER, None)


@pytest.fixture(scope="module")
def built(model, identity, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "frozen"
    return FrozenStore.build(model, ROWS, COLLATOR, folder, identity=identity, batch_size=3, shard_bytes=SMALL)


@pytest.fixture
def folder(built, tmp_path):
    """A copy of a finished store."""
    return Path(shutil.copytree(built.folder, tmp_path / "frozen"))


def open_store(folder, model, identity, rows=ROWS, **options):
    return FrozenStore.open(folder, model, rows, COLLATOR, identity=identity, **options)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_gives(store, model, batch, tolerance=1e-5):
    found, expected = store.batch(**batch), model.frozen_states(**batch)
    torch.testing.assert_close(found.states, expected.states, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.queries, expected.queries, rtol=tolerance, atol=tolerance)


# --- what it holds ----------------------------------------------------------------------------------------------------


def test_a_store_gives_what_the_frozen_pass_gives(model, identity, folder):
    store = open_store(folder, model, identity)
    assert len(store) == 19  # the row that is there twice is kept once
    assert len(list(folder.glob("shard-*.safetensors"))) > 3
    for start in (0, 7, 15):
        assert_gives(store, model, COLLATOR(ROWS[start : start + 5]))
    batch = COLLATOR(ROWS[:6])
    loss = model(**batch).loss
    torch.testing.assert_close(model(**batch, logits_at_labels=True, frozen=store.batch(**batch)).loss, loss)


def test_what_it_takes_is_known_before(model, built):
    rows = plan_rows(ROWS)
    shards = [load_file(file) for file in sorted(built.folder.glob("shard-*"))]
    taken = sum(t.numel() * t.element_size() for shard in shards for t in (shard["states"], shard["queries"]))
    assert taken == stored_bytes(rows, model)
    assert all(32 * 4 * len(shard["states"]) <= SMALL for shard in shards)
    assert sum(row.positions for row in rows) == sum(len(shard["states"]) for shard in shards)


@given(
    st.lists(st.integers(0, len(ROWS) - 1), min_size=1, max_size=5),
    st.sampled_from(["left", "right"]),
    st.integers(0, 4),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_neither_order_nor_padding_matters(model, built, chosen, side, more):
    ids = [ROWS[i]["input_ids"] for i in chosen]
    multiple = max(map(len, ids)) + more
    batch = {
        "input_ids": pad_rows(ids, 1, side=side, multiple_of=multiple),
        "attention_mask": attention_mask_of(ids, side=side, multiple_of=multiple),
        "labels": pad_rows([ROWS[i]["labels"] for i in chosen], -100, side=side, multiple_of=multiple),
    }
    assert_gives(built, model, batch)


def test_rows_with_nothing_before_the_answer_with_no_answer_and_with_a_query_of_their_own(model, identity, tmp_path):
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]},
        {"input_ids": [5, 6, 7, 9], "labels": [-100] * 4},
        {"input_ids": [9], "labels": [9]},
    ]
    store = FrozenStore.build(model, rows, COLLATOR, tmp_path / "frozen", identity=identity)
    assert_gives(store, model, COLLATOR(rows))
    assert_gives(store, model, COLLATOR(rows[1:2]))
    asked = [row | {"query_mask": [1, 0, 1, 0][: len(row["labels"])]} for row in rows]

    def collate(rows):
        return COLLATOR(rows) | {"query_mask": pad_rows([row["query_mask"] for row in rows], 0)}

    store = FrozenStore.build(model, asked, collate, tmp_path / "asked", identity=identity)
    assert_gives(store, model, collate(asked))
    with pytest.raises(DataError, match="not in the frozen-memory store"):
        store.batch(**COLLATOR(rows))


def test_bf16_states_are_kept_as_they_are(make_base, make_imsm, tmp_path):
    model = make_imsm(base=make_base().to(torch.bfloat16))
    identity = identity_of(model, TOKENIZER, None)
    FrozenStore.build(model, ROWS, COLLATOR, tmp_path / "frozen", identity=identity, batch_size=1)
    store, batch = open_store(tmp_path / "frozen", model, identity), COLLATOR(ROWS[:1])
    found, expected = store.batch(**batch), model.frozen_states(**batch)
    assert found.states.dtype == torch.bfloat16
    assert torch.equal(found.states, expected.states)
    assert torch.equal(found.queries, expected.queries)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"base": "another"}, BaseMismatchError, "another base"),
        ({"tokenizer": "0123456789abcdef"}, UsageError, "another tokenizer"),
        ({"dtype": "bfloat16"}, UsageError, "another dtype"),
        ({"autocast": "bfloat16"}, UsageError, "another autocast"),
        ({"format": 2}, UsageError, "format 1; this version reads"),
    ],
)
def test_a_store_made_for_something_else_is_refused(
    change, error, message, model, make_base, make_imsm, folder, identity
):
    if "base" in change:
        change = {"base": make_imsm(base=make_base(seed=3)).base_fingerprint.to_dict()}
    with pytest.raises(error, match=rf"{message}.*Delete .*frozen, or choose another folder"):
        open_store(folder, model, replace(identity, **change))
    (folder / "manifest.json").unlink()
    before = content(folder)
    with pytest.raises(error, match=message):  # neither is an unfinished one gone on with
        FrozenStore.build(model, ROWS, COLLATOR, folder, identity=replace(identity, **change))
    assert content(folder) == before


def test_the_tokenizer_is_known_by_its_vocabulary_and_not_by_how_it_pads():
    padded = tiny_runs.word_tokenizer()
    padded(["a", "a b"], padding="max_length", truncation=True, max_length=5)
    assert tokenizer_digest(padded) == tokenizer_digest(TOKENIZER)
    larger = tiny_runs.word_tokenizer()
    larger.add_tokens(["more"])
    assert tokenizer_digest(larger) != tokenizer_digest(TOKENIZER)


def test_weights_that_the_fingerprint_does_not_see_are_seen_by_the_sample(make_imsm, folder, identity):
    changed = make_imsm()
    with torch.no_grad():
        changed.get_base_model().get_decoder().layers[0].mlp.up_proj.weight.mul_(1.1)
    with pytest.raises(DamagedFileError, match=r"is stale.*computed again.*Delete"):
        open_store(folder, changed, identity)


@pytest.mark.parametrize("column", ["input_ids", "labels"])
def test_changed_rows_are_refused(column, model, folder, identity):
    rows = [dict(row) for row in ROWS]
    rows[4][column] = [*rows[4][column][:-1], 60]
    with pytest.raises(DataError, match=r"made for other rows: 1 of 19 are not in it.*Delete"):
        open_store(folder, model, identity, rows)
    with pytest.raises(DataError, match=r"Row 1 of the batch \(11 tokens\) is not in"):
        open_store(folder, model, identity).batch(**COLLATOR(rows[3:6]))


def test_a_shard_that_is_cut_missing_or_overwritten_is_found(model, folder, identity):
    file = folder / "shard-00001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-40])
    with pytest.raises(DamagedFileError, match=r"shard-00001.*has .* of .* bytes.*Delete"):
        open_store(folder, model, identity)
    file.write_bytes(b"\0" * len(whole))
    with pytest.raises(DamagedFileError, match=r"shard-00001.*damaged.*Delete"):
        open_store(folder, model, identity)
    file.unlink()
    with pytest.raises(DamagedFileError, match=r"shard-00001.*missing.*Delete"):
        open_store(folder, model, identity)


def test_a_damaged_value_is_found_when_it_is_read(model, folder, identity):
    for file in folder.glob("shard-*"):
        shard = load_file(file)
        shard["states"].view(torch.uint8)[:, 5] ^= 1
        save_file(shard, file)
    with pytest.raises(DamagedFileError, match=r"a row is not what was written.*Delete"):
        open_store(folder, model, identity)
    store = open_store(folder, model, identity, samples=0)
    with pytest.raises(DamagedFileError, match="a row is not what was written"):
        store.batch(**COLLATOR(ROWS[:2]))
    shutil.rmtree(folder)
    with pytest.raises(DamagedFileError, match="cannot be read"):
        store.batch(**COLLATOR(ROWS[:2]))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"identity": {}}', '{"identity": 3}'])
def test_a_manifest_that_is_none_is_our_error(text, model, folder, identity):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(DamagedFileError, match=r"manifest.json cannot be read.*Delete"):
        open_store(folder, model, identity)


def test_other_peoples_folders_are_left_alone(model, identity, tmp_path):
    (tmp_path / "thesis.tex").write_text("all of it")
    for place in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(UsageError, match=r"training\.frozen_store=FOLDER"):
            FrozenStore.build(model, ROWS, COLLATOR, place, identity=identity)
    assert content(tmp_path) == {"thesis.tex": b"all of it"}


# --- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_build_that_ends_early_goes_on_from_its_whole_shards(after, model, identity, built, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    calls = []
    frozen_states = IMSMModel.frozen_states

    def count(self, **batch):
        calls.append(1)
        if len(calls) > after:
            raise Stop
        return frozen_states(self, **batch)

    build = functools.partial(
        FrozenStore.build,
        model,
        ROWS,
        COLLATOR,
        tmp_path / "frozen",
        identity=identity,
        batch_size=3,
        shard_bytes=SMALL,
    )
    with monkeypatch.context() as patch:
        patch.setattr(IMSMModel, "frozen_states", count)
        with pytest.raises(Stop):
            build()
    assert not (tmp_path / "frozen" / "manifest.json").exists()
    with pytest.raises(DamagedFileError, match=r"manifest.json cannot be read"):
        open_store(tmp_path / "frozen", model, identity)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "frozen").glob("shard-*")}
    build()
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())
    assert content(tmp_path / "frozen") == content(built.folder)  # to the last bit


def test_a_full_disk_is_our_error(model, identity, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("twinweave.training.frozen_store.save_file", full)
    with pytest.raises(TrainingError, match=r"could not be written.*space.*frozen_store=off"):
        FrozenStore.build(model, ROWS, COLLATOR, tmp_path / "frozen", identity=identity)


def run(world, overrides=(), folder="run", method="imsm", training=None):
    values = tiny_runs.recipe_values(world)
    rows = [  # of many lengths, so that a row is seldom padded as it was when it was stored
        {"prompt": f"reverse {' '.join(words)} :", "completion": " ".join(words[::-1])}
        for words in (tiny_runs.letters(i, 1 + i % 7) for i in range(32))
    ]
    values["train"]["data"] = str(tiny_runs.write_rows(Path(world) / "uneven.jsonl", rows))
    recipe = load_recipe(values | {"training": values["training"] | {"log_every": 1} | (training or {})}, overrides)
    tokenizer = load_tokenizer(recipe.base)
    return fit(recipe, get_method(method), 0, load_data(recipe, tokenizer, 0), tokenizer, Path(world) / folder)


def run_and_die(world: Path) -> None:
    """In a process of its own: be gone in the middle of making the store."""
    torch.set_num_threads(1)
    module, calls = sys.modules["twinweave.training.frozen_store"], []
    save, build = module.save_file, FrozenStore.build.__func__

    def save_or_die(tensors, path):
        save(tensors, path)
        calls.append(path)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    module.save_file = save_or_die
    FrozenStore.build = classmethod(functools.partial(build, shard_bytes=SMALL))
    run(world)


def test_a_killed_run_goes_on_with_the_store_it_had_begun(world, monkeypatch):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["twinweave.compare"])
    process = context.Process(target=tiny_runs.call, args=(str(Path(__file__)), list(sys.path), world))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    store = world / "run" / "frozen"
    assert sorted(p.name for p in store.glob("shard-*")) == ["shard-00000.safetensors", "shard-00001.safetensors"]
    assert list(store.glob(".tmp-*"))
    build = FrozenStore.build.__func__
    monkeypatch.setattr(FrozenStore, "build", classmethod(functools.partial(build, shard_bytes=SMALL)))
    resumed, whole = run(world), run(world, folder="whole")
    assert resumed.curve == whole.curve
    assert sorted(p.name for p in (world / "run").iterdir()) == ["best", "last", "training.json"]


# --- training with it -------------------------------------------------------------------------------------------------


def curve(training, kind="train"):
    return torch.tensor([loss for _, loss in training.curve[kind]])


@pytest.mark.parametrize("method", ["imsm", "imsm_gate", "imsm_average"])
@pytest.mark.parametrize(
    "training",
    [
        {},
        {"batch_size": 2, "gradient_accumulation": 3},
        {"gradient_checkpointing": True, "warmup": 0},
        {"scheduler": "constant", "warmup": 0, "learning_rate": 3e-3},
    ],
)
def test_a_training_has_the_losses_it_has_without(method, training, world):
    """Shuffled rows, dropout in adapter and gate, a validation each epoch: the same to 1e-5 after three epochs."""
    without = run(world, ["training.frozen_store=off"], "without", method, training)
    with_store = run(world, [f"training.frozen_store={world / 'kept'}"], "with", method, training)
    assert torch.allclose(curve(with_store), curve(without), atol=1e-5)
    assert torch.allclose(curve(with_store, "validation"), curve(without, "validation"), atol=1e-5)
    found, expected = (load_file(world / name / "last" / "adapter_model.safetensors") for name in ("with", "without"))
    assert all(torch.allclose(found[name], tensor, atol=1e-4) for name, tensor in expected.items())


def test_bf16_autocast_to_its_own_precision(world):
    training = {"precision": "bf16", "learning_rate": 1e-3}
    without = run(world, ["training.frozen_store=off"], "without", training=training)
    with_store = run(world, folder="with", training=training)
    assert torch.allclose(curve(with_store), curve(without), atol=5e-3)
    assert torch.allclose(curve(with_store, "validation"), curve(without, "validation"), atol=5e-3)


@pytest.mark.parametrize("store", ["off", "auto"])
def test_label_positions_alone_give_the_losses_of_every_position(store, world, monkeypatch):
    no_dropout = "imsm.gate_dropout=0"  # in the gate it falls on other positions
    found = run(world, [f"training.frozen_store={store}", no_dropout], "found")
    monkeypatch.setattr(TwinweaveTrainer, "_at_labels", lambda self, inputs, **kwargs: inputs)
    expected = run(world, [no_dropout], "expected")
    assert torch.allclose(curve(found), curve(expected), atol=1e-5)
    assert torch.allclose(curve(found, "validation"), curve(expected, "validation"), atol=1e-5)


def test_frozen_passes_are_run_until_the_adapter_has_moved(world, monkeypatch):
    calls = []
    frozen_pass = Twin.frozen_pass
    monkeypatch.setattr(Twin, "frozen_pass", lambda *args: calls.append(1) or frozen_pass(*args))
    run(world)
    assert len(calls) == 2
    calls.clear()
    run(world, ["training.warmup=0.5"], "slow")
    assert len(calls) == 8
    calls.clear()
    run(world, ["training.frozen_store=off"], "off")
    assert len(calls) > 12


def test_every_logit_is_there_for_those_who_want_them(world, make_imsm, tmp_path):
    """`predict` and label smoothing see [B, T, V]."""
    recipe = load_recipe(tiny_runs.recipe_values(world))
    tokenizer = load_tokenizer(recipe.base)
    data = load_data(recipe, tokenizer, 0)
    made = []
    own = TwinweaveTrainer.__init__

    def keep(self, *args, **kwargs):
        own(self, *args, **kwargs)
        made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TwinweaveTrainer, "__init__", keep)
        fit(recipe, get_method("imsm"), 0, data, tokenizer, tmp_path / "run")
    trainer = made[0]
    trainer._frozen_store = None
    trainer.args.prediction_loss_only = False
    logits = trainer.predict(data.validation).predictions
    assert (logits[0] if isinstance(logits, tuple) else logits).shape[0] == len(data.validation)
    trainer.compute_loss_func = lambda outputs, labels, **kwargs: outputs.logits.sum() * 0 + len(outputs.logits)
    rows = CompletionCollator(tokenizer)([data.train[i] for i in range(3)])
    assert trainer.training_step(trainer.model, rows) == 3


# --- the recipe -------------------------------------------------------------------------------------------------------


def said(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if "original memory" in line]


def test_auto_announces_uses_and_removes_its_store(world, capsys):
    run(world)
    lines = said(capsys)
    assert re.search(r"of 31 rows \(152 label positions\) once: 23 KB in .*run/frozen", lines[0])
    assert len(lines) == 2
    assert sorted(p.name for p in (world / "run").iterdir()) == ["best", "last", "training.json"]


def test_auto_makes_none_for_plain_peft_or_few_epochs(world, capsys):
    run(world, method="peft", folder="peft")
    run(world, ["training.epochs=1"], "short")
    run(world, ["training.max_steps=2"], "shorter")
    assert said(capsys) == []


def test_auto_leaves_the_disk_free_and_stays_with_what_it_decided(world, capsys, monkeypatch):
    step = TwinweaveTrainer.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == 6:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    usage = shutil.disk_usage("/")
    with monkeypatch.context() as patch:
        patch.setattr(frozen_choice.shutil, "disk_usage", lambda path: usage._replace(free=30_000))
        patch.setattr(TwinweaveTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            run(world)
    lines = said(capsys)
    assert len(lines) == 1
    assert "of the 30 KB free" in lines[0]
    assert not (world / "run" / "frozen").exists()
    resumed = run(world)  # there is space now
    assert said(capsys) == []
    assert resumed.curve == run(world, ["training.frozen_store=off"], "off").curve


def test_a_folder_is_kept_and_used_again(world, capsys):
    kept = ["training.frozen_store=kept"]
    first = run(world, kept, "first")
    before = content(world / "kept")
    assert len(said(capsys)) == 2
    again = run(world, kept, "again")
    assert said(capsys) == []
    assert again.curve == first.curve
    assert content(world / "kept") == before
    with pytest.raises(DataError, match=r"kept was made for other rows.*Delete kept, or choose"):
        run(world, [*kept, "train.prompt='{prompt} ?'", "train.completion='{completion}'"], "asked")


@pytest.mark.parametrize(("value", "kept"), [("off", "off"), ("auto", "auto"), ("some/folder", "some/folder")])
def test_the_recipe_says_which(value, kept, world):
    recipe = load_recipe(tiny_runs.recipe_values(world), [f"training.frozen_store={value}"])  # YAML reads off as False
    assert recipe.training.frozen_store == kept


@pytest.mark.parametrize("value", ["true", "3", "''", "[a]"])
def test_the_recipe_refuses_what_is_neither(value, world):
    with pytest.raises(RecipeError, match=r"training\.frozen_store.*'auto', 'off' or a folder"):
        load_recipe(tiny_runs.recipe_values(world), [f"training.frozen_store={value}"])


def test_methods_and_seeds_of_a_comparison_share_one_store(world, capsys):
    from twinweave.compare import compare

    recipe = load_recipe(
        tiny_runs.recipe_values(world, methods=["peft", "imsm", "imsm_average"]), ["training.epochs=2"]
    )
    compare(recipe)
    assert len(said(capsys)) == 2  # announced and made once
    assert not (world / "run" / "frozen").exists()
    assert json.loads((world / "run" / "frozen.json").read_text())["used"] is True


def test_the_rows_of_a_dataset_are_read_like_a_list():
    rows = plan_rows(datasets.Dataset.from_list(ROWS))
    assert rows == plan_rows(ROWS)
    assert rows == sorted(rows, key=lambda row: (row.length, row.key))
    assert {row.key for row in plan_rows(ROWS[::-1])} == {row.key for row in rows}


@given(st.lists(st.sampled_from("ap.q"), min_size=1, max_size=9), st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_rows_sizes_are_those_that_the_model_finds(kinds, explicit):
    labels = [5 if kind == "a" else -100 for kind in kinds]
    asked = [kind == "q" for kind in kinds] if explicit else None
    places = find_places(torch.tensor([labels]), query_mask=torch.tensor([asked]) if explicit else None)
    assert sizes(labels, asked) == (places.count, places.queries)


def test_only_the_first_process_makes_it_and_the_others_wait(world, tmp_path, monkeypatch):
    recipe = load_recipe(tiny_runs.recipe_values(world))
    tokenizer = load_tokenizer(recipe.base)
    data = load_data(recipe, tokenizer, 0)
    model = get_method("imsm").build(load_base(recipe.base), recipe.peft_config(), recipe.settings())
    waited = []
    arguments = {rank: SimpleNamespace(process_index=rank, world_size=2) for rank in (0, 1)}

    def store(rank):
        collator = CompletionCollator(tokenizer)
        return frozen_choice.frozen_store_for(
            recipe.training,
            model,
            datasets.concatenate_datasets([data.train, data.validation]),
            collator=collator,
            tokenizer=tokenizer,
            arguments=arguments[rank],
            readings=3,
            folder=tmp_path / "frozen",
        )

    def sleep(seconds):
        assert not (tmp_path / "frozen").exists()
        waited.append(seconds)
        if len(waited) == 2:
            assert len(store(0)) > 0

    monkeypatch.setattr(frozen_choice.time, "sleep", sleep)
    build = FrozenStore.build
    built = []
    monkeypatch.setattr(FrozenStore, "build", lambda *args, **kwargs: built.append(1) or build(*args, **kwargs))
    batch = CompletionCollator(tokenizer)([data.train[i] for i in range(3)])
    assert torch.equal(store(1).batch(**batch).states, store(0).batch(**batch).states)
    assert (len(waited), len(built)) == (2, 1)
    shutil.rmtree(tmp_path / "frozen")
    (tmp_path / "frozen.json").write_text('{"used": false}')
    assert store(1) is None
    assert store(0) is None
