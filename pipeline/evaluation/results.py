"""Numbers of a report: per data set one row for the teacher and one for each group of runs."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from molkd.pipeline.config import SplitGroup
from molkd.pipeline.errors import ConfigError
from molkd.pipeline.evaluation.gap import GapClosed, gap_closed
from molkd.pipeline.evaluation.groups import Group, comparisons
from molkd.pipeline.evaluation.metrics import REPORTED
from molkd.pipeline.evaluation.result import Evaluation
from molkd.pipeline.evaluation.runs import Run
from molkd.pipeline.evaluation.seeds import SeedStat
from molkd.pipeline.evaluation.splits import mean_report, split_groups
from molkd.pipeline.evaluation.tables import Column

GAPS = {"energy_mae_meV": "gap closed, energy (%)", "force_mae_meV_A": "gap closed, forces (%)"}
VALIDATION = "validation"  # stands for a test set where no run has one
_THROUGHPUT = "systems_per_second"
_END_TO_END = "end_to_end_per_second"

_UNKNOWN = SeedStat(None, None, 0)

Evaluations = Mapping[Path, Mapping[str, Evaluation]]  # run folder -> data set -> evaluation


@dataclass(frozen=True, eq=False)
class TeacherResult:
    """The teacher's accuracy by data set, with the keys of `Metrics.to_report` and systems_per_second."""

    name: str
    test: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    n_parameters: int | None = None
    evaluations: Mapping[str, Evaluation] = field(default_factory=dict)  # win over `test`

    def values(self, dataset: str) -> dict[str, float | None]:
        """Return what is known on a data set, empty if nothing is."""
        evaluation = self.evaluations.get(dataset)
        return {**self.test.get(dataset, {}), **(evaluation.to_report() if evaluation else {})}


@dataclass(frozen=True, eq=False)
class Row:
    """One line of the table: the teacher, or a group of runs over its seeds."""

    name: str
    role: str  # "teacher", "without KD" or "with KD"
    metrics: dict[str, SeedStat]  # by the keys of REPORTED
    values: dict[str, list[float]]  # the same, seed by seed
    gaps: dict[str, GapClosed]  # by the keys of GAPS, with KD only
    seconds: SeedStat
    systems_per_second: SeedStat
    n_parameters: int | None
    n_seeds: int
    # Neighbour lists and transfer included; of `kd report --throughput` only.
    end_to_end_per_second: SeedStat = _UNKNOWN

    def cells(self) -> dict[str, object]:
        """Return the values under the keys of `columns`."""
        gaps = {f"gap_{key}": self.gaps.get(key) for key in GAPS}
        others = {
            "seconds": self.seconds,
            _THROUGHPUT: self.systems_per_second,
            _END_TO_END: self.end_to_end_per_second,
            "n_parameters": self.n_parameters,
        }
        return {"name": self.name, "seeds": self.n_seeds or None, **self.metrics, **gaps, **others}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; what is not finite becomes None."""
        plain = asdict(self)
        clean: dict[str, Any] = _finite(plain)
        return clean


def metric_columns() -> list[Column]:
    """Return the errors that have a gap, the share of it that is closed, and what else is reported."""
    metrics = {
        m.key: Column(m.key, m.title.replace(" (", "\n("), decimals=m.decimals) for m in REPORTED.values()
    }
    gaps = [Column(f"gap_{key}", title.replace(", ", ",\n"), decimals=1) for key, title in GAPS.items()]
    others = [column for key, column in metrics.items() if key not in GAPS]
    return [*(metrics[key] for key in GAPS), *gaps, *others]


def columns(rows: Sequence[Row]) -> list[Column]:
    """Return the columns that the rows have something for."""
    every = [
        Column("name", "model"),
        Column("seeds", "seeds"),
        *metric_columns(),
        Column("seconds", "training\n(s)"),
        Column("n_parameters", "parameters"),
        Column(_THROUGHPUT, "systems/s"),
        Column(_END_TO_END, "end to end\n(systems/s)"),
    ]
    cells = [row.cells() for row in rows]
    return [c for c in every if any(not _is_empty(line[c.key]) for line in cells)]


def dataset_names(
    runs: Sequence[Run], evaluations: Evaluations, splits: Sequence[SplitGroup] = ()
) -> list[str]:
    """Return what has a table: groups of test sets and their splits, other test sets, or the validation set.

    Parameters
    ----------
    splits : as `splits_of` gives them
    """
    names = sorted(measured_sets(runs, evaluations))
    first = [name for group in splits for name in (group.name, *group.splits)]
    return list(dict.fromkeys([*first, *names])) or [VALIDATION]


def splits_of(
    runs: Sequence[Run], names: Iterable[str], given: Mapping[str, Sequence[str]]
) -> list[SplitGroup]:
    """Return the groups of test sets that the runs were trained with, those given, and OC20's.

    Parameters
    ----------
    names : of all test sets
    given : names of test sets by the name of their group

    Raises
    ------
    ConfigError
        If runs mean different test sets by one name and none is given by it, or a test set does not exist.
    """
    found: dict[str, Sequence[str]] = {}
    for run in runs:
        for name, sets in run.test_groups.items():
            if name not in given and set(found.setdefault(name, sets)) != set(sets):
                raise ConfigError(
                    f"{run.path}: the group {name} is {', '.join(sets)}, in another run it is "
                    f"{', '.join(found[name])}; say which is meant: --group {name}=..."
                )
    return split_groups({**found, **given}, sorted(names))


def build_rows(
    groups: Sequence[Group],
    dataset: str,
    teacher: TeacherResult | None,
    evaluations: Evaluations,
    splits: SplitGroup | None = None,
) -> list[Row]:
    """Return the teacher's row, then every student without KD followed by those with KD.

    Parameters
    ----------
    splits : if the data set is the mean of several. It is taken run by run, then mean and spread over seeds,
        and gaps from these means
    """
    rows = []
    known = _teacher_values(teacher, dataset, splits) if teacher else {}
    if teacher is not None:
        rows.append(_teacher_row(teacher, known))

    def row_of(group: Group, role: str) -> Row:
        measured = [run_values(run, dataset, evaluations, splits) for run in group.runs]
        return _group_row(group, role, measured)

    for baseline, with_kd in comparisons(groups):
        base_row = row_of(baseline, "without KD") if baseline else None
        if base_row is not None:
            rows.append(base_row)
        for group in with_kd:
            row = row_of(group, "with KD")
            rows.append(replace(row, gaps=_gaps(base_row, row, known)) if teacher is not None else row)
    return rows


def run_values(
    run: Run, dataset: str, evaluations: Evaluations, splits: SplitGroup | None = None
) -> dict[str, float | None]:
    """Return a run's metrics on a data set: of an evaluation if there is one, else those it ended with."""
    if splits is not None:
        return mean_report(splits, {name: run_values(run, name, evaluations) for name in splits.splits})[0]
    stored = run.val if dataset == VALIDATION and not run.test else run.test.get(dataset, {})
    evaluation = evaluations.get(run.path, {}).get(dataset)
    return {**stored, **(evaluation.to_report() if evaluation else {})}


