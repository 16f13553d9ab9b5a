"""Stage one of a study, as far as it is missing: the store, teachers trained on it, their signals in it."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molkd.cache_schema.layout import PLAN
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.remote import is_url, writable_root
from molkd.pipeline.caching import cache_teacher
from molkd.pipeline.config import CacheConfig, IngestConfig, make_config, merged, nested
from molkd.pipeline.distill.settings import train_config
from molkd.pipeline.errors import CacheError, ConfigError, ModelError
from molkd.pipeline.ingest import ingest
from molkd.pipeline.places import short_name
from molkd.pipeline.study.grid import MANY_EPOCHS, Run, check_folders, signals_read
from molkd.pipeline.study.schema import StudyConfig
from molkd.pipeline.study.state import State, standing_of
from molkd.pipeline.teachers.load import load_teacher

log = logging.getLogger(__name__)

TEACHERS = "teachers"  # in a study's folder: the run folders of teachers that it trains

MakeRuns = Callable[[Sequence[Run]], bool]  # returns whether they were interrupted


@dataclass(frozen=True)
class Missing:
    """What stage one has still to do."""

    store: bool
    training: tuple[str, ...]  # teachers
    signals: Mapping[str, tuple[str, ...]]  # teacher -> what the store lacks of it, of what a run reads

    def describe(self) -> list[str]:
        """Return one line a step."""
        return [
            *(["the store is made"] if self.store else []),
            *(f"teacher {name} is trained" for name in self.training),
            *(f"{', '.join(signals)} of teacher {name} are cached" for name, signals in self.signals.items()),
        ]


def open_store(study: StudyConfig) -> Cache | None:
    """Open the study's store; None if it is for the study to make.

    Raises
    ------
    CacheError
        If there is none and nothing says how to make it, or it was made from other files.
    """
    there = is_url(study.store) or (Path(study.store) / PLAN).exists()
    if not there and study.data is None:
        raise CacheError(
            f"{study.store}: no store; make it with kd ingest, or say under `data` what it is made from"
        )
    if not there:
        return None
    try:
        cache = Cache.open(study.store)
    except CacheError:
        if study.data is None:
            raise
        return None  # unfinished: kd ingest goes on
    if study.data is not None:
        given = {short_name(place) for place in (*study.data.files, *study.data.drop_labels)}
        held = {short_name(name) for name in cache.source_names}
        if not given <= held:
            raise CacheError(
                f"{study.store}: made from {', '.join(sorted(held))}, the study's data are "
                f"{', '.join(sorted(given))}; give the study another store"
            )
    return cache


def make_store(study: StudyConfig) -> Cache:
    """Put the study's data into its store."""
    assert study.data is not None
    log.info("%s: structures and labels", study.store)
    given = study.data.model_dump()
    ingest(make_config(IngestConfig, given | {"data": given.pop("files"), "store": study.store}))
    return Cache.open(study.store)


def missing_of(study: StudyConfig, cache: Cache | None, runs: Sequence[Run]) -> Missing:
    """Say what stage one has still to do for these runs."""
    wanted: dict[str, set[str]] = {name: set(spec.signals) for name, spec in study.teachers.items()}
    for run in runs:
        if run.config.teacher in wanted:
            wanted[run.config.teacher] |= set(signals_read(run.config))
    signals = {name: _lacking(cache, name, these) for name, these in wanted.items()}
    training = [
        name
        for name, spec in study.teachers.items()
        if spec.train is not None
        and standing_of(teacher_run(study, name, periodic=False)).state is not State.FINISHED
    ]
    return Missing(cache is None, tuple(training), {name: these for name, these in signals.items() if these})


