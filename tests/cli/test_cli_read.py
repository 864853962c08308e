"""`read`, `forget` and `generate --adapter`: what was read is in the folder, whole, and what was forgotten is not."""

import io
import json
import multiprocessing
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny_runs
from twinweave import AdapterState, GenerativeAdapter, GenerativeAdapterConfig
from twinweave.cli import main
from twinweave.pocket import base_dir, rows
from twinweave.training import load_recipe

ROOT = Path(__file__).parent.parent.parent
TEXTS = [row["text"] for row in rows("documents")[:6]]
QUESTION = rows("documents/questions")[0]["prompt"]
FILES = {"adapter_state.safetensors", "adapter_config.json", "adapter_model.safetensors", "reader.json"}


def make_reader(folder, base=None, seed=0, **settings):
    """A generator with random weights that changes every answer."""
    model = AutoModelForCausalLM.from_pretrained(base or base_dir(), dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        chosen = GenerativeAdapterConfig(**{"state_size": 16, "rank": 8, "scale": 1.0} | settings)
        reader = GenerativeAdapter(model, chosen)
        for generator in reader.generators:
            torch.nn.init.normal_(generator.output, std=0.3)
    reader.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readers")
    make_reader(folder / "run" / "best")
    make_reader(folder / "other", seed=1)
    make_reader(folder / "sequential", mode="sequential")
    return folder


@pytest.fixture
def work(readers, tmp_path, monkeypatch):
    """A working directory with texts in it; `pocket` is the generator with random weights."""
    for number, text in enumerate(TEXTS[:3]):
        (tmp_path / f"{number}.txt").write_text(text)
    (tmp_path / "notes" / "deeper").mkdir(parents=True)
    (tmp_path / "notes" / "b.md").write_text(TEXTS[3])
    (tmp_path / "notes" / "deeper" / "a.txt").write_text(TEXTS[4])
    (tmp_path / "notes" / "c.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("twinweave.pocket.reader_dir", lambda: readers / "run" / "best")
    return tmp_path


@pytest.fixture
def call(monkeypatch, capsys):
    """Run `twinweave ARGUMENTS`; returns (exit code, stdout, stderr)."""

    def run(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["twinweave", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return run


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def done(result):
    code, out, err = result
    assert code == 0, err
    return out, err


def documents_in(folder):
    return sum(AdapterState.load(folder).documents.values())


# --- reading and answering --------------------------------------------------------------------------------------------


def test_what_was_read_is_what_the_library_reads(work, call, readers):
    out, err = done(call("read", "0.txt", "1.txt", "--out", "made"))
    assert set(files_of(work / "made")) == FILES
    reader = GenerativeAdapter.from_pretrained(readers / "run" / "best", dtype=torch.float32)
    state = reader.read(TEXTS[0]) + reader.read(TEXTS[1])
    assert AdapterState.load("made") == state
    size = (work / "made" / "adapter_model.safetensors").stat().st_size
    assert "documents: 2 read" in out
    assert f"tokens:    {state.tokens} read" in out
    assert f"rank 8, {size:,} bytes" in out
    assert re.search(r"time: +\d+\.\d seconds", out)
    assert "error" not in err
    record = json.loads((work / "made" / "reader.json").read_text())
    assert (record["reader"], record["fingerprint"], record["dtype"]) == ("pocket", reader.fingerprint(), "float32")


def test_answers_are_those_of_the_library_and_of_plain_peft(work, call, readers):
    done(call("read", "0.txt", "1.txt", "--out", "made"))
    answer, _ = done(call("generate", "pocket", QUESTION, "--adapter", "made", "--max-new-tokens", 8))
    tokenizer = AutoTokenizer.from_pretrained(base_dir())
    ids = torch.tensor([tokenizer(QUESTION, add_special_tokens=False)["input_ids"]])
    if tokenizer.bos_token_id is not None:
        ids = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids], dim=1)
    base = AutoModelForCausalLM.from_pretrained(base_dir(), dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, "made").eval()
    reader = GenerativeAdapter.from_pretrained(readers / "run" / "best", dtype=torch.float32)
    with torch.no_grad(), reader.adapted(AdapterState.load("made", reader)):
        live = reader(input_ids=ids).logits
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, live, rtol=0, atol=1e-5)
        with plain.disable_adapter():
            assert (plain(input_ids=ids).logits - live).abs().max() > 0.1
    written = plain.generate(input_ids=ids, max_new_tokens=8, do_sample=False, use_cache=True)
    assert answer.strip() == tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip()
    base_answer = reader.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    assert answer.strip() != tokenizer.decode(base_answer[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_a_run_its_best_model_and_the_generator_itself_are_one_reader(work, call, readers):
    done(call("read", "0.txt", "--out", "made"))
    answers = [
        done(call("generate", reader, QUESTION, "--adapter", "made"))[0]
        for reader in ("pocket", readers / "run", readers / "run" / "best")
    ]
    assert len(set(answers)) == 1
    done(call("read", "0.txt", "--out", "again", "--reader", readers / "run"))
    made, again = files_of(work / "made"), files_of(work / "again")
    assert json.loads(again.pop("reader.json"))["reader"] == str(readers / "run")
    assert made.pop("reader.json")
    assert made == again


def test_several_adapters_are_added_up(work, call):
    for number in range(3):
        done(call("read", f"{number}.txt", "--out", f"made{number}"))
    done(call("read", "0.txt", "1.txt", "2.txt", "--out", "all"))
    together = done(call("generate", "pocket", QUESTION, "--adapter", "all"))[0]
    options = [option for number in range(3) for option in ("--adapter", f"made{number}")]
    apart, err = done(call("generate", "pocket", QUESTION, *options))
    assert apart == together
    assert "more than one" not in err
    _, err = done(call("generate", "pocket", QUESTION, "--adapter", "made0", "--adapter", "all"))
    assert "1 of the texts are in more than one of the adapters" in err


def test_every_kind_of_text(work, call):
    done(call("read", "notes", "--out", "folder"))
    assert documents_in("folder") == 2
    done(call("read", Path("notes") / "deeper" / "a.txt", Path("notes") / "b.md", "--out", "files"))
    _, err = done(call("read", TEXTS[4], "-", "--out", "said", stdin=TEXTS[3].encode()))
    assert "is no path, so it is taken as a text" in err
    state = (work / "folder" / "adapter_state.safetensors").read_bytes()
    assert state == (work / "files" / "adapter_state.safetensors").read_bytes()
    assert state == (work / "said" / "adapter_state.safetensors").read_bytes()


def test_line_ends_and_marks_of_byte_order_are_the_same_everywhere(work, call):
    text = b"\xef\xbb\xbfWanda Crane keeps a swan.\r\nMara Jarvis keeps a canary.\r\n"
    Path("windows.txt").write_bytes(text)
    done(call("read", "windows.txt", "--out", "made"))
    out, _ = done(call("read", "-", "--out", "made", stdin=text))
    assert "documents: 0 read, all 1 known before" in out


def test_a_text_that_comes_once_and_is_gone(work, call):
    """A named pipe, as the shell makes one for <(command)."""
    import os
    import threading

    os.mkfifo("pipe")
    writer = threading.Thread(target=lambda: Path("pipe").write_text(TEXTS[0]))
    writer.start()
    done(call("read", "pipe", "--out", "piped"))
    writer.join(10)
    done(call("read", "0.txt", "--out", "made"))
    assert files_of(work / "piped") == files_of(work / "made")


def test_half_precision(work, call):
    done(call("read", "0.txt", "--out", "made", "--dtype", "bfloat16"))
    done(call("read", "0.txt", "--out", "full"))
    size = (work / "made" / "adapter_model.safetensors").stat().st_size
    assert size < 0.6 * (work / "full" / "adapter_model.safetensors").stat().st_size
    assert AdapterState.load("made") != AdapterState.load("full")
    done(call("read", "1.txt", "--out", "made"))  # goes on in the precision it began with
    assert json.loads((work / "made" / "reader.json").read_text())["dtype"] == "bfloat16"
    before = files_of(work)
    code, _, err = call("read", "2.txt", "--out", "made", "--dtype", "float32")
    assert code == 2
    assert "bfloat16" in tiny_runs.error_of(err)
    assert files_of(work) == before
    done(call("forget", "made", "1.txt"))
    done(call("read", "0.txt", "--out", "fresh", "--dtype", "bfloat16"))
    assert files_of(work / "made") == files_of(work / "fresh")


# --- adding and forgetting --------------------------------------------------------------------------------------------


def test_a_folder_that_exists_is_added_to(work, call):
    done(call("read", "0.txt", "--out", "made"))
    (work / "made" / "mine.txt").write_text("my own")
    out, err = done(call("read", "0.txt", "1.txt", "2.txt", "2.txt", "--out", "made"))
    assert "skipped 0.txt: read before" in err
    assert "documents: 2 read, 1 known before; 3 in all" in out
    assert (work / "made" / "mine.txt").read_text() == "my own"
    (work / "made" / "mine.txt").unlink()
    done(call("read", "2.txt", "1.txt", "0.txt", "--out", "at once"))
    assert files_of(work / "made") == files_of(work / "at once")
    before = {p: p.stat().st_mtime_ns for p in (work / "made").iterdir()}
    assert "0 read" in done(call("read", "0.txt", "--out", "made"))[0]
    assert {p: p.stat().st_mtime_ns for p in (work / "made").iterdir()} == before


def test_one_text_under_two_names_is_read_once(work, call):
    shutil.copy("0.txt", "copy.txt")
    out, err = done(call("read", "0.txt", "copy.txt", "--out", "made"))
    assert "skipped copy.txt: the same text as 0.txt" in err
    assert "1 in all" in out


def test_forgetting_leaves_the_bytes_of_never_having_read(work, call):
    done(call("read", "0.txt", "1.txt", "notes", "--out", "made"))
    done(call("read", "0.txt", "--out", "never"))
    assert files_of(work / "made") != files_of(work / "never")
    out, _ = done(call("forget", "made", "notes", "1.txt"))
    assert "documents: 3 taken out; 1 left" in out
    assert files_of(work / "made") == files_of(work / "never")


def test_forgetting_everything_answers_as_the_base(work, call, readers):
    done(call("read", "0.txt", TEXTS[1], "--out", "made"))
    changed = done(call("generate", "pocket", QUESTION, "--adapter", "made"))[0]
    done(call("forget", "made", TEXTS[1], "0.txt"))
    answer = done(call("generate", "pocket", QUESTION, "--adapter", "made"))[0]
    assert answer != changed
    base = AutoModelForCausalLM.from_pretrained(base_dir(), dtype=torch.float32)
    ids = torch.tensor([AutoTokenizer.from_pretrained(base_dir())(QUESTION)["input_ids"]])
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        assert torch.equal(PeftModel.from_pretrained(base, "made")(input_ids=ids).logits, expected)
        reader = GenerativeAdapter.from_pretrained(readers / "run" / "best", dtype=torch.float32)
        with reader.adapted(AdapterState.load("made", reader)):
            assert torch.equal(reader(input_ids=ids).logits, expected)
    done(call("read", "0.txt", "--out", "made"))
    done(call("read", "0.txt", "--out", "fresh"))
    assert files_of(work / "made") == files_of(work / "fresh")


def test_a_text_that_python_read_twice_is_taken_out_twice(work, call, readers):
    done(call("read", "0.txt", "1.txt", "--out", "made"))
    reader = GenerativeAdapter.from_pretrained(readers / "run" / "best", dtype=torch.float32)
    (AdapterState.load("made", reader) + reader.read(Path("0.txt"))).save("made")
    done(call("forget", "made", "0.txt"))
    done(call("read", "1.txt", "--out", "never"))
    assert files_of(work / "made") == files_of(work / "never")


def test_forgetting_with_other_software_says_that_rounding_may_stay(work, call):
    done(call("read", "0.txt", "1.txt", "--out", "made"))
    assert "rounding" not in done(call("forget", "made", "1.txt"))[1]
    record = json.loads((work / "made" / "reader.json").read_text())
    (work / "made" / "reader.json").write_text(json.dumps(record | {"torch": "1.0"}))
    _, err = done(call("forget", "made", "0.txt"))
    assert f"torch 1.0 then, {torch.__version__} now" in err


def test_a_reader_and_a_base_that_moved(work, call, readers):
    shutil.copytree(base_dir(), "base")
    make_reader(work / "reader", base="base")
    done(call("read", "0.txt", "1.txt", "--out", "made", "--reader", "reader"))
    Path("reader").rename("reader2")
    Path("base").rename("base2")
    before = files_of(work)
    code, _, err = call("forget", "made", "0.txt")
    assert code == 2
    assert str(work / "reader") in tiny_runs.error_of(err)
    code, _, err = call("forget", "made", "0.txt", "--reader", "reader2")
    assert code == 1
    assert "base" in tiny_runs.error_of(err)
    assert files_of(work) == before
    done(call("forget", "made", "0.txt", "--reader", "reader2", "--base", "base2"))
    done(call("read", "2.txt", "--out", "made"))  # where they lie now is written down
    done(call("generate", "reader2", QUESTION, "--adapter", "made"))
    assert documents_in("made") == 2


# --- what cannot be done ----------------------------------------------------------------------------------------------


@pytest.fixture
def bad(work, call):
    """The working directory with an adapter, and texts and readers that are of no use."""
    done(call("read", "0.txt", "1.txt", "--out", "made"))
    Path("empty.txt").write_text(" \n")
    Path("latin.txt").write_bytes("Käthe".encode("latin-1"))
    Path("none").mkdir()
    Path("taken").mkdir()
    Path("taken", "a.txt").write_text("mine")
    return work


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["read", "missing.txt", "--out", "new"], 2, ["'missing.txt'"]),
        (["read", "my notes.txt", "--out", "new"], 2, ["'my notes.txt'"]),
        (["read", "./my notes", "--out", "new"], 2, ["'./my notes'"]),
        (["read", "~/my notes", "--out", "new"], 2, ["'~/my notes'"]),
        (["forget", "made", "/my notes/0.jsonl"], 2, ["'/my notes/0.jsonl'"]),
        (["read", "2.txt", "--out", "."], 2, ["."]),
        (["read", "2.txt", "--out", ".."], 2, ["..", "around"]),
        (["read", "0.txt", "empty.txt", "--out", "new"], 1, ["empty.txt", "empty"]),
        (["read", "", "--out", "new"], 1, ["empty"]),
        (["read", "-", "--out", "new"], 1, ["standard input", "empty"]),
        (["read", "0.txt", "latin.txt", "--out", "new"], 1, ["latin.txt", "UTF-8"]),
        (["read", "none", "--out", "new"], 1, ["none", ".txt"]),
        (["read", "2.txt", "--out", "taken"], 2, ["taken", "--out"]),
        (["read", "2.txt", "--out", "0.txt"], 2, ["0.txt", "--out"]),
        (["read", "2.txt", "--out", "new", "--reader", "nowhere"], 2, ["nowhere", "generator"]),
        (["read", "2.txt", "--out", "new", "--reader", "taken"], 2, ["taken", "generator"]),
        (["read", "2.txt", "--out", "new", "--base", "nowhere"], 1, ["nowhere"]),
        (["read", "2.txt", "--out", "made", "--reader", "OTHER"], 1, ["made", "another generator", "OTHER"]),
        (["forget", "made", "0.txt", "2.txt"], 2, ["made", "2.txt", "never read"]),
        (["forget", "made", "Wanda Crane never was."], 2, ["'Wanda Crane never was.'", "never read"]),
        (["forget", "taken", "0.txt"], 1, ["taken", "reader.json"]),
        (["forget", "nowhere", "0.txt"], 1, ["nowhere"]),
        (["forget", "made", "0.txt", "--reader", "OTHER"], 1, ["made", "another generator"]),
        (["generate", "taken", "a", "--adapter", "made"], 2, ["taken", "generator"]),
        (["generate", "OTHER", "a", "--adapter", "made"], 1, ["made", "another generator", "OTHER"]),
        (["generate", "pocket", "a"], 2, ["pocket", "--adapter"]),
        (["generate", "pocket", "a", "--adapter", "taken"], 1, ["taken"]),
        (["generate", "pocket", "a", "--adapter", "nowhere"], 1, ["nowhere"]),
        (["generate", "pocket", "a", "--adapter", "made", "--lens"], 2, ["--lens"]),
        (["generate", "pocket", "a", "--adapter", "made", "--retention", "1"], 2, ["--retention", "reader"]),
        (["generate", "pocket", "a " * 300, "--adapter", "made"], 2, ["window"]),
    ],
)
def test_bad_requests_change_nothing(bad, call, readers, arguments, code, named):
    other = str(readers / "other")
    before = files_of(bad)
    found, out, err = call(*(other if argument == "OTHER" else argument for argument in arguments))
    message = tiny_runs.error_of(err)
    assert (found, out) == (code, "")
    assert all(part.replace("OTHER", other) in message for part in named), message
    assert files_of(bad) == before
    assert not Path("new").exists()


