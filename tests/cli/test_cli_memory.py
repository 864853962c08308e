"""`twinweave memory`: what was added is answered from, whole, whoever is killed or reads meanwhile."""

import io
import json
import multiprocessing
import random
import signal
import sys
import time
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

import bank_processes
from twinweave import CMTConfig, MemoryModel
from twinweave.cli import main
from twinweave.cmt import MemoryBank, upkeep
from twinweave.cmt.rows import Memory
from twinweave.errors import UsageError
from twinweave.pocket import base_dir, rows

TEXTS = [row["text"] for row in rows("documents")[:60]]
QUESTION = rows("documents/questions")[0]["prompt"]
SETTINGS = CMTConfig(
    memory_tokens=2, aggregator_layers=1, aggregator_heads=2, aggregator_head_size=8, prefix_rank=8, top_k=3
)


def make_model(folder, seed=0):
    """A memory model with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(base_dir(), dtype=torch.float32)
        adapter = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        MemoryModel(base, SETTINGS, adapter).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "run" / "best")
    make_model(folder / "other", seed=1)
    return folder


@pytest.fixture
def work(models, tmp_path, monkeypatch):
    """A working directory with texts in it; `pocket` is the model with random weights."""
    for number, text in enumerate(TEXTS[:3]):
        (tmp_path / f"{number}.txt").write_text(text)
    (tmp_path / "notes" / "deeper").mkdir(parents=True)
    (tmp_path / "notes" / "b.md").write_text(TEXTS[3])
    (tmp_path / "notes" / "deeper" / "a.txt").write_text(TEXTS[4] * 200)
    lines = [{"text": TEXTS[5], "id": "five", "year": 2024, "tags": ["x"]}, {"text": TEXTS[6]}, {"text": TEXTS[0]}]
    (tmp_path / "more.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("twinweave.pocket.memory_dir", lambda: models / "run")
    return tmp_path


@pytest.fixture
def call(monkeypatch, capsys):
    """Run `twinweave memory ARGUMENTS`; returns (exit code, stdout, stderr)."""

    def run(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["twinweave", "memory", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return run


def done(result):
    code, out, err = result
    assert code == 0, err
    return out


def failed(result, exit_code, *words):
    code, _, err = result
    assert code == exit_code, err
    for word in words:
        assert word in err
    assert "Traceback" not in err


def listed(path="memory.lance"):
    return {d["id"]: d for d in MemoryBank(path).documents()}


def test_documents_are_added_asked_listed_and_forgotten(work, call, models):
    out = done(call("add", "0.txt", "notes", "more.jsonl", "-", stdin=TEXTS[7].encode()))
    assert "6 added, 0 replaced, 1 known before; 6 in all" in out
    assert "documents/s" in out
    assert "tokens/s" in out
    found = listed()
    assert {"0.txt", "notes/b.md", "notes/deeper/a.txt", "five"} < set(found)
    assert found["five"]["metadata"] == {"year": 2024, "tags": ["x"]}
    assert found["0.txt"]["metadata"] == {"source": "0.txt"}
    assert found["notes/deeper/a.txt"]["parts"] > 1

    model = MemoryModel.from_pretrained(models / "run" / "best", bank="memory.lance")
    answer = model.generate(QUESTION, max_new_tokens=64, do_sample=False)
    assert done(call("ask", QUESTION)).strip() == answer.strip()
    shown = done(call("ask", QUESTION, "--show", "--top-k", 2, "--max-new-tokens", 4, "--where", "year=2024"))
    assert "five" in shown
    assert "0.txt" not in shown
    assert "five" in done(call("list", "--where", "year=2024"))
    assert "five" not in done(call("list", "--where", 'year="2024"'))
    assert "the first 2 are shown" in done(call("list", "--limit", 2))

    before = max(v["version"] for v in MemoryBank("memory.lance").versions())
    assert "2 taken out; 4 left" in done(call("forget", "five", "0.txt"))
    failed(call("forget", "five", "0.txt"), 2, "no document five, 0.txt")
    assert set(listed()) == set(found) - {"five", "0.txt"}
    assert str(before) in done(call("versions"))
    done(call("restore", before))
    assert listed() == found
    said = done(call("stats"))
    assert "documents: 6" in said
    assert str(models / "run") in said or "pocket" in said


def test_the_same_again_adds_nothing_and_another_text_replaces(work, call):
    done(call("add", "0.txt", "1.txt"))
    assert "0 added, 0 replaced, 2 known before; 2 in all" in done(call("add", "0.txt", "1.txt"))
    (work / "0.txt").write_text(TEXTS[9])
    (work / "copy.txt").write_text(TEXTS[0])
    assert "1 added, 1 replaced, 1 known before; 3 in all" in done(call("add", "0.txt", "1.txt", "copy.txt"))
    assert set(listed()) == {"0.txt", "1.txt", "copy.txt"}


def test_the_bank_remembers_its_model(work, call, models):
    done(call("add", "0.txt", "--model", models / "other", "--bank", "b.lance"))
    assert json.loads((work / "b.lance" / "model.json").read_text())["model"] == str(models / "other")
    done(call("ask", QUESTION, "--bank", "b.lance", "--max-new-tokens", 2))
    failed(call("add", "1.txt", "--model", "pocket", "--bank", "b.lance"), 1, "another compressor")
    assert set(listed("b.lance")) == {"0.txt"}


def test_what_cannot_be_done_is_said_and_nothing_is_written(work, call):
    failed(call("add", "none.txt"), 2, "There is no file or folder 'none.txt'")
    failed(call("add", "0.txt", "--bank", "memory"), 2, "no name of a bank")
    failed(call("add", "0.txt", "--model", "nowhere"), 2, "There is no memory model in nowhere")
    (work / "empty.txt").write_text(" \n")
    failed(call("add", "empty.txt"), 1, "empty.txt", "1 skipped")
    for command in (["ask", QUESTION], ["list"], ["forget", "a"], ["stats"], ["versions"], ["restore", "1"]):
        failed(call(*command), 2, "There is no bank at memory.lance")
    assert not (work / "memory.lance").exists()
    done(call("add", "0.txt"))
    failed(call("restore", 99), 2, "no version 99")
    failed(call("list", "--where", "year"), 2, "--where year")
    failed(call("ask", " "), 2, "no question")


BAD_LINES = (
    '{"text": 1}',
    "[1]",
    "{",
    '{"text": " "}',
    '{"text": "a", "id": [1]}',
    '{"text": "a", "id": " "}',
    '{"text": "a", "id": "\\ud800"}',
    '{"text": "a", "": 1}',
    '{"text": "a", "x": NaN}',
)


def test_what_cannot_be_read_is_named_and_the_rest_is_added(work, call):
    (work / "notes" / "[a] empty.txt").write_text(" \n")
    (work / "notes" / "latin.md").write_bytes("Größe".encode("latin-1"))
    good = [json.dumps({"text": text}) for text in TEXTS[7:9]]
    (work / "notes" / "bad.jsonl").write_text("\n".join((good[0], *BAD_LINES, "", good[1])))
    result = call("add", "notes", "1.txt")
    failed(result, 1, "notes/[a] empty.txt", "empty", "notes/latin.md", "not UTF-8", f"{2 + len(BAD_LINES)} skipped")
    failed(result, 1, *(f"notes/bad.jsonl, line {number}" for number in range(2, 2 + len(BAD_LINES))))
    assert "5 added, 0 replaced, 0 known before; 5 in all" in result[1]
    assert {"notes/b.md", "notes/deeper/a.txt", "1.txt"} < set(listed())
    (work / "notes" / "latin.md").write_text("Größe")
    assert "1 added, 0 replaced, 5 known before; 6 in all" in call("add", "notes", "1.txt")[1]


def test_a_path_is_one_document_however_it_is_written(work, call):
    done(call("add", "./notes/b.md", "notes/../0.txt"))
    assert {name: d["metadata"] for name, d in listed().items()} == {
        "notes/b.md": {"source": "notes/b.md"},
        "0.txt": {"source": "0.txt"},
    }
    (work / "notes" / "b.md").write_text(TEXTS[9])
    (work / "0.txt").write_text(TEXTS[10])
    out = done(call("add", "notes/deeper/../b.md", "./0.txt"))
    assert "0 added, 2 replaced" in out
    assert "replaced:  notes/b.md, 0.txt\n" in out
    assert "2 taken out; 0 left" in done(call("forget", "./notes/b.md", "./0.txt"))


def test_an_answer_without_memories_is_said(work, call, models, tmp_path_factory, monkeypatch):
    done(call("add", "0.txt", "1.txt"))
    ask = ("ask", QUESTION, "--max-new-tokens", 2, "--show")
    _, out, err = call(*ask)
    assert "without a memory" not in err
    assert "not used" not in out
    assert "without a memory: no document has what --where asks for" in call(*ask, "--where", "year=1")[2]
    done(call("forget", "0.txt"))
    opening = MemoryModel.from_pretrained

    def strict(*args, **options):
        model = opening(*args, **options)
        model.settings = replace(model.settings, min_similarity=1.0)
        return model

    monkeypatch.setattr(MemoryModel, "from_pretrained", strict)
    _, out, err = call(*ask)
    assert "without a memory: the nearest is similar" in err
    assert "not used" in out
    done(call("forget", "1.txt"))
    assert "without a memory: the bank is empty" in call(*ask)[2]


def test_whoever_is_stopped_before_the_first_batch_has_named_the_model(work, call, models, monkeypatch):
    def stopped(*_):
        raise UsageError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryBank, "add", stopped)
        failed(call("add", "0.txt", "--model", models / "other"), 2, "stopped")
    assert json.loads((work / "memory.lance" / "model.json").read_text())["model"] == str(models / "other")
    done(call("add", "0.txt"))
    assert str(models / "other") in done(call("stats"))
    (work / "strange.lance").mkdir()
    (work / "strange.lance" / "mine").touch()
    failed(call("add", "0.txt", "--bank", "strange.lance"), 2, "holds mine and is no bank")
    assert [p.name for p in (work / "strange.lance").iterdir()] == ["mine"]


# --- other processes --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes():
    """Processes that need not import everything again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["twinweave.cli"])
    return context


