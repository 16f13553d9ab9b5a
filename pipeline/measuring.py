"""`kd evaluate`: apply any model or teacher to labelled data, and measure how fast it is."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from molkd.pipeline.config import SplitGroup, parse_groups
from molkd.pipeline.data.sources import Source, open_sources
from molkd.pipeline.data.system import System
from molkd.pipeline.data.validate import check_system
from molkd.pipeline.device import choose_device
from molkd.pipeline.errors import ConfigError
from molkd.pipeline.evaluation.breakdown import KINDS, check_kind
from molkd.pipeline.evaluation.evaluate import Predict, evaluate, known_systems
from molkd.pipeline.evaluation.predictions import ExtxyzPredictions
from molkd.pipeline.evaluation.result import Evaluation
from molkd.pipeline.evaluation.splits import mean_report, split_groups
from molkd.pipeline.evaluation.summary import EvaluationSummary, ModelEvaluation
from molkd.pipeline.evaluation.throughput import Speed
from molkd.pipeline.evaluation.turns import MAX_BATCHES, SECONDS, Contender, measure_in_turns, sample_systems
from molkd.pipeline.evaluation.worst import N_WORST, WorstSystems
from molkd.pipeline.places import by_short_name, resolved
from molkd.pipeline.progress import Progress
from molkd.pipeline.scope import Scope
from molkd.pipeline.teachers.interface import Teacher
from molkd.pipeline.teachers.load import load_teacher

log = logging.getLogger(__name__)

_MOST_SECONDS = 120.0  # that many models take in all, unless MIN_ROUNDS take longer
_MEAN = "mean"  # of all data sets, where no group of them is named


def evaluate_model(
    model: str,
    data: Sequence[Path | str],
    *,
    predictions: Path | None = None,
    energy_key: str | None = None,
    forces_key: str | None = None,
    batch_size: int = 32,
    device: str = "auto",
    scale_file: Path | None = None,
    groups: Sequence[str] = (),
    by: Sequence[str] = (),
    worst: int = 0,
    worst_out: Path | None = None,
    throughput: bool = False,
    beside: Sequence[str] = (),
) -> ModelEvaluation:
    """Measure a run, a model file or any teacher on the labels of `data`.

    Parameters
    ----------
    data : several give a row each and their mean
    predictions : file for structures, labels and predictions
    scale_file : scale factors, for a checkpoint of OCP that holds none
    groups : data sets whose mean is wanted, as NAME=SET,SET; by default of all, or OC20's four splits
    by : what errors are told apart by, see `breakdown.check_kind`
    worst : how many systems with the largest errors to tell
    worst_out : file for them, with labels and predictions; as many as `worst`, or N_WORST
    throughput : whether to measure the speed with care, see `turns`
    beside : more models whose speed is measured in turns with this one

    Raises
    ------
    ModelError, TeacherError
        If the model cannot be loaded, does not know an element, or gives non-finite numbers.
    ConfigError
        If two data sets have one name, a group or a breakdown makes no sense, or a file would be written over
        what is read.
    DataError
        If data cannot be read, or a file cannot be written.
    """
    kinds = tuple(dict.fromkeys(check_kind(kind) for kind in by))
    if beside and not throughput:
        raise ConfigError("--beside names models whose speed is compared; it goes with --throughput")
    _check_outputs(
        {"--predictions": predictions, "--worst-out": worst_out}, (*data, *map(Path, (model, *beside)))
    )
    places = by_short_name(data, "DATA")
    means = _groups(parse_groups(groups), list(places))
    chosen = choose_device(device)
    n_worst = worst or (N_WORST if worst_out else 0)
    results: dict[str, Evaluation] = {}
    kept = {name: WorstSystems(max(n_worst, N_WORST)) for name in places}
    with ExitStack() as stack:
        sources = open_sources(data, energy_key=energy_key, forces_key=forces_key)
        for source in sources:
            stack.enter_context(closing(source))
        teachers = {model: load_teacher(model, device=chosen, scale_file=scale_file)}
        teachers |= {name: load_teacher(name, device=chosen) for name in beside if name != model}
        writer = stack.enter_context(ExtxyzPredictions(predictions)) if predictions else None
        worst_writer = stack.enter_context(ExtxyzPredictions(worst_out)) if worst_out else None
        for name, source in zip(places, sources, strict=True):
            results[name] = evaluate_source(
                teachers[model],
                source,
                batch_size,
                writer=writer,
                breakdowns=(*KINDS, *kinds),
                worst=kept[name],
            )
            if worst_writer is not None:
                worst_writer.add_worst(kept[name], n_worst)
        speeds = measure_speeds(teachers, sources, batch_size) if throughput else {}
    summaries = {
        name: EvaluationSummary.of(model, str(place), results[name]) for name, place in places.items()
    }
    reports = {name: result.to_report() for name, result in results.items()}
    values = {group.name: mean_report(group, reports) for group in means}
    for _, problems in values.values():
        for problem in problems:
            log.warning("%s", problem)
    return ModelEvaluation(
        sets=summaries,
        evaluations=results,
        means={name: mean for name, (mean, _) in values.items()},
        groups={group.name: group.splits for group in means},
        by=kinds,
        n_worst=worst,
        speeds=speeds,
    )


def evaluate_source(
    teacher: Teacher,
    source: Source,
    batch_size: int,
    *,
    writer: ExtxyzPredictions | None = None,
    breakdowns: Sequence[str] = KINDS,
    worst: WorstSystems | None = None,
) -> Evaluation:
    """Measure a model on a source, with progress, and say what the source has no labels of.

    Raises
    ------
    DataError
        If a system cannot be read or makes no sense.
    ModelError
        If a system is out of the model's scope, or its output is not finite.
    """
    with Progress(len(source), source.path.name, "system") as progress:
        result = evaluate(
            _predict(teacher),
            known_systems(source, _scope(teacher)),
            teacher.neighbor_rule,
            batch_size=batch_size,
            device=teacher.device,
            dtype=torch.float32,
            breakdowns=breakdowns,
            worst=worst,
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


def measure_speeds(
    teachers: dict[str, Teacher], sources: Sequence[Source], batch_size: int
) -> dict[str, Speed]:
    """Return the throughput of models that take turns on the same random sample of all sources.

    It takes about SECONDS a model, and less where many models would take minutes.

    Raises
    ------
    DataError, ModelError
        If a system of the sample makes no sense, or is out of the scope of a model.
    """
    sample = list(_checked(sample_systems(sources, MAX_BATCHES * batch_size), list(teachers.values())))
    contenders = [
        Contender(name, _predict(teacher), teacher.neighbor_rule, teacher.device)
        for name, teacher in teachers.items()
    ]
    with Progress(0, "throughput", "round") as progress:
        return measure_in_turns(
            contenders,
            sample,
            batch_size=batch_size,
            seconds=min(SECONDS, _MOST_SECONDS / len(contenders)),
            on_round=progress.advance_to,
        )


def _check_outputs(outputs: Mapping[str, Path | None], inputs: Sequence[Path | str]) -> None:
    """Refuse to write over what is read, or two results into one file."""
    read = {resolved(place) for place in inputs}
    written: dict[Path | str, str] = {}
    for option, path in outputs.items():
        if path is None:
            continue
        place = resolved(path)
        if place in read:
            raise ConfigError(f"{path}: is read here and would be written over; another file for {option}")
        if place in written:
            raise ConfigError(f"{path}: named for {written[place]} and for {option}; give two files")
        written[place] = option


def _groups(given: dict[str, tuple[str, ...]], names: Sequence[str]) -> list[SplitGroup]:
    """Return the groups to take means over: those named, else OC20's splits, else all data sets."""
    groups = split_groups(given, names)
    if not groups and len(names) > 1 and _MEAN not in names:
        groups = [SplitGroup(_MEAN, tuple(names))]
    return groups


def _scope(teacher: Teacher) -> Scope:
    return Scope(teacher.info.name, teacher.atomic_numbers, teacher.neighbor_rule)


def _checked(systems: Iterator[System], teachers: Sequence[Teacher]) -> Iterator[System]:
    for system in systems:
        check_system(system)
        for teacher in teachers:
            _scope(teacher).check(system)
        yield system


def _predict(teacher: Teacher) -> Predict:
    return lambda batch: teacher.compute(batch, ("energy", "forces"))
