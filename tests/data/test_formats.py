import json
import sys
from types import ModuleType

import datasets
import pytest

from twinweave.data import load_rows
from twinweave.errors import DataError, UsageError

ROWS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(5)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_all(folder):
    data = datasets.Dataset.from_list(ROWS)
    data.to_csv(folder / "rows.csv", index=False)
    data.to_parquet(folder / "rows.parquet")
    data.save_to_disk(str(folder / "saved"))
    datasets.DatasetDict({"train": data, "dev": data.select([0])}).save_to_disk(str(folder / "splits"))
    return write_jsonl(folder / "rows.jsonl", ROWS)


def test_every_format_gives_the_same_rows(tmp_path):
    write_all(tmp_path)
    for name in ("rows.jsonl", "rows.csv", "rows.parquet", "saved", "splits"):
        assert load_rows(tmp_path / name).to_list() == ROWS, name
        assert load_rows(str(tmp_path / name), limit=2).to_list() == ROWS[:2], name
        assert load_rows(tmp_path / name, limit=99).to_list() == ROWS, name


def test_split_of_a_saved_dictionary(tmp_path):
    write_all(tmp_path)
    assert load_rows(tmp_path / "splits", split="dev").to_list() == ROWS[:1]
    with pytest.raises(DataError, match=r"Unknown split 'developer'. Did you mean 'dev'"):
        load_rows(tmp_path / "splits", split="developer")


def test_a_folder_goes_the_way_of_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    write_jsonl(folder / "train.jsonl", ROWS)
    write_jsonl(folder / "test.jsonl", ROWS[:2])
    assert load_rows(folder).to_list() == ROWS
    assert load_rows(folder, split="test").to_list() == ROWS[:2]
    with pytest.raises(DataError, match="nonsense"):
        load_rows(folder, split="nonsense")


def test_hub_name_and_config_reach_the_library(monkeypatch):
    calls = []

    def fake(name, config, split):
        calls.append((name, config, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert load_rows("org/name:config", limit=1).to_list() == ROWS[:1]
    assert len(load_rows("name", split="dev")) == 5
    assert calls == [("org/name", "config", "train"), ("name", None, "dev")]


def test_hub_failure_says_where_it_looked(monkeypatch, tmp_path):
    def fake(*args, **kwargs):
        raise ConnectionError("no network\nmany more lines")

    monkeypatch.setattr(datasets, "load_dataset", fake)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no network") as caught:
        load_rows("data/train.txt")
    assert str(tmp_path / "data/train.txt") in str(caught.value)
    assert "many more lines" not in str(caught.value)


def test_pocket_rows(monkeypatch):
    module = ModuleType("twinweave.pocket")

    def rows(name):
        if name != "people/test":
            raise UsageError(f"unknown {name}")
        return ROWS

    module.rows = rows
    monkeypatch.setitem(sys.modules, "twinweave.pocket", module)
    assert load_rows("pocket:people/test", limit=3).to_list() == ROWS[:3]
    with pytest.raises(UsageError, match="unknown other"):
        load_rows("pocket:other")


def test_csv_cells_stay_text(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('question,answer\n"one, two",007\nq,NA\n,1e3\n', encoding="utf-8")
    assert load_rows(path).to_list() == [
        {"question": "one, two", "answer": "007"},
        {"question": "q", "answer": "NA"},
        {"question": "", "answer": "1e3"},
    ]


def test_blank_lines_byte_order_mark_and_ragged_rows(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"b": "two \xe2\x80\xa8 parts"}\n')
    assert load_rows(path).to_list() == [{"a": 1, "b": None}, {"a": None, "b": "two \u2028 parts"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"a": 1}\n\n{"a": \n', "broken JSON on line 3"),
        ("x.jsonl", b'{"a": 1}\n[1, 2]\n', "line 2 is not a JSON object"),
        ("x.jsonl", b"", "no rows"),
        ("x.jsonl", b"\n\n", "no rows"),
        ("x.jsonl", b'{"a": "\xff"}\n', "not UTF-8"),
        ("x.jsonl", b'{"a": "x"}\n{"a": ["x"]}\n', "mixes kinds"),
        ("x.csv", b"", "empty"),
        ("x.csv", b"a,b\n", "no rows"),
        ("x.csv", b"a,b\n1,2\n1,2,3,4\n", "line 3"),
        ("x.parquet", b"not parquet", "not a readable Parquet"),
        ("x.txt", b"hello", "suffix '.txt'"),
    ],
)
def test_unreadable_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_rows(path)
    assert str(path) in str(caught.value)


def test_missing_files_say_the_full_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in ("data/train.jsonl", "./nothing", "/nowhere/at/all", "a b/c d"):
        with pytest.raises(DataError, match="looked for") as caught:
            load_rows(source)
        assert str((tmp_path / source).absolute()) in str(caught.value).replace("/./", "/")


def test_damaged_saved_folder(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read"):
        load_rows(tmp_path)


def test_limit_must_be_positive(tmp_path):
    with pytest.raises(DataError, match="limit is 0"):
        load_rows(write_all(tmp_path), limit=0)
