"""Parity plots: predicted against reference and the error below, models side by side on equal axes."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from molkd.pipeline.evaluation.result import Evaluation
from molkd.pipeline.evaluation.tables import format_number
from molkd.pipeline.units import MILLI

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure

Quantity = Literal["energy", "forces"]

MAX_POINTS = 3_000  # more are drawn as a density
_MEV_UP_TO = 3_000  # meV/atom; a wider range of energies is written in eV/atom
_POINT_COLOR = "#0072B2"
_LINE_COLOR = "#D55E00"
_TITLE_WIDTH = 30
_N_HEXAGONS = 60
_BACKGROUND = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1.5}  # of text over points
_MARGIN = 0.04
_SHOWN = 0.998  # share of a panel's errors that the error axis holds at least


@dataclass(frozen=True, eq=False)
class Panel:
    """One model of a parity figure."""

    title: str  # may hold line breaks
    evaluation: Evaluation


@dataclass(frozen=True, eq=False)
class _Points:
    label: NDArray[np.float64]  # eV/atom or eV/A
    error: NDArray[np.float64]  # the same unit, prediction minus label


def plot_parity(panels: Sequence[Panel], quantity: Quantity) -> "Figure":
    """Draw one column per model: prediction against label on top, error against label below.

    Energies are per atom and relative to the mean label, so that differences show beside large totals; forces
    are components of free atoms. The panels of a row share their axes; many points are drawn as a density
    with one colour scale. The MAE in a panel is that of the whole data set, per atom for energies.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    points = [_points(panel.evaluation, quantity) for panel in panels]
    labels = np.concatenate([p.label for p in points])
    center = labels.mean() if quantity == "energy" and len(labels) else 0.0
    in_milli = quantity == "energy" and bool(len(labels)) and np.ptp(labels) * MILLI <= _MEV_UP_TO
    scale, prefix = (MILLI, "m") if in_milli else (1.0, "")
    per = "/atom" if quantity == "energy" else "/Å"

    xs = [(p.label - center) * scale for p in points]
    ys = [x + p.error * scale for x, p in zip(xs, points, strict=True)]
    errors = [p.error * MILLI for p in points]
    limits, error_limit = _span([*xs, *ys]), _error_limit(errors)

    figure = Figure(figsize=(1.3 + 2.9 * len(panels), 5.4), layout="constrained")
    axes = figure.subplots(
        2, len(panels), sharex=True, sharey="row", squeeze=False, gridspec_kw={"height_ratios": (2.7, 1)}
    )
    densities = []
    for (top, bottom), panel, x, y, error in zip(axes.T, panels, xs, ys, errors, strict=True):
        top.set_title(
            "\n".join(textwrap.fill(line, _TITLE_WIDTH) for line in panel.title.splitlines()), fontsize=10
        )
        top.axline((0, 0), slope=1, color=_LINE_COLOR, lw=1, zorder=3)
        bottom.axhline(0, color=_LINE_COLOR, lw=1, zorder=3)
        densities += [
            _draw(top, x, y, (*limits, *limits), 1.0),
            _draw(bottom, x, error, (*limits, -error_limit, error_limit), 2.7),
        ]
        top.text(
            0.04,
            0.96,
            _mae_text(panel.evaluation, quantity),
            transform=top.transAxes,
            va="top",
            bbox=_BACKGROUND,
        )
        n_outside = int((np.abs(error) > error_limit).sum())
        if n_outside:
            bottom.text(
                0.98,
                0.97,
                f"{n_outside} beyond",
                transform=bottom.transAxes,
                ha="right",
                va="top",
                fontsize=8,
            )
        for ax in (top, bottom):
            ax.spines[["top", "right"]].set_visible(False)
            ax.tick_params(labelsize=9)
    axes[1, 0].xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes[0, 0].set_xlim(limits)
    axes[0, 0].set_ylim(limits)
    axes[1, 0].set_ylim(-error_limit, error_limit)
    axes[0, 0].set_ylabel(f"predicted ({prefix}eV{per})")
    axes[1, 0].set_ylabel(f"error (meV{per})")
    name = "energy per atom, relative to the mean" if quantity == "energy" else "force component"
    figure.supxlabel(f"reference {name} ({prefix}eV{per})", fontsize=10)
    _share_colors(figure, axes, [d for d in densities if d is not None])
    return figure


def _points(evaluation: Evaluation, quantity: Quantity) -> _Points:
    parity = evaluation.parity
    if quantity == "energy":
        return _Points(
            parity.energy_label / parity.n_atoms, (parity.energy_pred - parity.energy_label) / parity.n_atoms
        )
    return _Points(parity.forces_label.ravel(), (parity.forces_pred - parity.forces_label).ravel())


def _mae_text(evaluation: Evaluation, quantity: Quantity) -> str:
    metrics = evaluation.metrics
    if quantity == "energy":
        return f"MAE {format_number(metrics.energy_mae_per_atom * MILLI)} meV/atom"
    return f"MAE {format_number(metrics.force_mae * MILLI)} meV/Å"


def _span(values: Sequence[NDArray[np.float64]]) -> tuple[float, float]:
    """Return lowest and highest of all, with a margin; (-1, 1) without points."""
    everything = np.concatenate(values)
    if not len(everything):
        return -1.0, 1.0
    low, high = float(everything.min()), float(everything.max())
    margin = _MARGIN * (high - low) or 1.0
    return low - margin, high + margin


def _error_limit(errors: Sequence[NDArray[np.float64]]) -> float:
    """Return where the error axis ends: a few outliers, counted instead, shall not flatten the rest."""
    largest = [float(np.quantile(np.abs(e), _SHOWN)) for e in errors if len(e)]
    return (1 + 2 * _MARGIN) * max(largest, default=0.0) or 1.0


def _draw(
    ax: "Axes",
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    extent: tuple[float, float, float, float],
    aspect: float,
) -> "PolyCollection | None":
    """Draw points, or their density if there are many; `aspect` (width over height) keeps hexagons even."""
    if len(x) <= MAX_POINTS:
        ax.plot(x, y, "o", ms=3, color=_POINT_COLOR, alpha=0.45, mew=0, rasterized=True)
        return None
    size = (_N_HEXAGONS, max(int(_N_HEXAGONS / aspect / 1.73), 1))
    return ax.hexbin(x, y, gridsize=size, extent=extent, mincnt=1, cmap="viridis", linewidths=0.1)


def _share_colors(figure: "Figure", axes: NDArray[np.object_], densities: Sequence["PolyCollection"]) -> None:
    """Give all densities one logarithmic colour scale and one bar that explains it."""
    if not densities:
        return
    from matplotlib.colors import LogNorm

    highest = max(float(np.max(d.get_array())) for d in densities)  # type: ignore[arg-type]
    norm = LogNorm(1, max(highest, 10.0))
    for density in densities:
        density.set_norm(norm)
    bar = figure.colorbar(densities[0], ax=axes, shrink=0.7, pad=0.01)
    bar.set_label("points per cell")
