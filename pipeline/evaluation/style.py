"""How pictures of a report look: one colour, marker and line a model everywhere, for light and dark pages.

A picture is drawn about as wide as a phone shows it, so that its letters stay readable there.
"""

import io
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molkd.pipeline.evaluation.document import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.4  # inches
# Neither light nor dark, so that they stand out on both pages; distinct for colour-blind readers together
# with their markers.
COLORS = ("#0072B2", "#D55E00", "#008F68", "#C2578F", "#A97800", "#7A5CC0")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
_LINES = ("-", "--", ":", "-.")
INK, GRID, PAPER = "#1c2331", "#d9dee4", "#fffffe"  # replaced in SVG, so no other part may have these colours
_DARK = {INK: "#dfe5ec", GRID: "#3a4450", PAPER: "#12161c"}
_DPI = 160
_FEW_DECADES, _MANY_DECADES = 50.0, 1e6
_SETTINGS = {
    "font.family": ["DejaVu Sans"],
    "font.size": 11.0,
    "axes.labelsize": 11.0,
    "axes.titlesize": 11.0,
    "legend.fontsize": 10.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "path",  # looks alike on every machine
    "svg.hashsalt": "molkd",  # the same picture is the same file
}


@dataclass(frozen=True)
class ModelStyle:
    """Of one model, in every picture."""

    color: str
    marker: str
    line: str


TEACHER = ModelStyle(INK, "*", "--")


def model_styles(names: Sequence[str]) -> dict[str, ModelStyle]:
    """Return a style for each group of runs by its name; the teacher's is `TEACHER`."""
    return {
        name: ModelStyle(
            COLORS[i % len(COLORS)], _MARKERS[i % len(_MARKERS)], _LINES[i // len(COLORS) % len(_LINES)]
        )
        for i, name in enumerate(names)
    }


@contextmanager
def drawing() -> Iterator[None]:
    """Set fonts and colours while figures are drawn and saved; matplotlib's own settings come back."""
    import matplotlib as mpl

    with mpl.rc_context(_SETTINGS):  # type: ignore[arg-type]
        yield


def new_figure(height: float, width: float = WIDTH) -> "Figure":
    """Return a figure of a size in inches, without window or global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI, facecolor="white")


def save_picture(figure: "Figure", folder: Path, path: str, alt: str) -> Picture:
    """Write a PNG at `path` below `folder` and return the picture with its SVG.

    Raises
    ------
    OSError
        If the PNG cannot be written.
    """
    save_figure(figure, folder / path)
    figure.set_layout_engine("none")  # all has its place now; finding it again would take half of the time
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    return Picture(path, alt, svg_of(figure), width, height)


def svg_of(figure: "Figure") -> str:
    """Return an SVG without background whose ink, grid and paper follow a light or dark page."""
    text = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(text, format="svg", dpi=_DPI, transparent=True, metadata=nothing)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]  # without the declaration of a document type on another server
    for variable, color in (("ink", INK), ("grid", GRID), ("paper", PAPER)):
        svg = svg.replace(color, f"var(--{variable})")
    return re.sub(r"(<svg[^>]*>)", lambda found: found[0] + _colors_of_page(), svg, count=1)


def _colors_of_page() -> str:
    light, dark = (
        f":root{{--ink:{c[INK]};--grid:{c[GRID]};--paper:{c[PAPER]}}}"
        for c in ({color: color for color in _DARK}, _DARK)
    )
    return f"<style>{light}@media (prefers-color-scheme:dark){{{dark}}}</style>"


def literal(text: str) -> str:
    """Return text that a picture shows as it is: in names, which are anybody's, `$` begins no formula."""
    return text.replace("$", r"\$")


def tidy(ax: "Axes", grid_axis: str = "both") -> None:
    """Take away the frame's upper and right side; put a quiet grid behind."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(visible=True, axis=grid_axis, which="major", color=GRID, lw=0.7)  # type: ignore[arg-type]
    ax.set_axisbelow(True)


def plain_log_axis(ax: "Axes", name: str) -> None:
    """Make an axis logarithmic with 20, 50, 100 instead of powers of ten where it spans few decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    (ax.set_xscale if name == "x" else ax.set_yscale)("log")
    axis = ax.xaxis if name == "x" else ax.yaxis
    low, high = axis.get_view_interval()
    if high / low < _MANY_DECADES:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < _FEW_DECADES else (1.0,)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def legend_below(figure: "Figure", entries: Mapping[str, Any]) -> None:
    """Explain what is drawn below all axes, one line a model; nothing to explain is fine."""
    if not entries:
        return
    labels = [literal(textwrap.fill(label, 44)) for label in entries]
    figure.legend(
        handles=entries.values(),
        labels=labels,
        loc="outside lower left",
        frameon=False,
        ncols=1,
        handlelength=2.6,
        borderaxespad=0.2,
        labelspacing=0.35,
    )
