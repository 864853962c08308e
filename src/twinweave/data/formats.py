"""Reading rows: from files, from folders, from the hub, from the embedded pocket world.

Knows nothing about what the columns mean, about tokens or about models.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pyarrow.parquet
from datasets.table import InMemoryTable

from twinweave.errors import DataError, unknown_name

JSONL_SUFFIXES = (".jsonl", ".ndjson")
FILE_SUFFIXES = (*JSONL_SUFFIXES, ".csv", ".parquet")
POCKET_PREFIX = "pocket:"
_SAVED_MARKERS = ("state.json", "dataset_dict.json")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


def load_rows(
    source: str | os.PathLike[str], *, split: str | None = None, limit: int | None = None
) -> datasets.Dataset:
    """Read a data set as rows with named columns.

    Args:
        source: a `.jsonl`, `.csv` or `.parquet` file; a folder written by `datasets.save_to_disk`, or any other
            folder that `datasets.load_dataset` understands; `pocket:NAME` for the embedded world; otherwise a name
            on the hub, `org/name` or `org/name:config`.
        split: which split of a folder or of a hub name (default "train"). A single file has no splits and ignores it.
        limit: take the first rows only.

    Raises:
        DataError: the source does not exist, cannot be read, has no such split, or has no rows.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; it must be at least 1, or left out to take every row.")
    name = os.fspath(source)
    path = Path(name).expanduser()
    if name.startswith(POCKET_PREFIX):
        rows = _pocket_rows(name.removeprefix(POCKET_PREFIX))
    elif path.is_dir():
        rows = _read_folder(path, split)
    elif path.is_file() or path.suffix.lower() in FILE_SUFFIXES:
        rows = _read_file(path, limit)
    elif isinstance(source, str) and _HUB_NAME.fullmatch(name) and name[0] != ".":
        rows = _load_dataset(name, split)
    else:
        raise DataError(f"No data at '{name}': looked for {path.absolute()}. Check the path.")
    if len(rows) == 0:
        raise DataError(f"'{name}' has no rows. Give a data set with at least one row.")
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def _pocket_rows(name: str) -> datasets.Dataset:
    from twinweave.pocket import rows

    return _from_dicts(rows(name), f"{POCKET_PREFIX}{name}")


def _read_file(path: Path, limit: int | None) -> datasets.Dataset:
    if not path.exists():
        raise DataError(f"Data file '{path}' does not exist: looked for {path.absolute()}. Check the path.")
    suffix = path.suffix.lower()
    if suffix in JSONL_SUFFIXES:
        return _read_jsonl(path, limit)
    if suffix == ".csv":
        return _read_csv(path, limit)
    if suffix == ".parquet":
        return _read_parquet(path)
    raise DataError(
        f"Data file '{path}' has the suffix '{suffix}', which is not read. Give one of: {', '.join(FILE_SUFFIXES)}."
    )


def _read_jsonl(path: Path, limit: int | None) -> datasets.Dataset:
    rows: list[dict[str, Any]] = []
    for number, line in _text_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"'{path}' has broken JSON on line {number}: {error}. Mend or remove it.") from error
        if not isinstance(row, dict):
            raise DataError(
                f"'{path}' line {number} is not a JSON object but {line.strip()[:60]!r}. "
                'Write one object per line, for example {"prompt": "...", "completion": "..."}.'
            )
        rows.append(row)
        if len(rows) == limit:
            break
    return _from_dicts(rows, str(path))


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from enumerate(file, start=1)
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is not UTF-8 text ({error.reason}). Save it as UTF-8.") from error


def _read_csv(path: Path, limit: int | None) -> datasets.Dataset:
    try:
        # Every cell stays the text it is: "007", "NA" and "1e3" are answers too.
        table = pandas.read_csv(path, dtype=str, keep_default_na=False, nrows=limit, encoding="utf-8-sig")
    except pandas.errors.EmptyDataError as error:
        raise DataError(f"'{path}' is empty. Give a CSV file with a header line and rows.") from error
    except (pandas.errors.ParserError, UnicodeDecodeError) as error:
        raise DataError(f"'{path}' is not a readable CSV file: {str(error).strip()}.") from error
    return datasets.Dataset.from_pandas(table, preserve_index=False)


def _read_parquet(path: Path) -> datasets.Dataset:
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"'{path}' is not a readable Parquet file: {error}.") from error
    return datasets.Dataset(InMemoryTable(table))


def _read_folder(path: Path, split: str | None) -> datasets.Dataset:
    if not any((path / marker).exists() for marker in _SAVED_MARKERS):
        return _load_dataset(str(path), split)
    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise DataError(f"The saved data set '{path}' cannot be read: {error}.") from error
    if isinstance(saved, datasets.Dataset):
        return saved
    wanted = split or "train"
    if wanted not in saved:
        raise DataError(f"{unknown_name('split', wanted, saved)} (in '{path}')")
    return saved[wanted]


def _load_dataset(name: str, split: str | None) -> datasets.Dataset:
    is_folder = Path(name).is_dir()
    repository, _, config = (name, "", "") if is_folder else name.partition(":")
    try:
        return datasets.load_dataset(repository, config or None, split=split or "train")
    except Exception as error:  # the library raises a dozen types, from network errors to its own
        looked = "" if is_folder else f" There is no file or folder {Path(name).absolute()} either."
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"Cannot load '{name}' (split '{split or 'train'}') with datasets.load_dataset: {reason}.{looked} "
            "Check the name, its config (`org/name:config`) and the split."
        ) from error


def _from_dicts(rows: list[dict[str, Any]], name: str) -> datasets.Dataset:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    try:
        return datasets.Dataset.from_dict({column: [row.get(column) for row in rows] for column in columns})
    except (pyarrow.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"'{name}' mixes kinds of values within one column ({str(error).strip()}). "
            "Give every row the same kind, for example text in all rows or a list of texts in all rows."
        ) from error
