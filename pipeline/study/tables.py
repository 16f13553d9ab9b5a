"""The tables of a study: one report a pair with its teacher, and all lines on one page and in study.csv."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from molkd.pipeline.environment import environment
from molkd.pipeline.evaluating import Fingerprints, report_runs
from molkd.pipeline.evaluation.best import RULE, best_marks
from molkd.pipeline.evaluation.document import Code, Document, Link, Mark, Paragraph, Section, table_of
from molkd.pipeline.evaluation.gap import FORMULA
from molkd.pipeline.evaluation.groups import group_key, group_runs
from molkd.pipeline.evaluation.html import to_html
from molkd.pipeline.evaluation.markdown import to_markdown
from molkd.pipeline.evaluation.metrics import REPORTED
from molkd.pipeline.evaluation.results import GAPS, Row, metric_columns
from molkd.pipeline.evaluation.runs import read_run
from molkd.pipeline.evaluation.tables import Column, csv_table, format_table
from molkd.pipeline.files import write_atomic
from molkd.pipeline.study.grid import Cell, Run
from molkd.pipeline.study.preparing import teacher_model
from molkd.pipeline.study.schema import Pair, StudyConfig
from molkd.pipeline.study.state import Standing, State

log = logging.getLogger(__name__)

REPORT = "report"
KEPT = "teachers"  # in it: measurements of teachers, for all pairs
_NOTE = (
    f"Mean ± sample standard deviation over seeds; {FORMULA}; where it is undefined (*), the report says why"
)


@dataclass(frozen=True)
class Line:
    """One line of the tables: a teacher (no cell), or a cell over its seeds, on one data set."""

    pair: Pair
    data: str
    cell: Cell | None
    row: Row | None  # None: no seed has finished
    missing: tuple[str, ...] = ()  # seeds that have not, with the reason
    marks: Mapping[str, Mark] = field(default_factory=dict)  # by metric

    def cells(self) -> dict[str, object]:
        """Return the values under the keys of `_columns`."""
        name = " ".join([self.cell.strategy, *self.cell.choices.values()]) if self.cell else "teacher"
        values = self.row.cells() if self.row else {}
        return {**values, "name": name, "missing": ", ".join(self.missing) or None}

    def flat(self, axes: Sequence[str]) -> dict[str, object]:
        """Return plain values for study.csv, mean and spread in columns of their own."""
        flat: dict[str, object] = {"pair": self.pair.name, "teacher": self.pair.teacher}
        flat |= {"student": self.pair.student, "data": self.data}
        flat |= {"strategy": self.cell.strategy if self.cell else "teacher"}
        flat |= {f"settings.{axis}": self.cell.choices[axis] if self.cell else "" for axis in axes}
        flat |= {"seeds": self.row.n_seeds if self.row else 0, "missing": "; ".join(self.missing)}
        for key in REPORTED:
            stat = self.row.metrics[key] if self.row else None
            flat |= {key: stat.mean if stat else None, f"{key}_spread": stat.spread if stat else None}
        for key in GAPS:
            gap = self.row.gaps.get(key) if self.row else None
            flat |= {f"gap_closed_percent_{key}": gap.percent if gap else None}
            flat |= {f"gap_closed_percent_{key}_spread": gap.spread if gap else None}
        row = self.row
        flat |= {
            "seconds": row.seconds.mean if row else None,
            "n_parameters": row.n_parameters if row else None,
        }
        return flat | {"systems_per_second": row.systems_per_second.mean if row else None}


@dataclass(frozen=True)
class Tables:
    """All lines of a study, and where its reports are."""

    name: str
    folder: Path
    lines: list[Line]
    axes: tuple[str, ...]
    file: str  # a study file that comes to the same

    def text(self) -> str:
        """Return the tables for a terminal."""
        parts = [
            f"{pair}, {data}\n{format_table([line.cells() for line in lines], _columns(lines))}"
            for (pair, data), lines in self._by_table().items()
        ]
        return "\n\n".join([*parts, _NOTE])

    def to_dict(self) -> list[dict[str, object]]:
        """Return the lines of study.csv for JSON."""
        return [line.flat(self.axes) for line in self.lines]

    def document(self) -> Document:
        """Return the page: a table for each pair and data set, best values marked, and its report."""
        sections = [
            Section(
                f"{pair}, {data}",
                (
                    table_of(
                        f"{pair}, {data}",
                        [line.cells() for line in lines],
                        _columns(lines),
                        marks=[line.marks for line in lines],
                    ),
                    Link(f"Report of {pair}", f"{pair}/report.html"),
                ),
            )
            for (pair, data), lines in self._by_table().items()
        ]
        made_with = ", ".join(f"{key} {value}" for key, value in environment().items())
        repeat = (
            Paragraph(
                "kd study with this file makes again what is missing of store, teachers' signals, runs and "
                f"tables; the commands of single runs are in the reports of the pairs. Made with {made_with}."
            ),
            Code(self.file, "yaml"),
        )
        sections.append(Section("How to repeat this", repeat))
        return Document(self.name, (Paragraph(f"{_NOTE}."), Paragraph(RULE)), tuple(sections))

    def _by_table(self) -> dict[tuple[str, str], list[Line]]:
        found: dict[tuple[str, str], list[Line]] = {}
        for line in self.lines:
            found.setdefault((line.pair.name, line.data), []).append(line)
        return found


def study_file(study: StudyConfig) -> str:
    """Return a study file, its paths absolute, that `read_study` turns back into the study."""
    said = study.model_dump(mode="json", exclude_defaults=True)
    text: str = yaml.safe_dump(said, sort_keys=False, allow_unicode=True)
    return text


def write_tables(study: StudyConfig, cells: Sequence[Cell], standings: Sequence[Standing]) -> Tables | None:
    """Report on every pair that has finished runs, and write the tables over all; None if none has.

    Raises
    ------
    ConfigError, DataError, ModelError, TeacherError
        As `kd report`.
    """
    folder = study.out / REPORT
    lines: list[Line] = []
    fingerprints: Fingerprints = {}  # pairs are measured on the same data
    for pair in study.pairs:
        ours = [s for s in standings if any(cell.pair.name == pair.name for cell in s.run.cells)]
        finished = [s.run for s in ours if s.state is State.FINISHED]
        if finished:
            own = [cell for cell in cells if cell.pair.name == pair.name]
            lines += _lines(study, pair, own, ours, finished, folder / pair.name, fingerprints)
    if not lines:
        return None
    tables = Tables(study.name, folder, lines, tuple(study.settings), study_file(study))
    document = tables.document()
    write_atomic(folder / "study.csv", csv_table(tables.to_dict()))
    write_atomic(folder / "study.md", to_markdown(document))
    write_atomic(folder / "study.html", to_html(document))
    return tables


def _lines(
    study: StudyConfig,
    pair: Pair,
    cells: Sequence[Cell],
    standings: Sequence[Standing],
    finished: Sequence[Run],
    folder: Path,
    fingerprints: Fingerprints,
) -> list[Line]:
    counted = _counted(finished)
    paths = list(dict.fromkeys(counted.values()))
    teacher = teacher_model(study, pair.teacher)
    model, scale_file = teacher if teacher is not None else (None, None)
    if teacher is None:
        log.info("%s: the study does not say where this teacher is, so no share of its gap", pair.teacher)
    report = report_runs(
        paths,
        folder,
        teacher=model,
        scale_file=scale_file,
        test=study.report.test,
        energy_key=study.label_keys.get("energy_key"),
        forces_key=study.label_keys.get("forces_key"),
        device=study.report.device,
        throughput=study.report.throughput,
        keep_teacher=study.out / REPORT / KEPT / pair.teacher,
        fingerprints=fingerprints,
    )
    found = group_runs(map(read_run, paths))
    groups = {group.name: {run.path for run in group.runs} for group in found}
    students = {group.name: group.student for group in found}
    lines = []
    for data, rows in report.tables.items():
        marks = {row.name: its for row, its in zip(rows, best_marks(rows, students), strict=True)}
        lines += [Line(pair, data, None, row) for row in rows if row.role == "teacher"]
        for cell in cells:
            mine = {counted[run.path] for run in finished if cell in run.cells}
            row = next((r for r in rows if mine and mine <= groups.get(r.name, set())), None)
            missing = tuple(
                _why_missing(s) for s in standings if cell in s.run.cells and s.run not in finished
            )
            if row is not None or missing:
                lines.append(Line(pair, data, cell, row, missing, marks[row.name] if row else {}))
    return lines


def _counted(runs: Sequence[Run]) -> dict[Path, Path]:
    """Return for each run the first of its settings and seed, which `auto` may come to: reports take one."""
    first: dict[tuple[str, ...], Path] = {}
    counted = {}
    for run in runs:
        read = read_run(run.path)
        counted[run.path] = first.setdefault((*group_key(read), str(read.seed)), run.path)
        if counted[run.path] != run.path:
            log.info("%s came to the same settings as %s, which is reported", run.path, counted[run.path])
    return counted


def _why_missing(standing: Standing) -> str:
    seed = f"seed {standing.run.config.seed}"
    if standing.state is State.NEW:
        return f"{seed} not made yet"
    if standing.failure is not None:
        return f"{seed} {standing.failure.kind if standing.failure.kind != 'error' else 'failed'}"
    return f"{seed} {standing.state.value}"


def _columns(lines: Sequence[Line]) -> list[Column]:
    """Return the columns that the lines have something for."""
    every = [
        Column("name", "strategy"),
        Column("seeds", "seeds"),
        *metric_columns(),
        Column("missing", "missing"),
    ]
    cells = [line.cells() for line in lines]
    return [column for column in every if any(_is_there(line.get(column.key)) for line in cells)]


def _is_there(value: Any) -> bool:
    return value is not None and getattr(value, "mean", 0) is not None