def test_the_folder_one_is_in_is_not_replaced(bad, call, monkeypatch):
    monkeypatch.chdir("made")
    before = files_of(bad)
    for command in (["read", "../2.txt", "--out", "."], ["forget", bad / "made", "../0.txt"]):
        code, out, err = call(*command)
        assert (code, out) == (2, "")
        assert "the folder you are in" in tiny_runs.error_of(err)
    assert files_of(bad) == before


def test_adapters_of_different_precision_are_not_added_up(work, call):
    done(call("read", "0.txt", "--out", "full"))
    done(call("read", "1.txt", "--out", "half", "--dtype", "bfloat16"))
    for options in (["--adapter", "full", "--adapter", "half"], ["--adapter", "half", "--adapter", "full"]):
        code, out, err = call("generate", "pocket", QUESTION, *options)
        assert (code, out) == (2, "")
        assert all(part in tiny_runs.error_of(err) for part in ("full in float32", "half in bfloat16"))


def test_the_time_is_that_of_reading(work, call, monkeypatch):
    clock, load, read = [0.0], GenerativeAdapter.from_pretrained, GenerativeAdapter.read

    def loading(*args, **kwargs):
        clock[0] += 100
        return load(*args, **kwargs)

    def reading(*args, **kwargs):
        clock[0] += 7
        return read(*args, **kwargs)

    clock_of_read = SimpleNamespace(monotonic=lambda: clock[0])
    monkeypatch.setattr(sys.modules["twinweave.cli.read"], "time", clock_of_read)
    monkeypatch.setattr(GenerativeAdapter, "from_pretrained", loading)
    monkeypatch.setattr(GenerativeAdapter, "read", reading)
    out, _ = done(call("read", "0.txt", "1.txt", "--out", "made"))
    assert "time:      14.0 seconds" in out


