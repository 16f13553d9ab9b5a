"""Which students are best, by a stated rule, and what the first lines of a report say of them."""

import math
from collections.abc import Mapping, Sequence

from molkd.pipeline.evaluation.document import Mark, Tile
from molkd.pipeline.evaluation.metrics import REPORTED
from molkd.pipeline.evaluation.results import GAPS, Row
from molkd.pipeline.evaluation.seeds import SeedStat
from molkd.pipeline.evaluation.tables import format_value

RULE = (
    "★ marks the best mean of a column among the runs of one student, ☆ every other mean that lies within "
    "the best one's spread over seeds. The teacher is not marked, nor a column in which all are equal."
)
_WORDS = {"energy_mae_meV": "energy MAE", "force_mae_meV_A": "force MAE"}
_UNITS = {"energy_mae_meV": "meV", "force_mae_meV_A": "meV/Å"}


def best_marks(rows: Sequence[Row], students: Mapping[str, str]) -> list[dict[str, Mark]]:
    """Return the marks of each row by metric.

    Parameters
    ----------
    students : the student's name for each name of a group; marks are given within a student
    """
    marks: list[dict[str, Mark]] = [{} for _ in rows]
    for student in dict.fromkeys(students.values()):
        mine = [i for i, row in enumerate(rows) if students.get(row.name) == student]
        for key, spec in REPORTED.items():
            stats = {i: rows[i].metrics[key] for i in mine if is_finite(rows[i].metrics[key].mean)}
            if len({stat.mean for stat in stats.values()}) < 2:
                continue
            best = _best(stats, larger_is_better=spec.larger_is_better)
            for i, stat in stats.items():
                if stat.mean == stats[best].mean:
                    marks[i][key] = Mark.BEST
                elif _is_near(stat, stats[best]):
                    marks[i][key] = Mark.NEAR
    return marks


def best_tiles(tables: Mapping[str, Sequence[Row]], baselines: Mapping[str, str | None]) -> list[Tile]:
    """Return the best student by energy and by forces on every data set, with its share of the gap closed.

    Parameters
    ----------
    baselines : name of the group without KD for each name of a group with KD
    """
    tiles = []
    for dataset, rows in tables.items():
        for key in GAPS:
            students = [r for r in rows if r.role != "teacher" and is_finite(r.metrics[key].mean)]
            if students:
                best = _best({i: r.metrics[key] for i, r in enumerate(students)}, larger_is_better=False)
                row = students[best]
                tiles.append(_tile(dataset, key, row, baselines.get(row.name), rows))
    return tiles


def _tile(dataset: str, key: str, best: Row, baseline: str | None, rows: Sequence[Row]) -> Tile:
    seeds = f"{best.n_seeds} seeds" if best.n_seeds > 1 else "1 seed"
    notes = [f"{best.name}, {seeds}"]
    gap = best.gaps.get(key)
    if gap is not None and gap.percent is not None:
        notes.append(f"{format_value(gap, decimals=1)} % of the gap closed")
    elif gap is not None:
        notes.append(f"gap closed: {gap.flag}")
    for row in rows:
        is_other = row.role == "teacher" or row.name == baseline
        if is_other and row.name != best.name and is_finite(row.metrics[key].mean):
            word = "teacher" if row.role == "teacher" else "without KD"
            notes.append(f"{word} {format_value(row.metrics[key])}")
    value = f"{format_value(best.metrics[key])} {_UNITS[key]}"
    return Tile(f"Best {_WORDS[key]}, {dataset}", value, "; ".join(notes))


def _best(stats: Mapping[int, SeedStat], *, larger_is_better: bool) -> int:
    sign = -1.0 if larger_is_better else 1.0
    return min(stats, key=lambda i: sign * (stats[i].mean or 0.0))


def _is_near(stat: SeedStat, best: SeedStat) -> bool:
    assert stat.mean is not None
    assert best.mean is not None
    return abs(stat.mean - best.mean) <= (best.spread or 0.0)


def is_finite(value: float | None) -> bool:
    """Say whether there is a number."""
    return value is not None and math.isfinite(value)