def missing_means(
    groups: Sequence[Group], splits: SplitGroup, teacher: TeacherResult | None, evaluations: Evaluations
) -> list[str]:
    """Say which run or teacher has no mean over splits, and why; a mean over seeds is without that run."""
    reports = {
        str(run.path): {name: run_values(run, name, evaluations) for name in splits.splits}
        for group in groups
        for run in group.runs
    }
    if teacher is not None:
        reports[f"teacher {teacher.name}"] = {name: teacher.values(name) for name in splits.splits}
    return [f"{who}: {problem}" for who, its in reports.items() for problem in mean_report(splits, its)[1]]


def measured_sets(runs: Sequence[Run], evaluations: Evaluations) -> set[str]:
    """Return the names of the test sets that any run was measured on."""
    return {name for run in runs for name in (*run.test, *evaluations.get(run.path, {}))}


def _teacher_values(
    teacher: TeacherResult, dataset: str, splits: SplitGroup | None
) -> dict[str, float | None]:
    if splits is None:
        return teacher.values(dataset)
    return mean_report(splits, {name: teacher.values(name) for name in splits.splits})[0]


def _teacher_row(teacher: TeacherResult, known: Mapping[str, float | None]) -> Row:
    values = {key: [v] for key in REPORTED if (v := known.get(key)) is not None}
    return Row(
        name=f"teacher: {teacher.name}",
        role="teacher",
        metrics={key: SeedStat.of(values.get(key, [])) for key in REPORTED},
        values=values,
        gaps={},
        seconds=SeedStat.of([]),
        systems_per_second=SeedStat.of([known.get(_THROUGHPUT)]),
        end_to_end_per_second=SeedStat.of([known.get(_END_TO_END)]),
        n_parameters=teacher.n_parameters,
        n_seeds=0,
    )


def _group_row(group: Group, role: str, measured: Sequence[Mapping[str, float | None]]) -> Row:
    values = {key: [v for m in measured if (v := m.get(key)) is not None] for key in REPORTED}
    return Row(
        name=group.name,
        role=role,
        metrics={key: SeedStat.of(values[key]) for key in REPORTED},
        values=values,
        gaps={},
        seconds=SeedStat.of(run.seconds for run in group.runs),
        systems_per_second=SeedStat.of(m.get(_THROUGHPUT) for m in measured),
        end_to_end_per_second=SeedStat.of(m.get(_END_TO_END) for m in measured),
        n_parameters=group.runs[0].n_parameters,
        n_seeds=len(group.runs),
    )


def _gaps(without: Row | None, with_kd: Row, teacher: Mapping[str, float | None]) -> dict[str, GapClosed]:
    measured = [key for key in GAPS if with_kd.metrics[key].mean is not None]
    if without is None:
        return {key: GapClosed(None, None, "no runs of this student without KD") for key in measured}
    return {
        key: gap_closed(
            without.metrics[key],
            with_kd.metrics[key],
            teacher.get(key),
            larger_is_better=REPORTED[key].larger_is_better,
        )
        for key in measured
    }


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, SeedStat) and value.mean is None)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
