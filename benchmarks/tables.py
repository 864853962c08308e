"""A result as a table, in the terminal and in Markdown. Knows the result file's keys and nothing else."""

from typing import Any

from rich.console import Console
from rich.table import Table

Result = dict[str, Any]


def quantity(value: float, unit: str) -> str:
    """A measurement with a unit that suits its size."""
    if unit == "bytes":
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.2f} ms"


def ratio(value: dict[str, Any]) -> str:
    """A ratio with its 10 and 90 % quantiles."""
    return f"{value['median']:.2f}× ({value['low']:.2f}–{value['high']:.2f})"


def cells(result: Result, part: str) -> tuple[list[str], list[list[str]]]:
    """The header and the lines of one part: the case, then the "medians" of the systems or their "ratios"."""
    rows = [row for row in result["rows"] if row[part]]
    case = list(dict.fromkeys(name for row in rows for name in row["case"]))
    names = list(dict.fromkeys(name for row in rows for name in row[part]))

    def value(row: Result, name: str) -> str:
        if name not in row[part]:
            return ""
        return ratio(row[part][name]) if part == "ratios" else quantity(row[part][name], row["unit"])

    header = [name.replace("_", " ").replace("/", " / ") for name in (*case, *names)]
    return header, [[*(str(row["case"].get(c, "")) for c in case), *(value(row, n) for n in names)] for row in rows]


def print_tables(result: Result) -> None:
    """Medians and ratios on standard output."""
    for part in ("medians", "ratios"):
        header, lines = cells(result, part)
        if lines:
            title = f"{result['kind']}, {result['settings']['shape']}, {result['provenance']['device']}: {part}"
            table = Table(*header, title=title)
            for line in lines:
                table.add_row(*line)
            # a file or a narrow terminal gets whole words all the same
            Console(width=None if Console().width >= 160 else 160).print(table)


def markdown(result: Result, part: str) -> str:
    """One part as a Markdown table."""
    header, lines = cells(result, part)
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])
