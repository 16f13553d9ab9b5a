"""Aligned text tables for the terminal and Markdown tables for reports, from the same rows."""

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from molkd.pipeline.evaluation.gap import GapClosed
from molkd.pipeline.evaluation.seeds import SeedStat

_MISSING = "–"


@dataclass(frozen=True)
class Column:
    """One column: the key in the rows, the title above it, and how many digits numbers keep."""

    key: str
    title: str
    digits: int = 3  # significant ones


def format_number(value: float, digits: int = 3) -> str:
    """Write a number with `digits` significant digits and no exponent where that stays readable."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -4:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(digits - 1 - magnitude, 0)}f}"


def format_value(value: object, digits: int = 3) -> str:
    """Write one cell: text as it is, numbers rounded, statistics as "mean ± spread", nothing as a dash."""
    match value:
        case None:
            return _MISSING
        case SeedStat(mean=mean, spread=spread):
            return _with_spread(mean, spread, digits)
        case GapClosed(percent=percent, spread=spread, flag=flag):
            mark = " *" if percent is None and flag else ""
            return _with_spread(percent, spread, digits) + mark
        case bool() | str():
            return str(value)
        case int():
            return f"{value:,}"
        case float():
            return format_number(value, digits)
        case _:
            return str(value)


def format_table(rows: Sequence[Mapping[str, object]], columns: Sequence[Column | str]) -> str:
    """Return an aligned table for a terminal: a title line, a rule, one line a row; numbers to the right."""
    cols, cells = _cells(rows, columns)
    widths = [max(_width(line[i]) for line in cells) for i in range(len(cols))]
    left = [all(isinstance(row.get(c.key), str | None) for row in rows) for c in cols]
    lines = [
        "  ".join(_pad(t, w, a) for t, w, a in zip(line, widths, left, strict=True)).rstrip()
        for line in cells
    ]
    lines.insert(1, "  ".join("─" * w for w in widths))
    return "\n".join(lines)


def markdown_table(rows: Sequence[Mapping[str, object]], columns: Sequence[Column | str]) -> str:
    """Return the same table in Markdown."""
    cols, cells = _cells(rows, columns)
    text = [[cell.replace("|", "\\|") for cell in line] for line in cells]
    left = [all(isinstance(row.get(c.key), str | None) for row in rows) for c in cols]
    rule = [":--" if a else "--:" for a in left]
    return "\n".join("| " + " | ".join(line) + " |" for line in [text[0], rule, *text[1:]])


def _cells(
    rows: Sequence[Mapping[str, object]], columns: Sequence[Column | str]
) -> tuple[list[Column], list[list[str]]]:
    cols = [c if isinstance(c, Column) else Column(c, c) for c in columns]
    body = [[format_value(row.get(c.key), c.digits) for c in cols] for row in rows]
    return cols, [[c.title for c in cols], *body]


def _with_spread(mean: float | None, spread: float | None, digits: int) -> str:
    if mean is None:
        return _MISSING
    text = format_number(mean, digits)
    if spread is None or not math.isfinite(spread):
        return text
    # The spread has the decimals of the mean, no more are known; but a small one is not written as 0.
    decimals = len(text.partition(".")[2])
    same = f"{spread:.{decimals}f}"
    return f"{text} ± {same if 'e' not in text and float(same) > 0 else format_number(spread, 1)}"


def _width(text: str) -> int:
    return sum(not unicodedata.combining(c) for c in text)


def _pad(text: str, width: int, left: bool) -> str:
    fill = " " * (width - _width(text))
    return text + fill if left else fill + text
