"""Where models are wrong: errors by element, size and other groups, quantiles, and the worst systems."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from molkd.pipeline.evaluation.best import is_finite
from molkd.pipeline.evaluation.breakdown import Breakdown
from molkd.pipeline.evaluation.document import Block, Details, Table, table_of
from molkd.pipeline.evaluation.groups import Group
from molkd.pipeline.evaluation.metrics import REPORTED, TERMS
from molkd.pipeline.evaluation.result import Evaluation
from molkd.pipeline.evaluation.results import GAPS, Evaluations, Row, TeacherResult
from molkd.pipeline.evaluation.seeds import SeedStat
from molkd.pipeline.evaluation.tables import Column

_MOST_KEYS = 12  # columns of a table; the largest groups
_MOST_WORST = 10  # systems of a table
_RANKED = {"energy": "energy", "forces": "a force"}

Models = Mapping[str, Sequence[Evaluation]]  # by name of the row; a group has one for each seed


def evaluations_of(
    dataset: str, groups: Sequence[Group], teacher: TeacherResult | None, evaluations: Evaluations
) -> dict[str, list[Evaluation]]:
    """Return what was measured on a data set, by the names that rows of its table have."""
    found: dict[str, list[Evaluation]] = {}
    if teacher is not None and dataset in teacher.evaluations:
        found[f"teacher: {teacher.name}"] = [teacher.evaluations[dataset]]
    for group in groups:
        its = [e for run in group.runs if (e := evaluations.get(run.path, {}).get(dataset)) is not None]
        found |= {group.name: its} if its else {}
    return found


def breakdown_blocks(dataset: str, rows: Sequence[Row], models: Models) -> Iterator[Block]:
    """Return what stands below the pictures of a data set, each to be opened on demand."""
    kinds = dict.fromkeys(kind for its in models.values() for e in its for kind in e.breakdowns)
    for kind in kinds:
        tables = [t for key in GAPS if (t := _by_kind(dataset, kind, key, models)) is not None]
        if tables:
            yield Details(f"Errors by {_words(kind)}", tuple(tables))
    tails = [t for by in _RANKED if (t := _tails(dataset, by, models)) is not None]
    if tails:
        yield Details("How errors are spread", tuple(tails))
    worst = list(_worst(dataset, rows, models))
    if worst:
        yield Details("The worst systems", tuple(worst))


def _by_kind(dataset: str, kind: str, key: str, models: Models) -> Table | None:
    """Return a table of one error, a row a model, a column a group of systems or atoms."""
    found = {
        name: [e.breakdowns[kind].in_ranges() for e in its if kind in e.breakdowns]
        for name, its in models.items()
    }
    found = {name: its for name, its in found.items() if its}
    first = next(iter(found.values()), None)
    if first is None or len(first[0].keys) < 2 or (first[0].of_atoms and key != "force_mae_meV_A"):
        return None
    keys = _largest(first[0])
    values = {name: [_values(b, key) for b in its] for name, its in found.items()}
    lines: list[dict[str, object]] = [
        {"name": name, **{k: SeedStat.of(of_run.get(k) for of_run in its) for k in keys}}
        for name, its in values.items()
    ]
    shown = [k for k in keys if any(_stat(line[k]).mean is not None for line in lines)]
    if not shown:
        return None
    left_out = len(first[0].keys) - len(keys)
    note = f" ({left_out} smaller groups are not shown)" if left_out else ""
    caption = f"{REPORTED[key].title} on {dataset} by {_words(kind)}{note}"
    return table_of(caption, lines, [Column("name", "model"), *(Column(k, k) for k in shown)])


def _largest(breakdown: Breakdown) -> list[str]:
    """Return the keys of the largest groups, in the breakdown's own order."""
    count = breakdown.terms[:, TERMS.index("n_force_atoms" if breakdown.of_atoms else "n_systems")]
    kept = sorted(range(len(breakdown.keys)), key=lambda i: -count[i])[:_MOST_KEYS]
    return [breakdown.keys[i] for i in sorted(kept)]


def _values(breakdown: Breakdown, key: str) -> dict[str, float | None]:
    return {group: metrics.to_report()[key] for group, metrics in breakdown.metrics().items()}


def _tails(dataset: str, by: str, models: Models) -> Table | None:
    """Return quantiles of absolute errors, a row a model."""
    unit = "meV" if by == "energy" else "meV/Å"
    reports = {
        name: [tail.to_report("value") for e in its if (tail := _tail(e, by)) is not None]
        for name, its in models.items()
    }
    reports = {name: its for name, its in reports.items() if its}
    if not reports:
        return None
    keys = list(next(iter(reports.values()))[0])
    lines: list[dict[str, object]] = [
        {"name": name, **{key: SeedStat.of(report.get(key) for report in its) for key in keys}}
        for name, its in reports.items()
    ]
    columns = [Column("name", "model"), *(Column(key, _quantile(key, unit)) for key in keys)]
    what = "Absolute energy errors of systems" if by == "energy" else "Absolute errors of force components"
    return table_of(f"{what} on {dataset}: what share lies below", lines, columns)


def _tail(evaluation: Evaluation, by: str) -> Any:
    return evaluation.energy_tail if by == "energy" else evaluation.force_tail


def _quantile(key: str, unit: str) -> str:
    """Return the title of a column of `Tail.to_report`."""
    if key.startswith("p"):
        return f"{key.removeprefix('p').partition('_')[0]} % ({unit})"
    return f"largest ({unit})" if key.startswith("max") else "worst 1 % of errors hold (%)"


def _worst(dataset: str, rows: Sequence[Row], models: Models) -> Iterator[Table]:
    """Return the worst systems of the best student by energy and of that by forces, of the lowest seed."""
    for by, key in zip(_RANKED, GAPS, strict=True):
        students = [
            r for r in rows if r.role != "teacher" and r.name in models and is_finite(r.metrics[key].mean)
        ]
        best = min(students, key=lambda row: row.metrics[key].mean or 0.0, default=None)
        systems = models[best.name][0].worst.get(by, ()) if best is not None else ()
        if best is None or not systems:
            continue
        lines = [system.to_report() for system in systems[:_MOST_WORST]]
        columns = [
            Column("source", "system"),
            Column("formula", "formula"),
            Column("n_atoms", "atoms"),
            Column("energy_error_meV", "energy error (meV)"),
            Column("force_error_meV_A", "largest force error (meV/Å)"),
            Column("atom", "at atom"),
        ]
        caption = f"Largest errors in {_RANKED[by]} on {dataset}: {best.name}"
        yield table_of(caption, lines, columns, code=frozenset({"source"}))


def _words(kind: str) -> str:
    return {"size": "number of atoms", "source": "file"}.get(kind, kind.removeprefix("info:"))


def _stat(value: object) -> SeedStat:
    assert isinstance(value, SeedStat)
    return value
