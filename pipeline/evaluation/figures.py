"""Which pictures a report has, gallery by gallery, with their words for who does not see them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from molkd.pipeline.evaluation.cka_plot import plot_cka
from molkd.pipeline.evaluation.cka_result import load_comparisons
from molkd.pipeline.evaluation.curves import BASE_LOSS, VALIDATION, cka_columns, kd_columns, plot_curves
from molkd.pipeline.evaluation.document import Gallery, Picture
from molkd.pipeline.evaluation.groups import Group, comparisons
from molkd.pipeline.evaluation.lambda_scan import Scan, plot_scan
from molkd.pipeline.evaluation.metrics import REPORTED
from molkd.pipeline.evaluation.parity_plots import QUANTITIES, Panel, plot_parity
from molkd.pipeline.evaluation.plots import ERRORS, plot_errors, plot_speed
from molkd.pipeline.evaluation.results import Evaluations, Row, TeacherResult
from molkd.pipeline.evaluation.style import ModelStyle, save_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOTS = "plots"
_LINES_WITH_KD = 7  # in one picture of curves, beside the student without KD
_PANELS_WITH_KD = 4  # parity plots of one student, beside it without KD and the teacher
_PARITY = {
    "energy": "Energies per atom, relative to the mean label. Points are a random sample of the systems.",
    "forces": "Components of the forces on a random sample of the free atoms.",
}


@dataclass(eq=False)
class Studio:
    """Saves pictures below the report's folder, each under a name of its own."""

    folder: Path
    styles: Mapping[str, ModelStyle]
    _taken: set[str] = field(default_factory=set)

    def save(self, figure: "Figure", name: str, alt: str) -> Picture:
        """Write plots/NAME.png; a name that is taken gets a number."""
        base = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "picture"
        unique, number = base, 2
        while unique.lower() in self._taken:  # some file systems do not tell Test from test
            unique, number = f"{base}_{number}", number + 1
        self._taken.add(unique.lower())
        return save_picture(figure, self.folder, f"{PLOTS}/{unique}.png", alt)


def error_gallery(studio: Studio, dataset: str, rows: Sequence[Row]) -> Gallery | None:
    """Draw the errors of all students, energies and forces."""
    pictures = [
        studio.save(figure, f"errors_{_short(key)}_{dataset}", f"{_title(key)} of every student on {dataset}")
        for key in ERRORS
        if (figure := plot_errors(rows, key, studio.styles)) is not None
    ]
    return _gallery(
        "Large marks are means over seeds, small circles single seeds, bars the spread.",
        pictures,
    )


def speed_gallery(studio: Studio, dataset: str, rows: Sequence[Row]) -> Gallery | None:
    """Draw errors against throughput."""
    pictures = [
        studio.save(
            figure,
            f"speed_{_short(key)}_{dataset}",
            f"{_title(key)} on {dataset} against systems per second; lower and further right is better",
        )
        for key in ERRORS
        if (figure := plot_speed(rows, key, studio.styles)) is not None
    ]
    in_turns = any(row.end_to_end_per_second.mean is not None for row in rows)
    how = "measured in turns on the same systems" if in_turns else "as measured with each evaluation"
    return _gallery(
        "Lower and further right is better. Bars are spreads over seeds; throughput is of the model alone, "
        f"{how}.",
        pictures,
    )


def scan_gallery(studio: Studio, dataset: str, rows: Sequence[Row], scan: Scan) -> Gallery | None:
    """Draw errors against one lambda."""
    pictures = [
        studio.save(
            figure,
            f"scan_{scan.student}_{scan.term}_{_short(key)}_{dataset}",
            f"{_title(key)} on {dataset} against {scan.title}",
        )
        for key in ERRORS
        if (figure := plot_scan(scan, rows, key, studio.styles)) is not None
    ]
    return _gallery(
        f"{scan.title}: mean and spread over seeds of runs that differ in this weight only.", pictures
    )


def curve_galleries(studio: Studio, groups: Sequence[Group]) -> list[Gallery]:
    """Draw validation errors by steps and time, losses, KD terms alone and similarities; students apart."""
    galleries = []
    for baseline, with_kd in comparisons(groups):
        for begin in range(0, max(len(with_kd), 1), _LINES_WITH_KD):
            sheet = ([baseline] if baseline else []) + with_kd[begin : begin + _LINES_WITH_KD]
            pictures = _curves(studio, sheet)
            gallery = _gallery(
                f"{sheet[0].student}: lines are means over seeds, bands reach from the lowest to the highest "
                "seed. KD terms are shown unweighted.",
                pictures,
            )
            galleries += [gallery] if gallery else []
    return galleries


