"""Pictures of errors: of every model, and against its speed."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from molkd.pipeline.evaluation.metrics import REPORTED
from molkd.pipeline.evaluation.results import GAPS, Row
from molkd.pipeline.evaluation.style import (
    GRID,
    PAPER,
    TEACHER,
    ModelStyle,
    legend_below,
    literal,
    new_figure,
    plain_log_axis,
    tidy,
)
from molkd.pipeline.evaluation.tables import format_number, format_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ERRORS = tuple(GAPS)  # what is drawn: energy and force MAE
_NAME_WIDTH = 36  # characters of a name above its dot
_LINE = 0.18  # inches of one such line
_DOTS = 0.36  # inches below the name: the dot in the middle, then the next name


def plot_errors(rows: Sequence[Row], key: str, styles: Mapping[str, ModelStyle]) -> "Figure | None":
    """Draw one error of every student, name and value above it; None if none was measured.

    Small points are seeds, a large one their mean, a bar the spread, a line the teacher.
    """
    if not any(row.values.get(key) for row in rows):
        return None
    students = [row for row in rows if row.role != "teacher"]
    names = [textwrap.fill(row.name, _NAME_WIDTH) for row in students]
    heights = [_DOTS + _LINE * (1 + name.count("\n")) for name in names]
    figure = new_figure(1.0 + sum(heights))
    ax = figure.subplots()
    top = 0.0
    for row, name, height in zip(students, names, heights, strict=True):
        _draw_student(ax, top, top + height - 0.22, name, row, key, styles[row.name])
        top += height
        ax.axhline(top - 0.05, color=GRID, lw=0.8, zorder=0)
    for row in rows:
        value = row.metrics[key].mean
        if row.role == "teacher" and value is not None and np.isfinite(value):
            line = ax.axvline(value, color=TEACHER.color, ls=TEACHER.line, lw=1.3)
            legend_below(figure, {f"{row.name} ({format_number(value)})": line})
    ax.set_title(REPORTED[key].title, loc="left")
    ax.set_xlim(0, 1.08 * _largest(rows, key))
    ax.set_ylim(top, 0)
    ax.set_yticks([])
    tidy(ax, grid_axis="x")
    ax.spines["left"].set_visible(False)
    return figure


def _draw_student(ax: "Axes", top: float, y: float, name: str, row: Row, key: str, style: ModelStyle) -> None:
    stat = row.metrics[key]
    values = [v for v in row.values.get(key, []) if np.isfinite(v)]
    is_measured = bool(values) and stat.mean is not None and np.isfinite(stat.mean)
    reason = "not finite" if row.values.get(key) else "not measured"
    text = format_value(stat) if is_measured else reason
    place: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "va": "top", "fontsize": 10}
    place["bbox"] = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.8}
    ax.text(0.0, top, literal(name), **place)
    ax.text(1.0, top, text, ha="right", **place)
    if not is_measured:
        return
    ax.errorbar(
        np.array(stat.mean),
        y,
        xerr=stat.spread,
        fmt=style.marker,
        ms=7,
        color=style.color,
        capsize=3,
        elinewidth=1.5,
    )
    if len(values) > 1:
        ax.plot(values, np.full(len(values), y), "o", ms=3.2, mfc=PAPER, mec=style.color, mew=0.9)


def _largest(rows: Sequence[Row], key: str) -> float:
    """Return where the longest error bar or the largest point ends."""
    ends = [v for row in rows for v in row.values.get(key, [])]
    ends += [(row.metrics[key].mean or 0.0) + (row.metrics[key].spread or 0.0) for row in rows]
    return max((v for v in ends if np.isfinite(v)), default=0.0) or 1.0


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the (speed, error) pairs that no other beats in both, from the fastest to the most accurate."""
    best: list[tuple[float, float]] = []
    for speed, error in sorted(points, key=lambda point: (-point[0], point[1])):
        if not best or error < best[-1][1]:
            best.append((speed, error))
    return best


def plot_speed(rows: Sequence[Row], key: str, styles: Mapping[str, ModelStyle]) -> "Figure | None":
    """Draw one error against throughput, a marker a model; None below two models with both.

    Bars are spreads over seeds. The line joins the models that no other beats in both.
    """
    drawn = [
        row
        for row in rows
        if _is_positive(row.systems_per_second.mean) and _is_positive(row.metrics[key].mean)
    ]
    if len(drawn) < 2:
        return None
    figure = new_figure(3.4 + 0.2 * len(drawn))
    ax = figure.subplots()
    points: list[tuple[float, float]] = []
    handles: dict[str, object] = {}
    for row in drawn:
        style = styles.get(row.name, TEACHER)
        speed, error = row.systems_per_second, row.metrics[key]
        assert speed.mean is not None
        assert error.mean is not None
        points.append((speed.mean, error.mean))
        handles[row.name] = ax.errorbar(
            speed.mean,
            error.mean,
            xerr=speed.spread,
            yerr=error.spread,
            fmt=style.marker,
            ms=13 if row.role == "teacher" else 7.5,
            color=style.color,
            capsize=2.5,
            elinewidth=1.3,
        ).lines[0]
    front = pareto(points)
    handles["best at its speed (Pareto line)"] = ax.plot(
        *zip(*front, strict=True), "-", color=TEACHER.color, lw=1.0, alpha=0.6, zorder=0
    )[0]
    ax.set_xlabel("systems per second")
    ax.set_title(REPORTED[key].title, loc="left")
    speeds = [speed for speed, _ in points]
    ax.set_xlim(min(speeds) / 1.6, max(speeds) * 1.6)
    plain_log_axis(ax, "x")
    ax.set_ylim(0, 1.12 * _largest(drawn, key))
    tidy(ax)
    legend_below(figure, handles)
    return figure


def _is_positive(value: float | None) -> bool:
    return value is not None and np.isfinite(value) and value > 0
