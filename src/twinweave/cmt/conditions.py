"""Conditions on a bank's documents as LanceDB's SQL. Knows nothing about models or files."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import UsageError
from .rows import json_value

_LISTED = 500  # ids or digests that one condition names


def sql_of(where: str | Mapping[str, Any] | None) -> str | None:
    """A condition on metadata as SQL: every key has the value, or one of the values of a list.

    Values are compared as JSON has them: 1 is 1.0 and is neither "1" nor true; None is a null that was given. A text is
    SQL already. Raises UsageError for a key without a letter, and for a value that is no JSON.
    """
    if where is None or isinstance(where, str):
        return where if where and where.strip() else None
    parts = []
    for key, value in where.items():
        if not isinstance(key, str) or not key:
            raise UsageError(f"{key!r} is no name of metadata. Give one of at least a letter.")
        values = list(value) if isinstance(value, list | tuple | set) else [value]
        forms = [form for one in values for form in _forms(one)]
        path = f"$.{json.dumps(key, ensure_ascii=False)}"
        parts.append(f"json_extract(metadata, {quoted(path)}) IN ({listed(forms)})" if forms else "false")
    return all_of(*parts)


def all_of(*conditions: str | None) -> str | None:
    """Those of the conditions that there are, together."""
    return " AND ".join(f"({condition})" for condition in conditions if condition) or None


def one_of(column: str, values: Sequence[str]) -> Iterator[str]:
    """Conditions, each of some of the values, that together say that the column has one of them."""
    for start in range(0, len(values), _LISTED):
        yield f"{column} IN ({listed(values[start : start + _LISTED])})"


def listed(values: Sequence[str]) -> str:
    """Texts in a list of SQL."""
    return ", ".join(quoted(value) for value in values)


def quoted(text: str) -> str:
    """A text in SQL."""
    return "'" + text.replace("'", "''") + "'"


def _forms(value: Any) -> list[str]:
    """How the same value can be written."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**53 and value == int(value):
        return [str(int(value)), json_value(float(value))]
    return [json_value(value)]
