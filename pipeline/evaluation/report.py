"""`kd report`: tables, pictures and one Markdown page from finished runs."""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from molkd.pipeline.errors import DataError
from molkd.pipeline.evaluation.card import write_card
from molkd.pipeline.evaluation.gap import FORMULA
from molkd.pipeline.evaluation.groups import Group, comparisons, group_runs
from molkd.pipeline.evaluation.parity_plots import Panel, plot_parity
from molkd.pipeline.evaluation.plots import plot_errors, plot_learning_curves, save_figure
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
from molkd.pipeline.evaluation.tables import format_table, markdown_table
from molkd.pipeline.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOTS = "plots"
_MIN_SEEDS = 3
_PANELS_WITH_KD = 3  # beside teacher and student without KD; more go to a further picture
_INTRODUCTION = """\
Errors are mean absolute errors against the reference labels; forces are those of free atoms. The force cosine
is the mean over atoms, EFwT the share of systems with an energy error below 0.02 eV and every force component
within 0.03 eV/Å. Values are mean ± sample standard deviation over seeds. Throughput counts the model only,
without neighbour lists, on the machine and at the batch size of its evaluation."""


@dataclass(frozen=True, eq=False)
class Report:
    """What `write_report` found and wrote."""

    folder: Path
    tables: dict[str, list[Row]]  # by data set
    remarks: list[str]
    plots: list[tuple[str | None, Path]]  # with the data set, None for learning curves

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
            "tables": {name: [row.to_dict() for row in rows] for name, rows in self.tables.items()},
            "remarks": self.remarks,
            "plots": [path.relative_to(self.folder).as_posix() for _, path in self.plots],
        }

    def _explanation(self) -> list[str]:
        has_gap = any(row.gaps for rows in self.tables.values() for row in rows)
        lines = ["mean ± sample standard deviation over seeds", *([FORMULA] if has_gap else [])]
        return ["\n".join(lines + [f"* {remark}" for remark in self.remarks])]


def write_report(
    runs: Sequence[Path],
    out: Path,
    *,
    teacher: TeacherResult | None = None,
    evaluations: Evaluations | None = None,
    test_groups: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Report:
    """Compare finished runs and write report.md, results.json, results.csv and plots/ into `out`.

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
    plots = []
    for dataset, name, figure in _figures(groups, tables, teacher, evaluations):
        plots.append((dataset, out / PLOTS / f"{name}.png"))
        save_figure(figure, plots[-1][1])
    remarks = _remarks(groups, tables) + _write_cards(groups, tables)
    remarks += [text for its in splits.values() for text in missing_means(groups, its, teacher, evaluations)]
    report = Report(out, tables, remarks, plots)
    write_atomic(out / "results.json", json.dumps(report.to_dict(), indent=1, ensure_ascii=False) + "\n")
    write_atomic(out / "results.csv", _csv(tables))
    write_atomic(out / "report.md", _markdown(report, groups))
    return report


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


def _figures(
    groups: Sequence[Group],
    tables: dict[str, list[Row]],
    teacher: TeacherResult | None,
    evaluations: Evaluations,
) -> Iterator[tuple[str | None, str, "Figure"]]:
    """Yield data set, file name and figure, one at a time."""
    curves = plot_learning_curves(groups)
    if curves is not None:
        yield None, "learning_curves", curves
    for dataset, rows in tables.items():
        errors = plot_errors(rows)
        if errors is not None:
            yield dataset, f"errors_{_slug(dataset)}", errors
        sheets = list(_parity_sheets(groups, dataset, teacher, evaluations))
        for number, panels in enumerate(sheets, start=1):
            suffix = f"_{number}" if len(sheets) > 1 else ""
            yield dataset, f"parity_energy_{_slug(dataset)}{suffix}", plot_parity(panels, "energy")
            yield dataset, f"parity_forces_{_slug(dataset)}{suffix}", plot_parity(panels, "forces")


def _parity_sheets(
    groups: Sequence[Group], dataset: str, teacher: TeacherResult | None, evaluations: Evaluations
) -> Iterator[list[Panel]]:
    """Yield the panels of one picture: teacher, student without KD, then up to three settings with KD."""
    first = []
    if teacher is not None and dataset in teacher.evaluations:
        first.append(Panel(f"teacher: {teacher.name}", teacher.evaluations[dataset]))
    for baseline, with_kd in comparisons(groups):
        left = first + ([p] if baseline and (p := _panel(baseline, dataset, evaluations)) else [])
        right = [p for group in with_kd if (p := _panel(group, dataset, evaluations))]
        for begin in range(0, max(len(right), 1), _PANELS_WITH_KD):
            sheet = left + right[begin : begin + _PANELS_WITH_KD]
            if len(sheet) > len(first):
                yield sheet


def _panel(group: Group, dataset: str, evaluations: Evaluations) -> Panel | None:
    """Return the panel of the lowest seed that was evaluated; None if none was."""
    for run in group.runs:
        evaluation = evaluations.get(run.path, {}).get(dataset)
        if evaluation is not None:
            return Panel(f"{group.name}\nseed {run.seed}", evaluation)
    return None


def _remarks(groups: Sequence[Group], tables: dict[str, list[Row]]) -> list[str]:
    """Say what a reader has to know before trusting a number."""
    remarks = [
        f"{row.name}, {dataset}, {GAPS[key]}: {gap.flag}"
        for dataset, rows in tables.items()
        for row in rows
        for key, gap in row.gaps.items()
        if gap.flag
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


def _markdown(report: Report, groups: Sequence[Group]) -> str:
    parts = ["# Distillation report", _INTRODUCTION]
    for dataset, rows in report.tables.items():
        parts += [f"## {dataset}", markdown_table([row.cells() for row in rows], columns(rows))]
        if any(row.gaps for row in rows):
            parts.append(f"{FORMULA}.")
        parts += [_image(path, report.folder) for its, path in report.plots if its == dataset]
    if report.remarks:
        parts += ["## Remarks", "\n".join(f"- {remark}" for remark in report.remarks)]
    curves = [path for dataset, path in report.plots if dataset is None]
    if curves:
        parts += ["## Learning curves", *(_image(path, report.folder) for path in curves)]
    parts += [
        "## Runs",
        markdown_table(_run_rows(groups), ["model", "seed", "label", "training (s)", "folder"]),
    ]
    return "\n\n".join(parts) + "\n"


def _run_rows(groups: Sequence[Group]) -> list[dict[str, object]]:
    return [
        {
            "model": group.name,
            "seed": run.seed,
            "label": run.label,
            "training (s)": run.seconds,
            "folder": str(run.path),
        }
        for group in groups
        for run in group.runs
    ]


def _image(path: Path, folder: Path) -> str:
    words = path.stem.replace("_", " ")
    return f"![{words}]({path.relative_to(folder).as_posix()})"


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
            lines.append(line)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-") or "data"
