"""Pictures of a report. Each function returns a figure of its own: no window, no global state."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from molkd.pipeline.evaluation.groups import Group
from molkd.pipeline.evaluation.metrics import REPORTED
from molkd.pipeline.evaluation.results import Row
from molkd.pipeline.evaluation.runs import Run
from molkd.pipeline.evaluation.tables import format_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which stays distinct for colour-blind readers; then the same colours, dashed.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLES = ("-", "--", ":")
_TEACHER = "#333333"
_CURVES = {"force_mae_meV_A": "validation force MAE (meV/Å)", "energy_mae_meV": "validation energy MAE (meV)"}
_DPI = 150


def _color_of(index: int) -> str:
    """Return the colour of the group at this place in the report."""
    return _COLORS[index % len(_COLORS)]


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI, facecolor="white")


def plot_learning_curves(groups: Sequence[Group]) -> "Figure | None":
    """Draw validation errors against steps and seconds; None if no run has validated twice.

    A line is the mean over seeds, its band reaches from the lowest to the highest seed. Against time every
    mean stands at the mean time of its step.
    """
    drawn = [
        (i, g, c) for i, g in enumerate(groups) if (c := {key: mean_curve(g.runs, key) for key in _CURVES})
    ]
    drawn = [(i, g, c) for i, g, c in drawn if any(curve is not None for curve in c.values())]
    if not drawn:
        return None
    from matplotlib.ticker import MaxNLocator

    figure = _figure(9.0, 6.4 + 0.22 * len(drawn))
    axes = figure.subplots(2, 2, sharey="row", sharex="col")
    for row, (key, title) in zip(axes, _CURVES.items(), strict=True):
        row[0].set_ylabel(title)
        for ax in row:
            ax.set_yscale("log")
            _tidy(ax)
            _plain_log_labels(ax)
        for index, group, curves in drawn:
            curve = curves[key]
            if curve is None:
                continue
            style = _STYLES[index // len(_COLORS) % len(_STYLES)]
            for ax, x in zip(row, (curve.steps, curve.seconds), strict=True):
                label = f"{group.name} ({_seeds(group)})"
                ax.plot(x, curve.mean, style, color=_color_of(index), lw=1.6, label=label)
                ax.fill_between(x, curve.lowest, curve.highest, color=_color_of(index), alpha=0.18, lw=0)
    axes[1, 0].set_xlabel("step")
    axes[1, 0].xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes[1, 1].set_xlabel("training time (s)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if not handles:
        handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", frameon=False, ncols=1 if len(drawn) > 2 else len(drawn)
    )
    return figure


@dataclass(frozen=True, eq=False)
class Curve:
    """A validation error over the steps that all seeds of a group have reached."""

    steps: NDArray[np.float64]
    seconds: NDArray[np.float64]  # mean over seeds
    mean: NDArray[np.float64]
    lowest: NDArray[np.float64]
    highest: NDArray[np.float64]


def mean_curve(runs: Sequence[Run], key: str) -> Curve | None:
    """Average `val_<key>` at the first seed's steps (others interpolated); None below two points."""
    series = []
    for run in runs:
        steps, values = run.curves.get("step"), run.curves.get(f"val_{key}")
        if steps is None or values is None:
            continue
        seconds = run.curves.get("seconds", np.full(len(steps), np.nan))
        present = ~np.isnan(values)
        if present.sum() > 1:
            series.append((steps[present], seconds[present], values[present]))
    if not series:
        return None
    last = min(steps[-1] for steps, _, _ in series)
    first = max(steps[0] for steps, _, _ in series)
    grid = series[0][0]
    grid = grid[(grid >= first) & (grid <= last)]
    if len(grid) < 2:
        return None
    values = np.stack([np.interp(grid, steps, v) for steps, _, v in series])  # (seeds, points)
    seconds = np.stack([np.interp(grid, steps, t) for steps, t, _ in series])
    return Curve(grid, seconds.mean(axis=0), values.mean(axis=0), values.min(axis=0), values.max(axis=0))


def plot_errors(rows: Sequence[Row]) -> "Figure | None":
    """Draw the error of every group; None if nothing was measured.

    Small points are seeds, a large one their mean, a bar the spread, a line the teacher.
    """
    keys = [key for key in ("energy_mae_meV", "force_mae_meV_A") if any(row.values.get(key) for row in rows)]
    if not keys:
        return None
    students = [row for row in rows if row.role != "teacher"]
    teachers = [row for row in rows if row.role == "teacher"]
    figure = _figure(9.0, 1.5 + 0.5 * max(len(students), 2))
    axes = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    places = np.arange(len(students))
    for ax, key in zip(axes, keys, strict=True):
        for y, row in zip(places, students, strict=True):
            _draw_seeds(ax, float(y), row, key)
        for row in teachers:
            value = row.metrics[key].mean
            if value is not None and np.isfinite(value):
                ax.axvline(
                    value, color=_TEACHER, ls="--", lw=1.2, label=f"{row.name} ({format_number(value)})"
                )
                ax.legend(
                    loc="lower left",
                    bbox_to_anchor=(0, 1),
                    frameon=False,
                    borderaxespad=0.2,
                    handlelength=1.6,
                )
        ax.set_xlabel(REPORTED[key].title)
        ax.set_xlim(0, 1.08 * _largest(rows, key))
        ax.set_ylim(len(students) - 0.5, -0.5)
        _tidy(ax, grid_axis="x")
    axes[0].set_yticks(places, [textwrap.fill(row.name, 30) for row in students])
    return figure


def _largest(rows: Sequence[Row], key: str) -> float:
    """Return where the longest error bar or the largest point ends."""
    ends = [v for row in rows for v in row.values.get(key, [])]
    ends += [(row.metrics[key].mean or 0.0) + (row.metrics[key].spread or 0.0) for row in rows]
    return max((v for v in ends if np.isfinite(v)), default=0.0) or 1.0


def _draw_seeds(ax: "Axes", y: float, row: Row, key: str) -> None:
    stat = row.metrics[key]
    values = [v for v in row.values.get(key, []) if np.isfinite(v)]
    if not values or stat.mean is None or not np.isfinite(stat.mean):
        reason = "not finite" if row.values.get(key) else "not measured"
        ax.text(0.02, y, reason, va="center", transform=ax.get_yaxis_transform())
        return
    color = _COLORS[0] if row.role == "without KD" else _COLORS[1]
    ax.errorbar(stat.mean, y, xerr=stat.spread, fmt="o", ms=7, color=color, capsize=3, elinewidth=1.4)
    ax.plot(values, np.full(len(values), y), "o", ms=3.5, mfc="white", mec=color, mew=0.9)
    ax.annotate(
        format_number(stat.mean),
        (stat.mean, y),
        xytext=(0, 8),
        textcoords="offset points",
        ha="center",
        fontsize=8,
    )


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _tidy(ax: "Axes", grid_axis: str = "both") -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(visible=True, axis=grid_axis, which="major", color="#DDDDDD", lw=0.6)  # type: ignore[arg-type]
    ax.set_axisbelow(True)


def _plain_log_labels(ax: "Axes") -> None:
    """Write 20, 50, 100 instead of powers of ten: errors seldom span more than two decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _seeds(group: Group) -> str:
    return f"{len(group.runs)} seeds" if len(group.runs) > 1 else "1 seed"
