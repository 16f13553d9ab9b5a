"""Learning curves: what metrics.csv logged, mean and range over seeds, against steps or time."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from molkd.pipeline.evaluation.groups import Group
from molkd.pipeline.evaluation.runs import Run
from molkd.pipeline.evaluation.style import (
    ModelStyle,
    legend_below,
    literal,
    new_figure,
    plain_log_axis,
    tidy,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VALIDATION = {
    "val_energy_mae_meV": "validation energy MAE (meV)",
    "val_force_mae_meV_A": "validation force MAE (meV/Å)",
}
BASE_LOSS = {
    "train_loss": "training loss, all terms weighted",
    "train_energy": "energy loss, normalised",
    "train_forces": "forces loss, normalised",
}
_PANEL_HEIGHT = 2.3  # inches


@dataclass(frozen=True, eq=False)
class Curve:
    """A logged value over the steps that all seeds of a group have reached."""

    steps: NDArray[np.float64]
    seconds: NDArray[np.float64]  # mean over seeds
    mean: NDArray[np.float64]
    lowest: NDArray[np.float64]
    highest: NDArray[np.float64]


def mean_curve(runs: Sequence[Run], column: str) -> Curve | None:
    """Average a column at the first seed's steps (others interpolated); None below two points."""
    series = []
    for run in runs:
        steps, values = run.curves.get("step"), run.curves.get(column)
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


def kd_columns(groups: Sequence[Group]) -> dict[str, str]:
    """Return the columns of the KD terms, unweighted, with their titles, as `train_<term>` names them."""
    terms = {label for g in groups for run in g.runs for label in run.summary.get("kd") or {}}
    return {f"train_{label}": f"{label} loss, unweighted" for label in sorted(terms)}


def cka_columns(groups: Sequence[Group]) -> dict[str, str]:
    """Return the columns that hold similarities (CKA), if training logged any."""
    every = {column for g in groups for run in g.runs for column in run.curves}
    columns = {column for column in every if "cka" in column and not column.startswith("train_")}  # no losses
    return {column: f"CKA with the teacher, {column.removeprefix('cka_')}" for column in sorted(columns)}


def plot_curves(
    groups: Sequence[Group],
    styles: Mapping[str, ModelStyle],
    columns: Mapping[str, str],
    *,
    against: str = "step",
    log_scale: bool = True,
) -> "Figure | None":
    """Draw one panel a column, one above the other; None if no group logged any of them twice.

    A line is the mean over seeds, its band reaches from the lowest to the highest seed.

    Parameters
    ----------
    columns : of metrics.csv, with the titles of their axes
    against : "step", or "seconds"; every mean then stands at the mean time of its step
    log_scale : False for what may be zero or below
    """
    found = {column: _curves(groups, column) for column in columns}
    found = {column: curves for column, curves in found.items() if curves}
    if not found:
        return None
    figure = new_figure(0.4 + _PANEL_HEIGHT * len(found) + 0.2 * len(groups))
    axes = figure.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0]
    handles: dict[str, object] = {}
    for ax, (column, curves) in zip(axes, found.items(), strict=True):
        ax.set_title(literal(textwrap.fill(columns[column], 44)), loc="left")
        for group, curve in curves:
            handles |= {_name(group): _draw(ax, curve, styles[group.name], against)}
        tidy(ax)
        if log_scale and all(curve.lowest.min() > 0 for _, curve in curves):
            plain_log_axis(ax, "y")
    _label_time(axes[-1], against)
    legend_below(figure, {_name(g): handles[_name(g)] for g in groups if _name(g) in handles})
    return figure


def _curves(groups: Sequence[Group], column: str) -> list[tuple[Group, Curve]]:
    return [(group, c) for group in groups if (c := mean_curve(group.runs, column)) is not None]


def _draw(ax: "Axes", curve: Curve, style: ModelStyle, against: str) -> object:
    x = curve.steps if against == "step" else curve.seconds
    (line,) = ax.plot(
        x,
        curve.mean,
        style.line,
        color=style.color,
        lw=1.7,
        marker=style.marker,
        ms=4.5,
        markevery=max(len(x) // 6, 1),
    )
    ax.fill_between(x, curve.lowest, curve.highest, color=style.color, alpha=0.2, lw=0)
    return line


def _label_time(ax: "Axes", against: str) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_xlabel("step" if against == "step" else "training time (s)")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=against == "step"))


def _name(group: Group) -> str:
    return f"{group.name} ({len(group.runs)} {'seeds' if len(group.runs) > 1 else 'seed'})"
