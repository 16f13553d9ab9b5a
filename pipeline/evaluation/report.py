"""`kd report`: tables and pictures from finished runs, as one HTML page, Markdown, CSV and JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from molkd.pipeline.errors import DataError
from molkd.pipeline.evaluation.best import RULE, best_marks
from molkd.pipeline.evaluation.breakdown_tables import breakdown_blocks, evaluations_of
from molkd.pipeline.evaluation.card import write_card
from molkd.pipeline.evaluation.contents import build_document
from molkd.pipeline.evaluation.document import Gallery
from molkd.pipeline.evaluation.figures import (
    Studio,
    cka_gallery,
    curve_galleries,
    error_gallery,
    parity_galleries,
    scan_gallery,
    speed_gallery,
)
from molkd.pipeline.evaluation.gap import FORMULA, ONE_SEED
from molkd.pipeline.evaluation.groups import Group, comparisons, group_runs
from molkd.pipeline.evaluation.html import to_html
from molkd.pipeline.evaluation.lambda_scan import Scan, find_scans
from molkd.pipeline.evaluation.markdown import to_markdown
from molkd.pipeline.evaluation.origin import Origin, incomparable_speeds, origin_of
from molkd.pipeline.evaluation.result import load_evaluations
from molkd.pipeline.evaluation.results import (
    GAPS,
    Evaluations,
    Row,
    TeacherResult,
    build_rows,
    columns,
    dataset_names,
    measured_sets,
    missing_means,
    splits_of,
)
from molkd.pipeline.evaluation.runs import read_run
from molkd.pipeline.evaluation.style import drawing, model_styles
from molkd.pipeline.evaluation.tables import csv_table, format_table
from molkd.pipeline.files import write_atomic

_MIN_SEEDS = 3
Galleries = dict[str | None, list[tuple[str, Gallery]]]  # by data set, with headings; None: of training


@dataclass(frozen=True, eq=False)
class Report:
    """What `write_report` found and wrote."""

    folder: Path
    tables: dict[str, list[Row]]  # by data set
    marks: dict[str, dict[str, dict[str, str]]]  # data set, model, metric: "best" or "near"
    scans: list[Scan]
    remarks: list[str]
    plots: list[str]  # paths from `folder`
    origin: Origin

    @property
    def page(self) -> Path:
        """The HTML page."""
        return self.folder / "report.html"

    def text(self) -> str:
        """Return the tables for a terminal."""
        parts = [
            f"{name}\n{format_table([r.cells() for r in rows], columns(rows))}"
            for name, rows in self.tables.items()
        ]
        return "\n\n".join([*parts, *self._explanation()])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        return {
            "formula": FORMULA,
            "rule": RULE,
            "tables": {name: [row.to_dict() for row in rows] for name, rows in self.tables.items()},
            "marks": self.marks,
            "scans": [
                {
                    "student": scan.student,
                    "term": scan.term,
                    "others": scan.others,
                    "baseline": scan.baseline,
                    "points": [vars(point) for point in scan.points],
                }
                for scan in self.scans
            ],
            "remarks": self.remarks,
            "plots": self.plots,
            "commands": {name: list(lines) for name, lines in self.origin.commands.items()},
            "versions": list(self.origin.environments),
            "throughput_conditions": list(self.origin.conditions),
            "fingerprints": list(self.origin.fingerprints),
            "citations": list(self.origin.citations),
        }

    def _explanation(self) -> list[str]:
        has_gap = any(row.gaps for rows in self.tables.values() for row in rows)
        lines = ["mean ± sample standard deviation over seeds", *([FORMULA] if has_gap else [])]
        return ["\n".join([*lines, *(f"* {remark}" for remark in self.remarks), f"page: {self.page}"])]


def write_report(
    runs: Sequence[Path],
    out: Path,
    *,
    teacher: TeacherResult | None = None,
    evaluations: Evaluations | None = None,
    test_groups: Mapping[str, Sequence[str]] = MappingProxyType({}),
    command: str | None = None,
) -> Report:
    """Compare finished runs and write report.html, report.md, results.json and .csv, and plots/ into `out`.

    Each run folder that holds its best.safetensors gets a card.md with the mean and spread of its group.
    Runs that differ in the seed only form a group; a group with KD is compared with the group without KD of
    the same student whose other settings differ least, and such differences are remarked upon.

    Parameters
    ----------
    runs : run folders of `kd train-student`
    out : folder, made if needed; files of the same name are replaced
    teacher : its accuracy; without it no gap is computed
    evaluations : by run folder and data set, for parity plots and as the newest metrics; by default those
        kept in the run folders (evaluation/<data set>.npz)
    test_groups : names of test sets by the name of the group whose mean gets a table too, beside those that
        the runs were trained with
    command : that makes this report, for the reader

    Raises
    ------
    DataError
        If there are no runs, or one is unfinished, damaged or given twice.
    ConfigError
        If a group of test sets makes no sense.
    """
    if not runs:
        raise DataError("no runs to report on; give the --out folders of `kd train-student`")
    read = [read_run(path) for path in runs]
    evaluations = (
        evaluations if evaluations is not None else {run.path: load_evaluations(run.path) for run in read}
    )
    groups = group_runs(read)
    splits = {group.name: group for group in splits_of(read, measured_sets(read, evaluations), test_groups)}
    names = dataset_names(read, evaluations, list(splits.values()))
    tables = {name: build_rows(groups, name, teacher, evaluations, splits.get(name)) for name in names}
    baselines = _baselines(groups)
    scans = find_scans(groups, baselines)
    galleries = _galleries(out, groups, tables, scans, teacher, evaluations)
    remarks = _remarks(groups, tables) + _write_cards(groups, tables)
    remarks += [text for its in splits.values() for text in missing_means(groups, its, teacher, evaluations)]
    remarks += incomparable_speeds(groups, teacher, evaluations)
    origin = origin_of(groups, teacher, evaluations, command)
    plots = [p.path for found in galleries.values() for _, gallery in found for p in gallery.pictures]
    report = Report(out, tables, _marks(groups, tables), scans, remarks, plots, origin)
    breakdowns = {
        name: list(breakdown_blocks(name, rows, evaluations_of(name, groups, teacher, evaluations)))
        for name, rows in tables.items()
    }
    document = build_document(tables, galleries, remarks, groups, origin, baselines, breakdowns)
    write_atomic(out / "results.json", json.dumps(report.to_dict(), indent=1, ensure_ascii=False) + "\n")
    write_atomic(out / "results.csv", _csv(tables))
    write_atomic(out / "report.md", to_markdown(document))
    write_atomic(report.page, to_html(document))
    return report


def _galleries(
    out: Path,
    groups: Sequence[Group],
    tables: Mapping[str, list[Row]],
    scans: Sequence[Scan],
    teacher: TeacherResult | None,
    evaluations: Evaluations,
) -> Galleries:
    """Draw every picture, one at a time."""
    found: Galleries = {}
    studio = Studio(out, model_styles([group.name for group in groups]))
    with drawing():
        for name, rows in tables.items():
            wanted: list[tuple[str, Gallery | None]] = [
                ("Errors", error_gallery(studio, name, rows)),
                ("Accuracy against speed", speed_gallery(studio, name, rows)),
                *((f"λ scan: {scan.title}", scan_gallery(studio, name, rows, scan)) for scan in scans),
                *parity_galleries(studio, groups, name, teacher, evaluations, rows),
            ]
            found[name] = [(title, gallery) for title, gallery in wanted if gallery is not None]
        found[None] = [("Learning curves", gallery) for gallery in curve_galleries(studio, groups)]
        similarities = cka_gallery(studio, groups)
        found[None] += [("Similarity of layers (CKA)", similarities)] if similarities else []
    return found


def _baselines(groups: Sequence[Group]) -> dict[str, str | None]:
    return {
        group.name: baseline.name if baseline else None
        for baseline, with_kd in comparisons(groups)
        for group in with_kd
    }


def _marks(groups: Sequence[Group], tables: Mapping[str, list[Row]]) -> dict[str, dict[str, dict[str, str]]]:
    students = {group.name: group.student for group in groups}
    return {
        dataset: {
            row.name: {key: mark.name.lower() for key, mark in marks.items()}
            for row, marks in zip(rows, best_marks(rows, students), strict=True)
            if marks
        }
        for dataset, rows in tables.items()
    }


def _write_cards(groups: Sequence[Group], tables: dict[str, list[Row]]) -> list[str]:
    """Write the model cards; a folder of somebody else's is left as it is and remarked upon."""
    remarks = []
    for group in groups:
        over_seeds = {
            name: row.metrics for name, rows in tables.items() for row in rows if row.name == group.name
        }
        for run in group.runs:
            if not (run.path / "best.safetensors").exists():
                continue
            try:
                write_card(run.path, run.summary, over_seeds)
            except OSError as error:
                remarks.append(f"{run.path / 'card.md'}: not written ({error.strerror})")
    return remarks


