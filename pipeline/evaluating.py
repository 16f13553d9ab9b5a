"""`kd evaluate` and `kd report`: apply any model or teacher to labelled data, compare runs."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from molkd.pipeline.config import TrainConfig, make_config, parse_groups, read_yaml
from molkd.pipeline.data.sources import Source, open_source
from molkd.pipeline.device import choose_device
from molkd.pipeline.errors import ConfigError, DataError
from molkd.pipeline.evaluation.evaluate import evaluate, known_systems
from molkd.pipeline.evaluation.fingerprint import fingerprint
from molkd.pipeline.evaluation.groups import group_runs
from molkd.pipeline.evaluation.predictions import ExtxyzPredictions
from molkd.pipeline.evaluation.report import Report, write_report
from molkd.pipeline.evaluation.reproduce import report_command
from molkd.pipeline.evaluation.result import FOLDER, Evaluation
from molkd.pipeline.evaluation.results import TeacherResult, splits_of
from molkd.pipeline.evaluation.runs import read_run
from molkd.pipeline.places import is_there, resolved, short_name
from molkd.pipeline.progress import Progress
from molkd.pipeline.scope import Scope
from molkd.pipeline.teachers.interface import Teacher
from molkd.pipeline.teachers.load import load_teacher

log = logging.getLogger(__name__)


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
    data: Path | str,
    *,
    predictions: Path | None = None,
    energy_key: str | None = None,
    forces_key: str | None = None,
    batch_size: int = 32,
    device: str = "auto",
    scale_file: Path | None = None,
) -> EvaluationSummary:
    """Measure a run, a model file or any teacher on the labels of `data`.

    Parameters
    ----------
    scale_file : scale factors, for a checkpoint of OCP that holds none

    Raises
    ------
    ModelError, TeacherError
        If the model cannot be loaded, does not know an element, or gives non-finite numbers.
    DataError
        If the data cannot be read.
    """
    teacher = load_teacher(model, device=choose_device(device), scale_file=scale_file)
    with closing(open_source(data, energy_key=energy_key, forces_key=forces_key)) as source:
        result = _evaluate(teacher, source, batch_size, predictions)
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


@dataclass(frozen=True)
class _TestSet:
    """Data that runs and teacher are measured on."""

    path: Path | str
    keys: tuple[str | None, str | None]  # names of energy and forces in the file
    fingerprint: str | None  # of systems and labels; None: the file is no longer there


def report_runs(
    runs: Sequence[Path],
    out: Path,
    *,
    teacher: str | None = None,
    test: Sequence[Path | str] = (),
    energy_key: str | None = None,
    forces_key: str | None = None,
    device: str = "auto",
    batch_size: int = 32,
    scale_file: Path | None = None,
    groups: Sequence[str] = (),
) -> Report:
    """Measure what was not measured with these weights on these data, and write the comparison into `out`.

    Every run is measured on its own test files and on those given here; the teacher on all of them.

    Parameters
    ----------
    energy_key, forces_key : names of the labels in the files of `test`
    scale_file : scale factors, for a teacher that is a checkpoint of OCP and holds none
    groups : test sets whose mean gets a table too, as NAME=SET,SET; beside those the runs were trained with

    Raises
    ------
    ConfigError
        If one name stands for two different data sets, or a group names a data set that does not exist.
    DataError
        If a run has not finished, or data cannot be read; nothing has been computed or written then.
    ModelError, TeacherError
        If a model cannot be loaded or was not made for the data.
    """
    read = [read_run(run) for run in runs]
    group_runs(read)
    sets = _test_sets(runs, test, (energy_key, forces_key))
    test_groups = {group.name: group.splits for group in splits_of(read, sets, parse_groups(groups))}
    chosen = choose_device(device)
    evaluations = {Path(run): _evaluations_of(run, sets, chosen, batch_size) for run in runs}
    _check_same_data(evaluations)
    result = None
    if teacher is not None:
        model = load_teacher(teacher, device=chosen, scale_file=scale_file)
        of_teacher = {name: _evaluate_set(model, data, batch_size) for name, data in sets.items()}
        result = TeacherResult(model.info.name, n_parameters=model.info.n_parameters, evaluations=of_teacher)
    others = {"--scale-file": scale_file, "--energy-key": energy_key, "--forces-key": forces_key}
    command = report_command(runs, out, teacher=teacher, test=test, groups=groups, others=others)
    return write_report(
        runs, out, teacher=result, evaluations=evaluations, test_groups=test_groups, command=command
    )


def _test_sets(
    runs: Sequence[Path], given: Sequence[Path | str], keys: tuple[str | None, str | None]
) -> dict[str, _TestSet]:
    """Return the test data by name: the file's name up to the first dot."""
    found: dict[str, dict[Path | str, _TestSet]] = {}  # name -> place -> data
    for run in runs:
        for name, path in make_config(TrainConfig, read_yaml(run / "config.yaml")).test.items():
            found.setdefault(name, {})[resolved(path)] = _TestSet(path, (None, None), None)
    for path in given:
        found.setdefault(short_name(path), {})[resolved(path)] = _TestSet(path, keys, None)
    return {name: _the_one(name, list(places.values())) for name, places in found.items()}


