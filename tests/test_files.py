"""A reader sees the old content or the new, and an error leaves the old."""

import json
import os
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from twinweave import files
from twinweave.errors import DamagedFileError
from twinweave.files import (
    atomic_directory,
    atomic_files_into,
    read_safetensors,
    write_json_atomic,
    write_text_atomic,
)


class Crash(Exception):
    """Stands for anything that goes wrong."""


def crash_after_writing(name, block):
    def write_and_crash():
        with block as folder:
            (folder / name).write_text("half")
            raise Crash

    with pytest.raises(Crash):
        write_and_crash()


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\r")))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_text_comes_back(tmp_path, text):
    write_text_atomic(tmp_path / "deep" / "er" / "file.txt", text)
    assert (tmp_path / "deep" / "er" / "file.txt").read_text(encoding="utf-8") == text
    assert names(tmp_path) == ["deep", "deep/er", "deep/er/file.txt"]


def test_text_replaces_only_when_it_is_complete(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    write_text_atomic(path, "old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_text_atomic(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_json(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json_atomic("value.json", {"name": "Zoë", "list": [1, 2.5, None]})
    assert json.loads((tmp_path / "value.json").read_text(encoding="utf-8")) == {"name": "Zoë", "list": [1, 2.5, None]}
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            write_json_atomic("value.json", {"bad": bad})
    assert "Zoë" in (tmp_path / "value.json").read_text(encoding="utf-8")
    assert names(tmp_path) == ["value.json"]


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    goal = tmp_path / "runs" / "one"
    crash_after_writing("half", atomic_directory(goal))
    assert names(tmp_path) == ["runs"]
    with atomic_directory(goal) as folder:
        (folder / "a").write_text("1")
        assert not goal.exists()
    assert names(tmp_path) == ["runs", "runs/one", "runs/one/a"]


def test_a_directory_is_replaced_or_kept(tmp_path):
    goal = tmp_path / "one"
    with atomic_directory(goal) as folder:
        (folder / "old").write_text("1")
    crash_after_writing("new", atomic_directory(goal))
    assert names(tmp_path) == ["one", "one/old"]
    with atomic_directory(goal) as folder:
        (folder / "new").write_text("2")
    assert names(tmp_path) == ["one", "one/new"]


def test_a_directory_is_kept_when_the_last_rename_fails(tmp_path, monkeypatch):
    goal, real, calls = tmp_path / "one", os.replace, []
    goal.mkdir()
    (goal / "old").write_text("1")

    def replace(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(OSError, match="No space"), atomic_directory(goal) as folder:
        (folder / "new").write_text("2")
    assert names(tmp_path) == ["one", "one/old"]


def test_a_directory_behind_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").write_text("1")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_directory(tmp_path / "link") as folder:
        (folder / "new").write_text("2")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path) == ["link", "real", "real/new"]


def test_files_join_those_that_are_there(tmp_path):
    goal = tmp_path / "shared"
    goal.mkdir()
    (goal / "mine").write_text("stays")
    (goal / "both").write_text("old")
    with atomic_files_into(goal) as folder:
        (folder / "both").write_text("new")
        (folder / "sub").mkdir()
        (folder / "sub" / "more").write_text("x")
        assert (goal / "both").read_text() == "old"
    assert names(tmp_path) == ["shared", "shared/both", "shared/mine", "shared/sub", "shared/sub/more"]
    assert (goal / "both").read_text() == "new"
    crash_after_writing("both", atomic_files_into(goal))
    assert (goal / "both").read_text() == "new"
    assert len(names(tmp_path)) == 5


def test_files_into_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with atomic_files_into(".") as folder:
        (folder / "a").write_text("1")
    with atomic_directory("run") as folder:
        (folder / "b").write_text("2")
    assert names(tmp_path) == ["a", "run", "run/b"]


@pytest.fixture
def tensors(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(100.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)}, path)
    return path


def test_safetensors_come_back(tensors):
    found = read_safetensors(str(tensors))
    assert torch.equal(found["a"], torch.arange(100.0))
    assert found["b"].dtype == torch.bfloat16


def test_every_truncation_is_noticed(tensors):
    content = tensors.read_bytes()
    for length in range(len(content)):
        tensors.write_bytes(content[:length])
        with pytest.raises(DamagedFileError, match=r"x\.safetensors"):
            read_safetensors(tensors)


def test_pickles_are_refused_unopened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "went off"),))

    path = tmp_path / "x.safetensors"
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(Bomb(), protocol=protocol))
        with pytest.raises(DamagedFileError, match="pickle"):
            read_safetensors(path)
    torch.save(Bomb(), path)
    with pytest.raises(DamagedFileError, match="pickle"):
        read_safetensors(path)
    for protocol in (0, 1):  # text pickles look like nothing in particular
        path.write_bytes(pickle.dumps(Bomb(), protocol=protocol))
        with pytest.raises(DamagedFileError):
            read_safetensors(path)
    assert not (tmp_path / "went off").exists()


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"\xff" * 64, b"<html>"]
)
def test_other_files_under_the_name(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match="damaged"):
        read_safetensors(path)


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path / "nothing.safetensors", tmp_path):
        with pytest.raises(DamagedFileError, match="does not exist"):
            read_safetensors(path)