def test_stopping_promises_nothing(work, call, monkeypatch):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(GenerativeAdapter, "read", stopped)
    code, out, err = call("read", "0.txt", "--out", "made")
    assert (code, out) == (130, "")
    assert "goes on" not in err
    assert not Path("made").exists()


def test_a_run_that_is_asked_before_it_read_says_that_the_base_answers(work, call, readers):
    """As a run is left behind: its results, and the generator in best."""
    shutil.copytree(readers / "run", "run")
    documents = {"data": "pocket:contexts/train", "context": "context"}
    target = {"name": "letters", "kind": "generation", "data": "pocket:letters/test"}
    recipe = {"base": "pocket", "train": documents, "target": target, "method": "generative_adapter"}
    recipe |= {"methods": ["generative_adapter"]}
    Path("run", "results.json").write_text(json.dumps({"schema": 1, "recipe": recipe}))
    answer, err = done(call("generate", "run", QUESTION))
    assert "nothing was read, so the base answers" in err
    assert "--adapter" in err
    done(call("read", "0.txt", "--out", "made"))
    told, err = done(call("generate", "run", QUESTION, "--adapter", "made"))
    assert "nothing was read" not in err
    assert told != answer
    code, _, err = call("generate", "run", QUESTION, "--memory", "original")
    assert code == 2
    assert "is a reader" in tiny_runs.error_of(err)


