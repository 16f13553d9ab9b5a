"""Runs on the workers of a Dask cluster: a task is one run, which a process beside the worker makes."""

import logging
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from distributed import Client, Future
from distributed.scheduler import KilledWorker

from molkd.pipeline.cluster import connect_to, quiet_dask
from molkd.pipeline.errors import CacheError
from molkd.pipeline.interrupts import interruptible
from molkd.pipeline.study.grid import Run
from molkd.pipeline.study.local import STOPPING, Note
from molkd.pipeline.study.process import Job, Outcome, make_job, perform
from molkd.pipeline.study.state import Failure, note_failure

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.2
_BUSY_SECONDS = 30.0  # for the run of a worker that died to reach its checkpoint
_stopped: dict[str, int] = {}  # on a worker: study -> how often it was told to stop


def run_on_cluster(runs: Sequence[Run], note: Note, *, scheduler: str, threads: int | None) -> bool:
    """Make the runs on the workers of a scheduler; return whether they were interrupted.

    Run folders and store have to lie where every worker sees them under the same path.

    Raises
    ------
    ConfigError
        If no scheduler answers at the address, or its workers cannot import this package.
    CacheError
        If the scheduler goes away on the way.
    """
    study, told = uuid.uuid4().hex, 0
    with quiet_dask(), connect_to(scheduler) as client, interruptible() as stops:
        flying = {_submit(client, study, run, threads): run for run in runs}
        while flying:
            time.sleep(_LOOK_SECONDS)
            if client.status != "running":
                raise CacheError(
                    f"the scheduler {scheduler} has gone; run the same command again, runs in work continue"
                )
            if stops() > told:
                told = stops()
                log.warning(STOPPING)
                with suppress(OSError, RuntimeError):
                    client.run(stop, study, told, on_error="ignore")
            for future in [f for f in flying if f.done()]:
                run = flying.pop(future)
                note(run, _outcome(future, run, scheduler))
        return stops() > 0


def _submit(client: Client, study: str, run: Run, threads: int | None) -> "Future[Any]":
    key = f"kd-run-{run.name.replace('/', '-')}-{uuid.uuid4().hex}"
    return client.submit(make, study, make_job(run.config, threads), key=key, pure=False)


def _outcome(future: "Future[Any]", run: Run, scheduler: str) -> Outcome:
    if future.status == "finished":
        told = future.result()
        failure = Failure(**told["failure"]) if told["failure"] else None
        return Outcome(told["ended"], told["seconds"], failure)
    if future.status != "error":
        raise CacheError(
            f"the scheduler {scheduler} gave {run.name} up ({future.status}); run the command again"
        )
    error = future.exception()
    died = isinstance(error, KilledWorker)
    reason = "its workers died; see their logs" if died else f"{type(error).__name__}: {error}"
    failure = Failure("killed" if died else "unexpected", reason)
    note_failure(run.path, failure)
    return Outcome("failed", 0.0, failure)


def make(study: str, job: Job) -> dict[str, Any]:
    """Make one run beside this worker, as plain values."""
    began = time.monotonic()
    while True:
        outcome = perform(job, lambda: _stopped.get(study, 0))
        if outcome.ended != "busy" or time.monotonic() - began > _BUSY_SECONDS:
            return asdict(outcome)
        time.sleep(_LOOK_SECONDS)


def stop(study: str, times: int) -> None:
    """Have this worker stop its runs of a study; not a task: done at once."""
    _stopped[study] = times