def is_whole(path):
    """Every document of the bank has all its parts; their number."""
    bank = MemoryBank(path)
    if not bank.exists:
        return 0
    memories, documents = None, []
    while memories != bank.memories:  # until both are of one version, since another process adds meanwhile
        memories, documents = bank.memories, list(bank.documents())
    assert memories == sum(d["parts"] for d in documents)
    assert len({d["digest"] for d in documents}) == len(documents)
    return len(documents)


@pytest.mark.slow
def test_whoever_is_killed_leaves_whole_documents_and_the_same_command_does_the_rest(models, tmp_path, processes):
    file, bank, said = tmp_path / "all.jsonl", tmp_path / "bank.lance", tmp_path / "said.txt"
    texts = [text * (1 + 20 * (n % 5 == 0)) for n, text in enumerate(TEXTS)]
    file.write_text("".join(json.dumps({"text": text, "id": f"d{n}"}) + "\n" for n, text in enumerate(texts)))
    counts = []
    for moment in range(3):
        process = processes.Process(target=bank_processes.add, args=(file, bank, models / "other", said))
        process.start()
        while len(MemoryBank(bank)) < 8 * (moment + 1) and process.is_alive():
            time.sleep(0.01)
        time.sleep(random.Random(moment).random() * 0.2)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        counts.append(is_whole(bank))
    assert counts == sorted(counts)
    assert 0 < counts[0] < len(texts)
    process = processes.Process(target=bank_processes.add, args=(file, bank, models / "other", said))
    process.start()
    process.join()
    assert process.exitcode == 0
    expected = f"{len(texts) - counts[-1]} added, 0 replaced, {counts[-1]} known before; {len(texts)} in all"
    assert expected in said.read_text()
    assert is_whole(bank) == len(texts)