@pytest.mark.parametrize("name", ["generative-adapter-mistral7b", "generative-adapter-mistral7b-qa"])
def test_the_published_recipes_load_on_a_base_and_text_of_our_own(tmp_path, name):
    base, rows = tiny_runs.save_base(tmp_path / "base"), tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "a b c", "context": "a b", "question": "a", "answers": {"text": ["b"]}}) + "\n")
    names = ["train.data", "target.data", *(["evaluation.read"] if name.endswith("qa") else [])]
    overrides = [f"base.name={base}", "base.pad_token=null", *(f"{name}={rows}" for name in names)]
    recipe = load_recipe(str(ROOT / "recipes" / "paper" / f"{name}.yaml"), overrides)
    assert recipe.rehearsal is None
    assert recipe.documents() == (["a b c"] if recipe.retained else [])  # a retained task is asked with an adapter on


def test_the_reader_of_another_base(work, call):
    tiny_runs.save_base(work / "other")
    make_reader(work / "reader", base=work / "other")
    code, out, err = call("read", "0.txt", "--out", "made", "--reader", "reader", "--base", base_dir())
    assert (code, out) == (1, "")
    assert "another base" in tiny_runs.error_of(err)
    assert not Path("made").exists()


def test_sequential_readers_go_on_but_do_not_forget(work, call, readers):
    done(call("read", "0.txt", "--out", "made", "--reader", readers / "sequential"))
    done(call("read", "1.txt", "--out", "made"))
    assert documents_in("made") == 2
    before = files_of(work)
    code, _, err = call("forget", "made", "0.txt")
    assert code == 2
    assert "sequential" in tiny_runs.error_of(err)
    assert files_of(work) == before


