"""`kd evaluate` and `kd report`: apply any model or teacher to labelled data, compare runs."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from molkd.pipeline.config import TrainConfig, make_config, read_yaml
from molkd.pipeline.data.sources import Source, open_source
from molkd.pipeline.device import choose_device
from molkd.pipeline.errors import ConfigError
from molkd.pipeline.evaluation.evaluate import evaluate, known_systems
from molkd.pipeline.evaluation.predictions import ExtxyzPredictions
from molkd.pipeline.evaluation.report import Report, write_report
from molkd.pipeline.evaluation.result import FOLDER, Evaluation, load_evaluations
from molkd.pipeline.evaluation.results import TeacherResult
from molkd.pipeline.teachers.interface import Teacher
from molkd.pipeline.teachers.load import load_teacher


@dataclass(frozen=True)
class EvaluationSummary:
    """What `kd evaluate` prints; None where nothing was labelled."""

    model: str
    data: str
    n_systems: int
    n_energies: int
    n_force_atoms: int
    energy_mae_meV: float | None  # noqa: N815  # the unit is written as in reports
    energy_mae_meV_per_atom: float | None  # noqa: N815
    force_mae_meV_A: float | None  # noqa: N815
    force_rmse_meV_A: float | None  # noqa: N815
    force_cos: float | None
    efwt_percent: float | None
    systems_per_second: float | None


def evaluate_model(
    model: str,
    data: Path,
    *,
    predictions: Path | None = None,
    energy_key: str | None = None,
    forces_key: str | None = None,
    batch_size: int = 32,
    device: str = "auto",
) -> EvaluationSummary:
    """Measure a run, a model file or any teacher on the labels of `data`.

    Raises
    ------
    ModelError, TeacherError
        If the model cannot be loaded, does not know an element, or gives non-finite numbers.
    DataError
        If the data cannot be read.
    """
    teacher = load_teacher(model, device=choose_device(device))
    source = open_source(data, energy_key=energy_key, forces_key=forces_key)
    try:
        result = _evaluate(teacher, source, batch_size, predictions)
    finally:
        source.close()
    metrics = result.metrics
    has_energy, has_forces = metrics.n_energies > 0, metrics.n_force_atoms > 0
    report = result.to_report()
    return EvaluationSummary(
        model=model,
        data=str(data),
        n_systems=metrics.n_systems,
        n_energies=metrics.n_energies,
        n_force_atoms=metrics.n_force_atoms,
        energy_mae_meV=report["energy_mae_meV"],
        energy_mae_meV_per_atom=1e3 * metrics.energy_mae_per_atom if has_energy else None,
        force_mae_meV_A=report["force_mae_meV_A"],
        force_rmse_meV_A=1e3 * metrics.force_rmse if has_forces else None,
        force_cos=report["force_cos"],
        efwt_percent=report["efwt_percent"],
        systems_per_second=result.systems_per_second,
    )


def report_runs(
    runs: Sequence[Path],
    out: Path,
    *,
    teacher: str | None = None,
    test: Sequence[Path] = (),
    device: str = "auto",
    batch_size: int = 32,
) -> Report:
    """Evaluate what has not been evaluated yet, and write the comparison of runs into `out`.

    Every run is measured on its own test files and on those given here; the teacher on all of them.
    """
    chosen = choose_device(device)
    data = _test_files(runs, test)
    for run in runs:
        known = load_evaluations(run)
        missing = {name: path for name, path in data.items() if name not in known}
        if missing:
            model = load_teacher(str(run), device=chosen)
            for name, path in missing.items():
                _evaluate_file(model, path, batch_size).save(run / FOLDER / f"{name}.npz")
    result = None
    if teacher is not None:
        model = load_teacher(teacher, device=chosen)
        evaluations = {name: _evaluate_file(model, path, batch_size) for name, path in data.items()}
        result = TeacherResult(model.info.name, n_parameters=model.info.n_parameters, evaluations=evaluations)
    return write_report(runs, out, teacher=result)


def _test_files(runs: Sequence[Path], given: Sequence[Path]) -> dict[str, Path]:
    """Return the test data by name: the file's name up to the first dot."""
    data: dict[str, Path] = {}
    for run in runs:
        if (run / "config.yaml").exists():
            data |= make_config(TrainConfig, read_yaml(run / "config.yaml")).test
    for path in given:
        name = path.name.split(".")[0]
        if name in data and data[name].resolve() != path.resolve():
            raise ConfigError(f"--test {path}: {data[name]} has the same name {name}; rename one of them")
        data[name] = path
    return data


def _evaluate_file(teacher: Teacher, path: Path, batch_size: int) -> Evaluation:
    source = open_source(path)
    try:
        return _evaluate(teacher, source, batch_size, None)
    finally:
        source.close()


def _evaluate(teacher: Teacher, source: Source, batch_size: int, predictions: Path | None) -> Evaluation:
    with ExitStack() as stack:
        writer = stack.enter_context(ExtxyzPredictions(predictions)) if predictions else None
        progress = stack.enter_context(
            tqdm(total=len(source), desc=source.path.name, unit="system", disable=None)
        )
        return evaluate(
            lambda batch: teacher.compute(batch, ("energy", "forces")),
            known_systems(source, teacher.atomic_numbers, teacher.info.name, teacher.neighbor_rule),
            teacher.neighbor_rule,
            batch_size=batch_size,
            device=teacher.device,
            dtype=torch.float32,
            on_batch=lambda done: _advance(progress, done),
            on_prediction=writer.add if writer else None,
        )


def _advance(progress: "tqdm[Any]", done: int) -> None:
    progress.update(done - progress.n)