def _remarks(groups: Sequence[Group], tables: dict[str, list[Row]]) -> list[str]:
    """Say what a reader has to know before trusting a number."""
    remarks = [
        f"{row.name}, {dataset}, {GAPS[key]}: {gap.flag}"
        for dataset, rows in tables.items()
        for row in rows
        for key, gap in row.gaps.items()
        if gap.flag and gap.flag != ONE_SEED  # which a remark below says once for all
    ]
    few = [group.name for group in groups if len(group.runs) < _MIN_SEEDS]
    if few:
        remarks.append(f"fewer than {_MIN_SEEDS} seeds, so no sound spread: {'; '.join(few)}")
    remarks += [
        f"{group.name} differs from its comparison without KD beyond KD: {'; '.join(group.differences)}"
        for group in groups
        if group.differences
    ]
    return remarks


def _csv(tables: dict[str, list[Row]]) -> str:
    """Return one line per data set and model, mean and spread in columns of their own."""
    lines = []
    for dataset, rows in tables.items():
        for row in rows:
            line: dict[str, object] = {
                "data": dataset,
                "model": row.name,
                "role": row.role,
                "seeds": row.n_seeds,
            }
            for key, stat in row.metrics.items():
                line |= {key: stat.mean, f"{key}_spread": stat.spread}
            for key in GAPS:
                gap = row.gaps.get(key)
                line |= {f"gap_closed_percent_{key}": gap.percent if gap else None}
                line |= {f"gap_closed_percent_{key}_spread": gap.spread if gap else None}
            line |= {"seconds": row.seconds.mean, "seconds_spread": row.seconds.spread}
            line |= {"n_parameters": row.n_parameters, "systems_per_second": row.systems_per_second.mean}
            line |= {"end_to_end_per_second": row.end_to_end_per_second.mean}
            lines.append(line)
    return csv_table(lines)
