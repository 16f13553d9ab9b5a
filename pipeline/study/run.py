"""`kd study`, read from top to bottom: prepare, make what is missing of the grid, and write the tables."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from molkd.cache_schema.files import make_folder
from molkd.cache_schema.reader import Cache
from molkd.pipeline.errors import CacheError, ConfigError, DataError
from molkd.pipeline.files import locked_folder
from molkd.pipeline.places import Place, is_there
from molkd.pipeline.study.fitting import split_fitting
from molkd.pipeline.study.grid import (
    Cell,
    Run,
    cells_of,
    check_folders,
    check_mixed_names,
    matching,
    mixed_stores,
    runs_of,
)
from molkd.pipeline.study.local import Note, run_here, share_out
from molkd.pipeline.study.options import StudyOptions
from molkd.pipeline.study.preparing import (
    cache_signals,
    check_teachers,
    make_store,
    missing_of,
    open_store,
    teacher_run,
    train_teachers,
)
from molkd.pipeline.study.progress import Progress
from molkd.pipeline.study.schema import StudyConfig
from molkd.pipeline.study.state import State, standing_of, to_do
from molkd.pipeline.study.summary import StudySummary
from molkd.pipeline.study.tables import write_tables

log = logging.getLogger(__name__)


def run_study(study: StudyConfig, options: StudyOptions) -> StudySummary:
    """Make what is missing of a study, and its tables; the same call continues.

    Raises
    ------
    ConfigError, CacheError, DataError, ModelError, TeacherError
        If the study asks for what there is not; no run has begun then.
    KeyboardInterrupt
        If it was interrupted; runs in work have stopped at checkpoints.
    """
    check_mixed(study, options)
    plan = prepare(study, options)
    chosen = matching(plan.runs, options.only)
    if options.worker is not None:
        chosen = chosen[options.worker[0] :: options.worker[1]]
    runs = to_do([standing_of(run) for run in chosen], retry=options.retry)
    log.info("%s: %d runs, %d to make now", study.name, len(plan.runs), len(runs))
    progress = Progress(chosen, runs)
    if _make(runs, options, progress.note):
        raise KeyboardInterrupt
    return summarize(plan, partly=options.worker is None)


def prepare_study(study: StudyConfig, options: StudyOptions) -> StudySummary:
    """Do stage one, as far as it is missing, and no run; raises as `run_study`."""
    return summarize(prepare(study, options), tables=False)


def report_study(study: StudyConfig, options: StudyOptions) -> StudySummary:  # noqa: ARG001  as the others
    """Write the tables of what has finished; nothing is trained.

    Raises
    ------
    ConfigError, CacheError, DataError, ModelError, TeacherError
        See the message.
    """
    cells = cells_of(study)
    cache = open_store(study)
    if cache is None:
        raise CacheError(f"{study.store}: no store yet, so nothing has finished; run the study first")
    runs = runs_of(study, cells, periodic=bool(cache.pbc.any()))
    check_folders(runs)
    check_teachers(study, cache)
    able, skipped = split_fitting(runs, cache)
    make_folder(study.out)
    return summarize(Plan(study, cells, able, skipped))


@dataclass(frozen=True)
class Plan:
    """A study before a store that holds all it needs."""

    study: StudyConfig
    cells: list[Cell]
    runs: list[Run]  # those that can be made
    skipped: dict[str, str]  # line -> why not


def prepare(study: StudyConfig, options: StudyOptions) -> Plan:
    """Check everything, and do what is missing of stage one.

    Raises
    ------
    ConfigError, CacheError, DataError, ModelError, TeacherError
        See the message.
    KeyboardInterrupt
        If the training of a teacher was interrupted.
    """
    cells = cells_of(study)
    matching(check_settings(study, cells), options.only)
    make_folder(study.out)
    with _alone(study.out):
        cache = open_store(study)
        if cache is None:
            _refuse_array(options, study, ["the store is made"])
            cache = make_store(study)
        periodic = bool(cache.pbc.any())
        runs = runs_of(study, cells, periodic=periodic)
        check_folders(runs)
        if options.worker is None:  # before an array the study was prepared: its jobs need no teacher
            check_teachers(study, cache)
        missing = missing_of(study, cache, runs)
        if steps := missing.describe():
            _refuse_array(options, study, steps)
        if missing.training:
            train_teachers(
                study,
                missing.training,
                lambda these: _make(these, options, Progress(these, these).note),
                periodic=periodic,
            )
        if missing.signals:
            devices = share_out("auto", options.jobs, options.threads)[2]
            cache_signals(study, missing, scheduler=options.scheduler, devices=devices)
            cache = Cache.open(study.store)
    able, skipped = split_fitting(runs, cache)
    for line, reason in skipped.items():
        log.warning("%s: left out: %s", line, reason)
    return Plan(study, cells, able, skipped)


def check_settings(study: StudyConfig, cells: Sequence[Cell]) -> list[Run]:
    """Refuse settings that make no sense, whatever the store holds; return all runs.

    Raises
    ------
    ConfigError
        With the line and the nearest valid key.
    DataError
        If there is no file of validation or test data, or of a teacher.
    """
    runs = runs_of(study, cells, periodic=False)
    check_mixed_names(runs)
    for name, spec in study.teachers.items():
        if spec.train is not None:
            teacher_run(study, name, periodic=False)
    for place in (*([study.val] if study.val else []), *study.test.values(), *study.report.test):
        if not is_there(place):
            raise DataError(f"{place}: validation or test data of the study, but there is no such file")
    for name, spec in study.teachers.items():
        if spec.model is not None and os.sep in spec.model and not is_there(spec.model):
            raise DataError(f"{spec.model}: model of teacher {name} of the study, but there is no such file")
    return runs


def check_mixed(study: StudyConfig, options: StudyOptions) -> None:
    """Refuse further stores that cannot be opened, before a teacher is trained for days.

    Raises
    ------
    CacheError
        If there is no such store, or it is unfinished.
    """
    runs = matching(runs_of(study, cells_of(study), periodic=False), options.only)
    waiting = [run for run in runs if run.config.mix and standing_of(run).state is not State.FINISHED]
    for store in absent_mixed(waiting):
        raise CacheError(
            f"{store}: a further store of the study (mix), but there is none; make it with kd augment or kd "
            "ingest, or begin with the runs that do without (--only)"
        )
    for store in mixed_stores(waiting):
        Cache.open(store)


def absent_mixed(runs: Sequence[Run]) -> list[Place]:
    """Return the further stores of runs that are not there."""
    return [store for store in mixed_stores(runs) if not is_there(store)]


def summarize(plan: Plan, *, tables: bool = True, partly: bool = True) -> StudySummary:
    """Say where a study stands, and write its tables.

    Parameters
    ----------
    tables : whether to write them at all
    partly : and also while runs are missing that may still come

    Raises
    ------
    ConfigError, DataError, ModelError, TeacherError
        As `kd report`.
    """
    study = plan.study
    with _alone(study.out):
        standings = [standing_of(run) for run in plan.runs]
        waiting = [s.run.name for s in standings if s.state not in (State.FINISHED, State.FAILED)]
        wanted = tables and (partly or not waiting)
        written = write_tables(study, plan.cells, standings) if wanted else None
    return StudySummary(
        name=study.name,
        folder=study.out,
        n_runs=len(standings),
        n_finished=sum(s.state is State.FINISHED for s in standings),
        failed={s.run.name: s.failure.reason for s in standings if s.failure is not None},
        skipped=plan.skipped,
        waiting=waiting,
        tables=written,
    )


def _make(runs: Sequence[Run], options: StudyOptions, note: Note) -> bool:
    """Make runs where they are to be made; return whether they were interrupted."""
    if not runs:
        return False
    if options.scheduler is not None:
        from molkd.pipeline.study.distributed import run_on_cluster  # Dask takes half a second to import

        return run_on_cluster(runs, note, scheduler=options.scheduler, threads=options.threads)
    jobs, threads, devices = share_out(runs[0].config.device, options.jobs, options.threads)
    jobs = min(jobs, len(runs))
    share = f"on devices {', '.join(devices)}" if devices else f"{threads} threads each"
    log.info("%d runs side by side, %s", jobs, share)
    return run_here(runs, note, jobs=jobs, threads=threads, devices=devices)


def _refuse_array(options: StudyOptions, study: StudyConfig, steps: Sequence[str]) -> None:
    if options.worker is not None:
        raise ConfigError(
            f"{study.store}: jobs of an array would each do stage one ({'; '.join(steps)}); first run the "
            "study once with --prepare, then the array"
        )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process prepares or reports the study."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked_folder(folder))
        except BlockingIOError:
            log.info("%s: waiting for another process that prepares or reports this study", folder)
            stack.enter_context(locked_folder(folder, wait=True))
        yield
