"""`kd report`: measure runs and their teacher on the same data, and compare them."""

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
from molkd.pipeline.evaluation.fingerprint import fingerprint
from molkd.pipeline.evaluation.groups import group_runs
from molkd.pipeline.evaluation.report import Report, write_report
from molkd.pipeline.evaluation.reproduce import report_command
from molkd.pipeline.evaluation.result import FOLDER, Evaluation
from molkd.pipeline.evaluation.results import TeacherResult, splits_of
from molkd.pipeline.evaluation.runs import read_run
from molkd.pipeline.evaluation.throughput import Speed
from molkd.pipeline.measuring import evaluate_source, measure_speeds
from molkd.pipeline.places import is_there, resolved, short_name
from molkd.pipeline.teachers.interface import Teacher
from molkd.pipeline.teachers.load import load_teacher

log = logging.getLogger(__name__)

_Keys = tuple[str | None, str | None]  # names of energy and forces in a file
Fingerprints = dict[tuple[Path | str, _Keys], str]  # by place and keys of labels
_TEACHER = "the teacher"  # among the paths of runs


@dataclass(frozen=True)
class _TestSet:
    """Data that runs and teacher are measured on."""

    path: Path | str
    keys: _Keys
    is_named: bool  # by --test, so it has to be there
    fingerprint: str | None = None  # of systems and labels; None: the file is no longer there


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
    throughput: bool = False,
    keep_teacher: Path | None = None,
    fingerprints: Fingerprints | None = None,
) -> Report:
    """Measure what was not measured with these weights on these data, and write the comparison into `out`.

    Every run is measured on its own test files and on those given here; the teacher on all of them. A run
    that is the teacher itself, such as a shell's `runs/*` finds it, is no student and left out.

    Parameters
    ----------
    energy_key, forces_key : names of the labels in the files of `test`
    scale_file : scale factors, for a teacher that is a checkpoint of OCP and holds none
    throughput : whether all runs and the teacher take turns in a measurement of their speed, in place of the
        speeds of their evaluations, which were made at different times
    groups : test sets whose mean gets a table too, as NAME=SET,SET; beside those the runs were trained with
    keep_teacher : folder where measurements of the teacher are kept, and taken from while they hold
    fingerprints : of test data, filled here: several reports on the same data read them once

    Raises
    ------
    ConfigError
        If one name stands for two different data sets, a group names a data set that does not exist, or there
        is no run beside the teacher.
    DataError
        If a run has not finished, or data cannot be read; nothing has been computed or written then.
    ModelError, TeacherError
        If a model cannot be loaded or was not made for the data.
    """
    if teacher is not None:
        runs = _students(runs, teacher)
    read = [read_run(run) for run in runs]
    group_runs(read)
    known = fingerprints if fingerprints is not None else {}
    sets = _test_sets(runs, test, (energy_key, forces_key), known)
    test_groups = {group.name: group.splits for group in splits_of(read, sets, parse_groups(groups))}
    chosen = choose_device(device)
    evaluations = {Path(run): _evaluations_of(run, sets, chosen, batch_size) for run in runs}
    _check_same_data(evaluations)
    result = None
    models: dict[str, Teacher] = {}
    if teacher is not None:
        model = models[_TEACHER] = load_teacher(teacher, device=chosen, scale_file=scale_file)
        of_teacher = _measured(model, sets, batch_size, keep_teacher)
        result = TeacherResult(model.info.name, n_parameters=model.info.n_parameters, evaluations=of_teacher)
    if throughput:
        models |= {str(run): load_teacher(str(run), device=chosen) for run in runs}
        speeds = _speeds(models, sets, batch_size)
        evaluations = {run: _with_speed(results, speeds[str(run)]) for run, results in evaluations.items()}
        if result is not None:
            result = replace(result, evaluations=_with_speed(result.evaluations, speeds[_TEACHER]))
    others: dict[str, object] = {
        "--scale-file": scale_file, "--energy-key": energy_key, "--forces-key": forces_key,
        "--throughput": throughput or None, "--batch-size": batch_size if throughput else None,
    }  # fmt: skip
    command = report_command(runs, out, teacher=teacher, test=test, groups=groups, others=others)
    return write_report(
        runs, out, teacher=result, evaluations=evaluations, test_groups=test_groups, command=command
    )