def cut(folder):
    file = folder / "adapter_state.safetensors"
    file.write_bytes(file.read_bytes()[:-50])


def without_state(folder):
    (folder / "adapter_state.safetensors").unlink()


def without_a_layer(folder):
    state = AdapterState.load(folder)
    state.sums.pop(sorted(state.sums)[0])
    state.save(folder)


def a_lora_in_its_place(folder):
    shutil.copy(folder / "adapter_model.safetensors", folder / "adapter_state.safetensors")


def scrambled_record(folder):
    (folder / "reader.json").write_text('{"reader": ')


def foreign_record(folder):
    (folder / "reader.json").write_text('{"name": "x"}')


@pytest.mark.parametrize(
    "damage", [cut, without_state, without_a_layer, a_lora_in_its_place, scrambled_record, foreign_record]
)
def test_damaged_adapters_are_refused_and_left_as_they_are(work, call, damage):
    done(call("read", "0.txt", "--out", "made"))
    damage(work / "made")
    before = files_of(work)
    for arguments in (
        ["read", "1.txt", "--out", "made"],
        ["forget", "made", "0.txt"],
        ["generate", "pocket", QUESTION, "--adapter", "made"],
    ):
        code, out, err = call(*arguments)
        assert (code, out) == (1, ""), arguments
        assert re.search("adapter_state|reader.json|matrices", tiny_runs.error_of(err))
    assert files_of(work) == before