@pytest.mark.slow
def test_two_processes_read_whole_documents_while_one_writes(tmp_path, processes, monkeypatch):
    monkeypatch.setattr(upkeep, "_FILES", 8)  # files are put together meanwhile, too
    bank = MemoryBank(tmp_path / "bank.lance", "maker", (2, 16))

    def write(stamp, names=("a", "b", "c")):
        documents = []
        for name in names:
            parts = 1 + (stamp + ord(name[0])) % 5
            facts = {"stamp": stamp, "parts": parts}
            block, keys = torch.full((2, 16), float(stamp)), torch.randn(parts, 16)
            documents += [Memory(name, f"{name}{stamp}", keys[p], block, p, parts, 1, facts) for p in range(parts)]
        bank.add(documents)

    write(0)
    begun, rounds = [processes.Event() for _ in range(2)], [processes.Value("i", 0) for _ in range(2)]
    readers = [
        processes.Process(target=bank_processes.read, args=(bank.path, started, count))
        for started, count in zip(begun, rounds, strict=True)
    ]
    try:
        for reader, started in zip(readers, begun, strict=True):
            reader.start()
            assert started.wait(100)
        before = [count.value for count in rounds]
        for stamp in range(1, 30):
            write(stamp)
            if stamp % 7 == 0:
                bank.remove(["b"])
        meanwhile = [count.value for count in rounds]
        write(1, ["ready"])
        for reader in readers:
            reader.join(100)
            assert reader.exitcode == 0
        assert all(now > then for now, then in zip(meanwhile, before, strict=True))
    finally:
        for reader in readers:
            reader.kill()


def test_every_command_has_help_with_an_example(call):
    for command in ("add", "ask", "list", "forget", "stats", "versions", "restore"):
        assert f"twinweave memory {command}" in done(call(command, "--help"))