def _the_one(name: str, candidates: Sequence[_TestSet]) -> _TestSet:
    """Return the data behind a name; several places will do if they hold the same systems and labels."""
    there = []
    for candidate in candidates:
        if is_there(candidate.path) or candidate.keys != (None, None):
            with closing(_open(candidate)) as source:
                there.append(replace(candidate, fingerprint=fingerprint(source)))
    for other in there[1:]:
        if other.fingerprint != there[0].fingerprint:
            raise ConfigError(
                f"{there[0].path} and {other.path} are both called {name} but hold other systems or labels; "
                "rename one, or report the runs apart"
            )
    return there[0] if there else candidates[0]


def _evaluations_of(
    run: Path, sets: Mapping[str, _TestSet], device: torch.device, batch_size: int
) -> dict[str, Evaluation]:
    """Return what a run gives on every test set: as kept in its folder where that still holds."""
    if not sets:
        return {}
    model = load_teacher(str(run), device=device)
    results = {}
    for name, data in sets.items():
        path = run / FOLDER / f"{name}.npz"
        known = _kept(path)
        if known is not None and known.is_of(
            model.info.weights_sha256, data.fingerprint or known.data_fingerprint
        ):
            results[name] = known
            continue
        results[name] = _evaluate_set(model, data, batch_size)
        try:
            results[name].save(path)
        except OSError as error:
            log.warning("%s: not kept (%s), it will be measured again next time", path, error.strerror)
    return results


def _check_same_data(evaluations: Mapping[Path, Mapping[str, Evaluation]]) -> None:
    """Refuse kept measurements on different data of one name, which their files no longer tell apart."""
    first: dict[str, tuple[Path, str]] = {}
    for run, results in evaluations.items():
        for name, result in results.items():
            other, expected = first.setdefault(name, (run, result.data_fingerprint))
            if result.data_fingerprint != expected:
                raise ConfigError(
                    f"{other} and {run} were measured on different data called {name}, "
                    "which are no longer there; name the data for both with --test, or report the runs apart"
                )


def _kept(path: Path) -> Evaluation | None:
    try:
        return Evaluation.load(path) if path.exists() else None
    except DataError as error:
        log.warning("%s", error)
        return None


def _open(data: _TestSet) -> Source:
    energy_key, forces_key = data.keys
    return open_source(data.path, energy_key=energy_key, forces_key=forces_key)


def _evaluate_set(teacher: Teacher, data: _TestSet, batch_size: int) -> Evaluation:
    if not is_there(data.path):
        raise DataError(
            f"{data.path}: test data of a run, no longer there; name their present place with --test"
        )
    with closing(_open(data)) as source:
        return _evaluate(teacher, source, batch_size, None)


def _evaluate(teacher: Teacher, source: Source, batch_size: int, predictions: Path | None) -> Evaluation:
    with ExitStack() as stack:
        writer = stack.enter_context(ExtxyzPredictions(predictions)) if predictions else None
        progress = stack.enter_context(Progress(len(source), source.path.name, "system"))
        result = evaluate(
            lambda batch: teacher.compute(batch, ("energy", "forces")),
            known_systems(source, Scope(teacher.info.name, teacher.atomic_numbers, teacher.neighbor_rule)),
            teacher.neighbor_rule,
            batch_size=batch_size,
            device=teacher.device,
            dtype=torch.float32,
            weights_sha256=teacher.info.weights_sha256,
            on_batch=progress.advance_to,
            on_prediction=writer.add if writer else None,
        )
    for kind, n, flag in (
        ("energies", result.metrics.n_energies, "--energy-key"),
        ("forces", result.metrics.n_force_atoms, "--forces-key"),
    ):
        if n == 0:
            log.warning(
                "%s: no %s to compare with; if it holds any, name their key: %s", source.path, kind, flag
            )
    return result