def check_teachers(study: StudyConfig, cache: Cache) -> None:
    """Refuse teachers other than those whose signals the store holds: gaps would be those of another one.

    Raises
    ------
    CacheError
        If the store holds signals under the name of a teacher with other weights, or one still to train.
    ConfigError
        If a teacher was trained with other settings.
    TeacherError, ModelError
        If a teacher cannot be loaded.
    """
    periodic = bool(cache.pbc.any())
    trained = [name for name, spec in study.teachers.items() if spec.train is not None]
    runs = {name: teacher_run(study, name, periodic=periodic) for name in trained}
    check_folders(list(runs.values()))
    remedy = "give this teacher another name in the study, or the study another store"
    for name in study.teachers:
        if name not in cache.teachers:
            continue
        if name in runs and standing_of(runs[name]).state is not State.FINISHED:
            raise CacheError(
                f"{study.store}: holds signals of a teacher {name} already, and {runs[name].path} is still "
                f"to be trained; name the run folder of that teacher under teachers.{name}.model, or {remedy}"
            )
        found = teacher_model(study, name)
        assert found is not None
        model, scale_file = found
        weights = load_teacher(model, device="cpu", scale_file=scale_file).info.weights_sha256
        if weights != (cached := cache.teachers[name].provenance["weights_sha256"]):
            raise CacheError(
                f"{study.store}: the signals of teacher {name} are by weights {cached[:16]}, {model} has "
                f"{weights[:16]}; {remedy}"
            )


def _lacking(cache: Cache | None, teacher: str, wanted: set[str]) -> tuple[str, ...]:
    """Return what the store lacks of a teacher, but for what that teacher is known not to give."""
    if cache is None or teacher not in cache.teachers:
        return tuple(sorted(wanted))
    entry = cache.teachers[teacher]
    there = {name for name, signal in entry.signals.items() if signal.complete}
    offered = {*entry.provenance.get("taps", ()), "energy", "forces"}
    if entry.provenance.get("taps"):
        wanted = wanted & offered
    return tuple(sorted(wanted - there))


def teacher_run(study: StudyConfig, name: str, *, periodic: bool) -> Run:
    """Return the run that trains a teacher, on the labels of the store.

    Raises
    ------
    ConfigError
        If a setting is unknown or makes no sense.
    """
    training = study.teachers[name].train
    assert training is not None
    length = {"max_steps": training.steps, "max_epochs": MANY_EPOCHS} if training.steps else {}
    own = {
        "store": study.store,
        "out": study.out / TEACHERS / name,
        "student": training.preset,
        "seed": training.seed,
        "test": study.test,
        "label": f"teacher {name}",
    }
    layers: list[dict[str, Any]] = [{"training": length}, dict(study.label_keys), nested(training.set), own]
    if study.val:
        layers.append({"val": study.val})
    try:
        config = train_config(training.preset, merged(*layers), periodic=periodic)
    except ConfigError as error:
        raise ConfigError(f"teachers.{name}.train: {error}") from None
    if config.kd:
        raise ConfigError(f"teachers.{name}.train: a teacher learns from labels alone; leave kd out")
    return Run(f"{TEACHERS}/{name}", config, ())


def train_teachers(study: StudyConfig, names: Sequence[str], make: MakeRuns, *, periodic: bool) -> None:
    """Train the teachers that are to be trained.

    Raises
    ------
    KeyboardInterrupt
        If they were interrupted.
    ModelError
        If one failed.
    """
    runs = [teacher_run(study, name, periodic=periodic) for name in names]
    if make(runs):
        raise KeyboardInterrupt
    for run in runs:
        standing = standing_of(run)
        if standing.state is not State.FINISHED:
            reason = standing.failure.reason if standing.failure else f"is {standing.state.value}"
            raise ModelError(f"{run.path}: the teacher could not be trained: {reason}")


def teacher_model(study: StudyConfig, name: str) -> tuple[str, Path | None] | None:
    """Return where a teacher is, and its scale factors; None if the study does not know."""
    spec = study.teachers.get(name)
    if spec is None:
        return None
    model = spec.model if spec.model is not None else str(study.out / TEACHERS / name)
    return model, spec.scale_file


def cache_signals(
    study: StudyConfig, missing: Missing, *, scheduler: str | None, devices: Sequence[str]
) -> None:
    """Have the teachers look at every system; what one does not give is left out and said."""
    for name, signals in missing.signals.items():
        found = teacher_model(study, name)
        assert found is not None
        model, scale_file = found
        offered = load_teacher(model, device="cpu", scale_file=scale_file).signals
        given = [signal for signal in signals if signal in offered]
        if not given:
            continue
        log.info("%s: %s of teacher %s", study.store, ", ".join(given), name)
        cache_teacher(
            CacheConfig(
                store=writable_root(study.store),
                teacher=model,
                scale_file=scale_file,
                name=name,
                signals=tuple(given),
                encoding=study.teachers[name].encoding,
                scheduler=scheduler,
                workers=len(devices) if len(devices) > 1 and scheduler is None else None,
            )
        )