def _curves(studio: Studio, groups: Sequence[Group]) -> list[Picture]:
    wanted: list[tuple[str, str, Mapping[str, str], str, bool]] = [
        ("learning_curves", "Validation errors against training steps", VALIDATION, "step", True),
        ("learning_curves_time", "Validation errors against training time", VALIDATION, "seconds", True),
        ("training_loss", "Training losses against training steps", BASE_LOSS, "step", True),
        ("kd_losses", "Unweighted KD losses against training steps", kd_columns(groups), "step", True),
        ("cka_curves", "Similarity (CKA) against training steps", cka_columns(groups), "step", False),
    ]
    return [
        studio.save(figure, f"{name}_{groups[0].student}", f"{alt}, {groups[0].student}")
        for name, alt, columns, against, log in wanted
        if (figure := plot_curves(groups, studio.styles, columns, against=against, log_scale=log)) is not None
    ]


def cka_gallery(studio: Studio, groups: Sequence[Group]) -> Gallery | None:
    """Draw the comparisons that `kd cka` left in the runs, of the lowest seed of a group that has any."""
    pictures = []
    for group in groups:
        comparisons = next((found for run in group.runs if (found := load_comparisons(run.path))), {})
        for name, result in comparisons.items():
            alt = f"Similarity (CKA) between layers of {result.title}, as a heat map: {group.name}"
            pictures.append(studio.save(plot_cka(result), f"cka_{group.name}_{name}", alt))
    return _gallery(
        "Heat maps of CKA, from 0 (nothing in common) to 1 (equal up to rotation and scale), layer by layer.",
        pictures,
    )


def parity_galleries(
    studio: Studio,
    groups: Sequence[Group],
    dataset: str,
    teacher: TeacherResult | None,
    evaluations: Evaluations,
    rows: Sequence[Row],
) -> list[tuple[str, Gallery]]:
    """Draw predictions against labels: teacher, student without KD, the best with KD by force error."""
    order = {row.name: _force_error(row) for row in rows}
    first = []
    if teacher is not None and dataset in teacher.evaluations:
        first.append(Panel(f"teacher: {teacher.name}", teacher.evaluations[dataset]))
    galleries = []
    for baseline, with_kd in comparisons(groups):
        ranked = sorted(with_kd, key=lambda group: order.get(group.name, float("inf")))
        left = [p for group in ([baseline] if baseline else []) if (p := _panel(group, dataset, evaluations))]
        right = [p for group in ranked if (p := _panel(group, dataset, evaluations))]
        panels = [*left, *right[:_PANELS_WITH_KD]]
        if not panels:
            continue
        choice = f" Of {len(right)} settings with KD, the {_PANELS_WITH_KD} with the smallest force error."
        choice = choice if len(right) > _PANELS_WITH_KD else ""
        for quantity in QUANTITIES:
            figures = plot_parity([*first, *panels], quantity)
            pictures = [
                studio.save(
                    figure,
                    f"parity_{quantity}_{dataset}_{i}",
                    f"Predicted against reference {quantity} on {dataset}, {' '.join(panel.title.split())}",
                )
                for i, (panel, figure) in enumerate(zip([*first, *panels], figures, strict=True), start=1)
            ]
            galleries.append((f"Parity, {quantity}", Gallery(_PARITY[quantity] + choice, tuple(pictures))))
    return galleries


def _panel(group: Group, dataset: str, evaluations: Evaluations) -> Panel | None:
    """Return the panel of the lowest seed that was evaluated; None if none was."""
    for run in group.runs:
        evaluation = evaluations.get(run.path, {}).get(dataset)
        if evaluation is not None:
            return Panel(f"{group.name}\nseed {run.seed}", evaluation)
    return None


def _force_error(row: Row) -> float:
    value = row.metrics["force_mae_meV_A"].mean
    return float("inf") if value is None else value


def _gallery(caption: str, pictures: Sequence[Picture]) -> Gallery | None:
    return Gallery(caption, tuple(pictures)) if pictures else None


def _title(key: str) -> str:
    return REPORTED[key].title.partition(" (")[0].replace("energy", "Energy").replace("force", "Force")


def _short(key: str) -> str:
    return key.partition("_")[0]
