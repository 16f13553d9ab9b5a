"""Aligned text tables for the terminal, Markdown tables for reports and CSV, from rows of values."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from molkd.pipeline.evaluation.gap import GapClosed
from molkd.pipeline.evaluation.seeds import SeedStat

_MISSING = "–"
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # with these a spreadsheet begins to calculate


@dataclass(frozen=True)
class Column:
    """One column: the key in the rows, the title above it, and how numbers are rounded."""

    key: str
    title: str  # may hold line breaks, which a terminal shows
    digits: int = 3  # significant ones
    decimals: int | None = None  # wins over `digits`


def format_number(value: float, digits: int = 3, decimals: int | None = None) -> str:
    """Write a number with `decimals`, or `digits` significant digits; exponents only for tiny ones."""
    if not math.isfinite(value):
        return str(value)
    if decimals is not None:
        return f"{value:.{decimals}f}"
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -4:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(digits - 1 - magnitude, 0)}f}"


def format_value(value: object, digits: int = 3, decimals: int | None = None) -> str:
    """Write one cell: text as it is, numbers rounded, statistics as "mean ± spread", nothing as a dash."""
    match value:
        case None:
            return _MISSING
        case SeedStat(mean=mean, spread=spread):
            return _with_spread(mean, spread, digits, decimals)
        case GapClosed(percent=percent, spread=spread, flag=flag):
            mark = " *" if percent is None and flag else ""
            return _with_spread(percent, spread, digits, decimals) + mark
        case int() if not isinstance(value, bool):
            return f"{value:,}"
        case float():
            return format_number(value, digits, decimals)
        case _:
            return str(value)


def format_table(rows: Sequence[Mapping[str, object]], columns: Sequence[Column | str]) -> str:
    """Return an aligned table for a terminal: titles, a rule, one line a row; numbers to the right."""
    cols = _as_columns(columns)
    titles = [c.title.split("\n") for c in cols]
    height = max(len(lines) for lines in titles)
    head = [[lines[i] if i < len(lines) else "" for lines in titles] for i in range(height)]
    body = _cells(rows, cols)
    widths = [max(len(line[i]) for line in [*head, *body]) for i in range(len(cols))]
    left = [_is_text(rows, c) for c in cols]

    def join(line: Sequence[str]) -> str:
        padded = (t.ljust(w) if a else t.rjust(w) for t, w, a in zip(line, widths, left, strict=True))
        return "  ".join(padded).rstrip()

    rule = "  ".join("─" * w for w in widths)
    return "\n".join([*map(join, head), rule, *map(join, body)])


def markdown_table(rows: Sequence[Mapping[str, object]], columns: Sequence[Column | str]) -> str:
    """Return the same table in Markdown."""
    cols = _as_columns(columns)
    head = [c.title.replace("\n", " ") for c in cols]
    return markdown_grid(head, [_is_text(rows, c) for c in cols], _cells(rows, cols))


def markdown_grid(head: Sequence[str], is_text: Sequence[bool], body: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of finished cells; text to the left, numbers to the right."""
    rule = [":--" if text else "--:" for text in is_text]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in body]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *cells])


def csv_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Return rows as CSV under the keys of the first; no text in it is a formula to a spreadsheet."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _harmless(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _harmless(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _as_columns(columns: Sequence[Column | str]) -> list[Column]:
    return [c if isinstance(c, Column) else Column(c, c) for c in columns]


def _cells(rows: Sequence[Mapping[str, object]], cols: Sequence[Column]) -> list[list[str]]:
    return [[format_value(row.get(c.key), c.digits, c.decimals) for c in cols] for row in rows]


def _is_text(rows: Sequence[Mapping[str, object]], column: Column) -> bool:
    return all(isinstance(row.get(column.key), str | None) for row in rows)


def _with_spread(mean: float | None, spread: float | None, digits: int, decimals: int | None) -> str:
    if mean is None:
        return _MISSING
    text = format_number(mean, digits, decimals)
    if spread is None or not math.isfinite(spread):
        return text
    # The spread has the decimals of the mean, no more are known; but a small one is not written as 0.
    same = f"{spread:.{len(text.partition('.')[2])}f}" if "e" not in text else ""
    return f"{text} ± {same if same and (float(same) > 0 or spread == 0) else format_number(spread, 1)}"