def run_and_die(world, moment, reader, argv):
    """In a process of its own: read or forget, and be gone while the folder is written."""
    import os

    import twinweave.cli.adapters as adapters
    from twinweave import pocket

    os.chdir(world)
    torch.set_num_threads(1)
    pocket.reader_dir = lambda: Path(reader)
    if moment == "reading":
        GenerativeAdapter.read = lambda *args, **kwargs: tiny_runs.die()
    if moment == "LoRA":
        GenerativeAdapter.export_lora = lambda *args, **kwargs: tiny_runs.die()
    if moment == "record":
        adapters.write_json_atomic = lambda *args: tiny_runs.die()
    sys.argv = ["twinweave", *argv]
    main()


@pytest.fixture(scope="module")
def server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["twinweave.cli"])
    return context


@pytest.mark.parametrize(
    ("moment", "command"),
    [
        ("reading", ["read", "2.txt", "--out", "made"]),
        ("record", ["read", "2.txt", "--out", "made"]),
        ("LoRA", ["forget", "made", "0.txt"]),
        ("record", ["read", "2.txt", "--out", "new"]),
    ],
)
def test_a_killed_command_leaves_the_old_folder_or_none(work, call, readers, server, moment, command):
    done(call("read", "0.txt", "1.txt", "--out", "made"))
    old = files_of(work / "made")
    arguments = (str(Path(__file__)), list(sys.path), work, moment, str(readers / "run" / "best"), command)
    process = server.Process(target=tiny_runs.call, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert files_of(work / "made") == old
    assert not Path("new").exists()
    done(call(*command))
    assert documents_in(command[command.index("--out") + 1] if "--out" in command else "made") in (1, 3)


def test_a_full_disk_is_one_sentence(work, call, monkeypatch):
    done(call("read", "0.txt", "--out", "made"))
    old = files_of(work)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("twinweave.cli.adapters.write_json_atomic", full)
        code, _, err = call("read", "1.txt", "--out", "made")
    assert code == 1
    assert "No space left" in tiny_runs.error_of(err)
    assert files_of(work) == old
    done(call("read", "1.txt", "--out", "made"))