def _students(runs: Sequence[Path], teacher: str) -> list[Path]:
    """Leave out the run that is the teacher."""
    places = {Path(teacher).resolve(), Path(teacher).resolve().parent}  # or its best.safetensors is named
    students = [run for run in runs if Path(run).resolve() not in places]
    if len(students) < len(runs):
        log.info("%s: is the teacher, not counted among the students", teacher)
    if not students:
        raise ConfigError(f"{teacher}: is the only run; name those of students too")
    return students


def _speeds(models: dict[str, Teacher], sets: Mapping[str, _TestSet], batch_size: int) -> dict[str, Speed]:
    """Return the speeds of models that take turns on a sample of all test data."""
    with ExitStack() as stack:
        there = [data for data in sets.values() if is_there(data.path)]
        sources = [stack.enter_context(closing(_open(data))) for data in there]
        if not sources:
            raise ConfigError("--throughput: no test data are there to measure it on; name some with --test")
        return measure_speeds(models, sources, batch_size)


def _with_speed(results: Mapping[str, Evaluation], speed: Speed) -> dict[str, Evaluation]:
    return {name: result.with_speed(speed) for name, result in results.items()}


def _test_sets(
    runs: Sequence[Path],
    given: Sequence[Path | str],
    keys: _Keys,
    known: Fingerprints,
) -> dict[str, _TestSet]:
    """Return the test data by name: the file's name up to the first dot."""
    found: dict[str, dict[Path | str, _TestSet]] = {}  # name -> place -> data
    for run in runs:
        config = make_config(TrainConfig, read_yaml(run / "config.yaml"))
        for name, path in config.test.items():
            mine = _TestSet(path, (config.energy_key, config.forces_key), is_named=False)
            if found.setdefault(name, {}).setdefault(resolved(path), mine).keys != mine.keys:
                raise ConfigError(
                    f"{run}: takes other labels of {path} ({_names(mine.keys)}) than the runs before it; "
                    "report these runs apart"
                )
    for path in given:
        places = found.setdefault(short_name(path), {})
        of_runs = places[resolved(path)].keys if resolved(path) in places else keys
        places[resolved(path)] = _TestSet(path, of_runs if keys == (None, None) else keys, is_named=True)
    return {name: _the_one(name, list(places.values()), known) for name, places in found.items()}


def _names(keys: _Keys) -> str:
    energy, forces = (key or "the usual name" for key in keys)
    return f"energy: {energy}, forces: {forces}"


def _the_one(name: str, candidates: Sequence[_TestSet], known: Fingerprints) -> _TestSet:
    """Return the data behind a name; several places will do if they hold the same systems and labels."""
    there = []
    for candidate in candidates:
        if is_there(candidate.path) or (candidate.is_named and candidate.keys != (None, None)):
            key = (resolved(candidate.path), candidate.keys)
            if key not in known:
                with closing(_open(candidate)) as source:
                    known[key] = fingerprint(source)
            there.append(replace(candidate, fingerprint=known[key]))
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
    """Return what a run gives on every test set."""
    if not sets:
        return {}
    return _measured(load_teacher(str(run), device=device), sets, batch_size, run / FOLDER)


def _measured(
    model: Teacher, sets: Mapping[str, _TestSet], batch_size: int, folder: Path | None
) -> dict[str, Evaluation]:
    """Return what a model gives on every test set: as kept in the folder where that still holds."""
    results = {}
    for name, data in sets.items():
        if folder is None:
            results[name] = _evaluate_set(model, data, batch_size)
            continue
        path = folder / f"{name}.npz"
        known = _kept(path)
        if known is not None and not known.is_complete and is_there(data.path):
            log.info("%s: kept by an older version without tails and breakdowns, measured again", path)
            known = None
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
        return evaluate_source(teacher, source, batch_size)
