"""Lambda scans: groups that differ in the weight of one KD term only, and a picture of error against it."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from molkd.pipeline.evaluation.groups import Group
from molkd.pipeline.evaluation.metrics import REPORTED
from molkd.pipeline.evaluation.results import Row
from molkd.pipeline.evaluation.runs import term_label
from molkd.pipeline.evaluation.style import (
    INK,
    PAPER,
    TEACHER,
    ModelStyle,
    legend_below,
    literal,
    new_figure,
    plain_log_axis,
    tidy,
)
from molkd.pipeline.evaluation.tables import format_value

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEAST = 3  # weights; two are no scan


@dataclass(frozen=True)
class Point:
    """One group of a scan."""

    weight: float  # lambda; of `auto` and `balance` the number it came to, mean over seeds
    is_auto: bool  # chosen by the data
    group: str


@dataclass(frozen=True)
class Scan:
    """Groups that differ in one lambda only."""

    student: str
    term: str  # whose weight changes: n2n, n2n:U4
    others: str  # the remaining KD terms with their weights, empty if there are none
    baseline: str | None  # name of the group without KD
    points: tuple[Point, ...]  # by weight

    @property
    def title(self) -> str:
        """The scan in words."""
        return f"{self.student}, λ of {self.term}" + (f" beside {self.others}" if self.others else "")


def find_scans(groups: Sequence[Group], baselines: Mapping[str, str | None]) -> list[Scan]:
    """Return every set of at least three groups whose KD differs in one weight, and nothing else does.

    Parameters
    ----------
    baselines : name of the group without KD for each name of a group with KD
    """
    found: dict[str, list[tuple[Point, Group]]] = {}
    terms: dict[str, tuple[str, str]] = {}
    for group in groups:
        config = group.runs[0].config
        kd = [dict(term) for term in config.get("kd") or ()]
        for i, term in enumerate(kd):
            weight = _weight(group, term)
            if weight is None:
                continue
            others = [t for j, t in enumerate(kd) if j != i]
            same = {k: v for k, v in term.items() if k != "weight"}
            rest = {"teacher": config.get("teacher"), "pseudo": config.get("pseudo_labels")}
            what = [group.student, group.runs[0].settings, same, sorted(map(_plain, others)), rest]
            key = _plain(what)
            terms[key] = (term_label(term), " + ".join(sorted(map(_with_weight, others))))
            found.setdefault(key, []).append(
                (Point(weight, isinstance(term.get("weight", "auto"), str), group.name), group)
            )
    scans = []
    for key, members in found.items():
        if len({point.weight for point, _ in members}) < _LEAST:
            continue
        points = tuple(sorted((p for p, _ in members), key=lambda p: p.weight))
        group = members[0][1]
        scans.append(Scan(group.student, *terms[key], baselines.get(group.name), points))
    return scans


def _weight(group: Group, term: Mapping[str, Any]) -> float | None:
    """Return a term's lambda, as resolved in the runs where it was `auto`; None if that is not known."""
    label, given = term_label(term), term.get("weight", "auto")
    if not isinstance(given, str):
        return float(given)
    values = [run.summary.get("kd", {}).get(label) for run in group.runs]
    usable = [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v) and v > 0]
    return statistics.geometric_mean(usable) if usable else None


def _plain(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _with_weight(term: Mapping[str, object]) -> str:
    weight = term.get("weight", "auto")
    return f"{term_label(term)}={weight if isinstance(weight, str) else f'{weight:g}'}"


def plot_scan(scan: Scan, rows: Sequence[Row], key: str, styles: Mapping[str, ModelStyle]) -> "Figure | None":
    """Draw one error against lambda with its spread; None below two measured weights.

    Lines are the student without KD, with a band for its spread, and the teacher.
    """
    by_name = {row.name: row for row in rows}
    measured = [
        (point, mean, by_name[point.group].metrics[key].spread)
        for point in scan.points
        if point.group in by_name and (mean := _mean(by_name[point.group], key)) is not None
    ]
    if len(measured) < 2:
        return None
    figure = new_figure(3.7)
    ax = figure.subplots()
    handles: dict[str, object] = {}
    weights, means = [p.weight for p, _, _ in measured], [mean for _, mean, _ in measured]
    ax.plot(weights, means, "-", color=INK, lw=1.1, alpha=0.6, zorder=1)
    for point, mean, spread in measured:
        style = styles[point.group]
        drawn = ax.errorbar(
            point.weight, mean, yerr=spread, fmt=style.marker, ms=7.5, color=style.color, capsize=3,
            mfc=PAPER if point.is_auto else style.color, mew=1.6, elinewidth=1.4,
        ).lines[0]  # fmt: skip
        handles |= {"open: λ chosen from the data": drawn} if point.is_auto else {}
    for row in rows:
        value, spread = _mean(row, key), row.metrics[key].spread
        if value is None or (row.role != "teacher" and row.name != scan.baseline):
            continue
        style = styles.get(row.name, TEACHER)
        line = ax.axhline(value, color=style.color, ls="--" if row.role == "teacher" else "-", lw=1.4)
        handles[f"{row.name} ({format_value(row.metrics[key])})"] = line
        if spread:
            ax.axhspan(value - spread, value + spread, color=style.color, alpha=0.15, lw=0)
    ax.set_title(REPORTED[key].title, loc="left")
    ax.set_xlabel(literal(f"λ of {scan.term}"))
    plain_log_axis(ax, "x")
    tidy(ax)
    legend_below(figure, handles)
    return figure


def _mean(row: Row, key: str) -> float | None:
    value = row.metrics[key].mean
    return value if value is not None and math.isfinite(value) else None
