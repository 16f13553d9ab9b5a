"""Heat map of a comparison by CKA: one cell a pair of features, named on both axes, 0 to 1."""

import textwrap
from typing import TYPE_CHECKING

import numpy as np

from molkd.pipeline.evaluation.cka_result import CKAResult, short_tap
from molkd.pipeline.evaluation.style import literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CELL = 0.5  # inch
_SMALLEST_CELL = 0.2  # inch; with more features than fit, cells shrink to this
_LARGEST = 9.0  # inch, of the map
_ANNOTATED_CELL = 0.34  # inch; smaller cells hold no number
_LETTER = 0.1  # inch
_BRIGHT = 0.6  # above it the colour is light enough for black numbers


def plot_cka(result: CKAResult) -> "Figure":
    """Draw the values; the first layers are at the bottom and at the left."""
    from matplotlib.figure import Figure

    n_rows, n_columns = result.values.shape
    cell = min(_CELL, max(_LARGEST / max(n_rows, n_columns), _SMALLEST_CELL))
    width, height = cell * n_columns, cell * n_rows
    width, height = max(width, 2.6), max(height, 1.6)
    figure = Figure(figsize=(width + 1.9, height + 1.5), layout="constrained")
    ax = figure.subplots()
    image = ax.imshow(result.values, origin="lower", cmap="viridis", vmin=0, vmax=1)
    ax.set_facecolor("#CCCCCC")  # shows where there is no value
    names = [literal(short_tap(name)) for name in result.columns]
    is_crowded = max(map(len, names)) * _LETTER > cell
    ax.set_xticks(range(n_columns), names, rotation=90 if is_crowded else 0)
    ax.set_yticks(range(n_rows), [literal(short_tap(name)) for name in result.rows])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel(literal(textwrap.fill(result.b, int(width / _LETTER))))
    ax.set_ylabel(literal(textwrap.fill(result.a, int(height / _LETTER))))
    ax.set_title(literal(f"{result.n_atoms:,} atoms of {result.data}"), fontsize="medium")
    if cell >= _ANNOTATED_CELL:
        _write_values(ax, result)
    figure.colorbar(image, ax=ax, label="CKA", shrink=min(1.0, max(2.2 / height, 0.5)))
    return figure


def _write_values(ax: "Axes", result: CKAResult) -> None:
    for (row, column), value in np.ndenumerate(result.values):
        text = "–" if np.isnan(value) else f"{value:.2f}"
        color = "black" if np.isnan(value) or value > _BRIGHT else "white"
        ax.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
