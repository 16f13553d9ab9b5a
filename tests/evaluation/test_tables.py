"""Tables: alignment, rounding, missing values."""

import csv
import io

import pytest

from molkd.pipeline.evaluation.gap import GapClosed
from molkd.pipeline.evaluation.seeds import SeedStat
from molkd.pipeline.evaluation.tables import (
    Column,
    csv_table,
    format_number,
    format_table,
    format_value,
    markdown_table,
)


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (86.43, 3, "86.4"), (0.98612, 3, "0.986"), (1234.5, 3, "1234"), (0.0, 3, "0"), (-9.81, 2, "-9.8"),
        (3.2e-7, 2, "3.2e-07"), (float("nan"), 3, "nan"), (0.999996, 4, "1.0000"),
    ],
)  # fmt: skip
def test_numbers_keep_significant_digits(value, digits, text):
    assert format_number(value, digits) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (SeedStat(86.43, 1.26, 3), "86.4 ± 1.3"),
        (SeedStat(86.43, None, 1), "86.4"),
        (SeedStat(None, None, 0), "–"),
        (SeedStat(1234.0, 0.04, 3), "1234 ± 0.04"),
        (GapClosed(59.1, 4.2), "59.1 ± 4.2"),
        (GapClosed(None, None, "no gap"), "– *"),
        (1_234_567, "1,234,567"),
        ("painn", "painn"),
    ],
)
def test_cells(value, text):
    assert format_value(value) == text


def test_terminal_table_lines_up():
    rows = [
        {"name": "teacher", "mae": 7.0, "n": 600_000},
        {"name": "student, none", "mae": SeedStat(25.6, 0.5, 3), "n": None},
    ]
    table = format_table(
        rows, [Column("name", "model"), Column("mae", "force MAE (meV/Å)"), Column("n", "n")]
    )
    assert table.splitlines() == [
        "model          force MAE (meV/Å)        n",
        "─────────────  ─────────────────  ───────",
        "teacher                     7.00  600,000",
        "student, none         25.6 ± 0.5        –",
    ]


def test_markdown_escapes_and_aligns():
    text = markdown_table([{"a": "x|y", "b": 1.0}], ["a", "b"])
    assert text.splitlines() == ["| a | b |", "| :-- | --: |", "| x\\|y | 1.00 |"]


def test_empty_table_has_its_titles():
    assert format_table([], ["a"]).splitlines()[0] == "a"


@pytest.mark.parametrize("name", ["=HYPERLINK(1)", "+1", "-a", "@SUM(A1)", "\t=1"])
def test_a_spreadsheet_calculates_nothing_from_names(name):
    """Numbers stay numbers, negative ones too."""
    text = csv_table([{"name": name, "error": -1.5, "n": None}])
    assert list(csv.reader(io.StringIO(text))) == [["name", "error", "n"], [f"'{name}", "-1.5", ""]]
