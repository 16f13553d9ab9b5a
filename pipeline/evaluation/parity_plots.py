"""Parity plots: predicted against reference and the error below, one figure a model on equal axes."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from molkd.pipeline.evaluation.result import Evaluation
from molkd.pipeline.evaluation.style import COLORS, INK, literal, new_figure, tidy
from molkd.pipeline.evaluation.tables import format_number
from molkd.pipeline.units import MILLI

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

Quantity = Literal["energy", "forces"]
QUANTITIES: tuple[Quantity, ...] = ("energy", "forces")

MAX_POINTS = 3_000  # more are drawn as a density
_MEV_UP_TO = 3_000  # meV/atom; a wider range of energies is written in eV/atom
_WIDTH, _HEIGHT = 3.3, 4.6  # inches
_TITLE_WIDTH = 42
_N_HEXAGONS = 60
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


def plot_parity(panels: Sequence[Panel], quantity: Quantity) -> "list[Figure]":
    """Draw one figure per model: prediction against label on top, error against label below.

    Energies are per atom and relative to the mean label, so that differences show beside large totals; forces
    are components of free atoms. The figures share their axes and, where many points are drawn as a density,
    the scale of its colours. The MAE in a figure is that of the whole data set, per atom for energies.
    """
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
    titles = [
        "\n".join(textwrap.fill(line, _TITLE_WIDTH) for line in panel.title.splitlines()) for panel in panels
    ]
    lines = max(title.count("\n") for title in titles)
    titles = [title + "\n\u00a0" * (lines - title.count("\n")) for title in titles]  # axes of equal height
    axes = _Axes(limits, error_limit, f"{prefix}eV{per}", f"meV{per}", quantity)
    drawn = [
        _draw_model(title, _mae_text(panel.evaluation, quantity), x, y, error, axes)
        for title, panel, x, y, error in zip(titles, panels, xs, ys, errors, strict=True)
    ]
    _share_colors([(figure, density) for figure, densities in drawn for density in densities])
    return [figure for figure, _ in drawn]


@dataclass(frozen=True)
class _Axes:
    """What all figures of a row share."""

    limits: tuple[float, float]
    error_limit: float  # meV
    unit: str
    error_unit: str
    quantity: Quantity


def _draw_model(
    title: str,
    mae: str,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    error: NDArray[np.float64],
    axes: _Axes,
) -> "tuple[Figure, list[PolyCollection]]":
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(_HEIGHT, _WIDTH)
    top, bottom = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (2.7, 1)})
    figure.suptitle(literal(title), fontsize=10, x=0.02, ha="left")
    top.axline((0, 0), slope=1, color=INK, lw=0.9, zorder=3)
    bottom.axhline(0, color=INK, lw=0.9, zorder=3)
    limits, error_limit = axes.limits, axes.error_limit
    densities = [
        _draw(top, x, y, (*limits, *limits), 1.0),
        _draw(bottom, x, error, (*limits, -error_limit, error_limit), 2.7),
    ]
    n_outside = int((np.abs(error) > error_limit).sum())
    top.set_title(mae, loc="right", fontsize=10)
    if n_outside:
        bottom.set_title(f"{n_outside} beyond the axis", loc="right", fontsize=8.5, pad=2)
    for ax in (top, bottom):
        tidy(ax)
        ax.tick_params(labelsize=9)
    for axis, most in ((bottom.xaxis, 4), (top.yaxis, 5), (bottom.yaxis, 3)):
        axis.set_major_locator(MaxNLocator(nbins=most))
    top.set_xlim(limits)
    top.set_ylim(limits)
    bottom.set_ylim(-error_limit, error_limit)
    name = "energy" if axes.quantity == "energy" else "force component"
    top.set_ylabel(f"predicted ({axes.unit})", fontsize=10)
    bottom.set_ylabel(f"error\n({axes.error_unit})", fontsize=10)
    bottom.set_xlabel(f"reference {name} ({axes.unit})", fontsize=10)
    return figure, [d for d in densities if d is not None]


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
    """Draw points, or their density if there are many; `aspect` (width over height) keeps hexagons even.

    Both become pixels inside an SVG: thousands of paths would make the page slow.
    """
    if len(x) <= MAX_POINTS:
        ax.plot(x, y, "o", ms=2.8, color=COLORS[0], alpha=0.5, mew=0, rasterized=True)
        return None
    size = (_N_HEXAGONS, max(int(_N_HEXAGONS / aspect / 1.73), 1))
    return ax.hexbin(
        x, y, gridsize=size, extent=extent, mincnt=1, cmap=_colors(), linewidths=0.1, rasterized=True
    )


def _colors() -> "Colormap":
    """Return viridis without its darkest quarter, which would hide single points on a dark page."""
    import matplotlib as mpl
    from matplotlib.colors import ListedColormap

    return ListedColormap(mpl.colormaps["viridis"](np.linspace(0.25, 1.0, 256)))


def _share_colors(drawn: "Sequence[tuple[Figure, PolyCollection]]") -> None:
    """Give all densities one logarithmic colour scale; every figure has a bar that explains it."""
    if not drawn:
        return
    from matplotlib.colors import LogNorm

    highest = max(float(np.max(d.get_array())) for _, d in drawn)  # type: ignore[arg-type]
    norm = LogNorm(1, max(highest, 10.0))
    for _, density in drawn:
        density.set_norm(norm)
    for figure, density in {id(figure): (figure, density) for figure, density in drawn}.values():
        bar = figure.colorbar(density, ax=figure.axes, orientation="horizontal", pad=0.02, aspect=40)
        bar.set_label("points per cell", fontsize=8.5)
        bar.ax.tick_params(labelsize=8.5)
