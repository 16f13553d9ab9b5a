"""What a Dask worker does in stage one: it holds a teacher, does shards and sends receipts of a few bytes.

Jobs and receipts are plain JSON values, and functions travel by name; the other side is `distributed`.
A job has `run` (an id), `config` (of stage one), `threads` (of torch; None leaves them), and later
`name` (of the teacher in the store) and `groups` (signal -> group).
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from molkd.cache_schema.files import host_name
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.writer import Store
from molkd.pipeline.allocator import keep_freed_memory
from molkd.pipeline.caching import make_room, open_teacher, provenance
from molkd.pipeline.config import CacheConfig
from molkd.pipeline.errors import MolkdError
from molkd.pipeline.prefetch import Background
from molkd.pipeline.shard_output import Written
from molkd.pipeline.shard_work import PREFETCH, Stage, compute_shard, missing_groups
from molkd.pipeline.teacher_pass import TeacherPass
from molkd.pipeline.teachers.interface import Teacher

Job = dict[str, Any]
Receipt = dict[str, Any]  # of a shard: `systems` computed, `bytes` written, `bad` systems (stored indices)

_lock = threading.Lock()  # a worker with several threads runs one teacher at a time
_held: dict[str, Any] = {}  # what is kept from task to task, of one run
_halted: dict[str, bool] = {}  # runs that begin no shard any more -> whether to drop the one in work


class _DroppedError(Exception):
    """The shard in work is not wanted any more."""


def perform(task: str, job: Job, *arguments: Any) -> dict[str, Any]:
    """Do one of the tasks below; what is the user's to solve comes back as plain values.

    Any other error is raised, for Dask to try again on another worker.

    Returns
    -------
    dict
        ``{"receipt": ...}`` or ``{"error": class, "message": text, "host": name}``
    """
    try:
        with _lock:
            return {"receipt": _TASKS[task](job, *arguments)}
    except MolkdError as error:
        return {"error": type(error).__name__, "message": str(error), "host": host_name()}


def halt(run: str, *, drop: bool) -> None:
    """Begin no shard of a run any more, and drop the one in work if so asked; not a task: done at once."""
    _halted[run] = drop


def release(run: str) -> None:
    """Let go of a run's teacher; not a task: done at once."""
    if _held.get("run") == run:
        _held.clear()


def _check(job: Job) -> None:
    """Load the teacher and look whether it gives what is asked, before data are read."""
    _teacher(job)


def _make_room(job: Job) -> dict[str, Any]:
    """Settle the encodings and make room for the signals."""
    stage = make_room(_config(job), _teacher(job))
    return {"name": stage.name, "groups": dict(stage.groups)}


def _do_shard(job: Job, shard: int) -> Receipt:
    """Do what is missing of a shard; one that is finished costs a look at the commit log."""
    run, written, n_systems = job["run"], Written(), 0
    store: Store = _hold(job, "store", lambda: Store.open(_config(job).store, mode="a"))
    wanted = {} if run in _halted else missing_groups(store, job["groups"], shard)
    if wanted:
        stage: Stage = _hold(job, "stage", lambda: _join(job, store))
        try:
            with Background("kd-write", PREFETCH) as writing:
                compute_shard(stage, shard, wanted, writing, written, partial(_go_on, run))
            n_systems = len(store.systems_of_shard(shard))
        except _DroppedError:
            written = Written()
    return {"systems": n_systems, "bytes": written.n_bytes, "bad": sorted(written.bad_systems)}


_TASKS: dict[str, Callable[..., Any]] = {"check": _check, "make room": _make_room, "do shard": _do_shard}


def _go_on(run: str, _n_systems: int) -> None:
    if _halted.get(run):
        raise _DroppedError


def _join(job: Job, store: Store) -> Stage:
    """Return this worker's own teacher before the store, which must be the teacher the store knows."""
    teacher = _teacher(job)
    store.add_teacher(job["name"], provenance(teacher))
    config = _config(job)
    return Stage(config, store, TeacherPass(teacher, Cache.open(config.store)), job["name"], job["groups"])


def _teacher(job: Job) -> Teacher:
    def load() -> Teacher:
        keep_freed_memory()
        if job["threads"] is not None:
            torch.set_num_threads(job["threads"])
        return open_teacher(_config(job))

    teacher: Teacher = _hold(job, "teacher", load)
    return teacher


def _config(job: Job) -> CacheConfig:
    return CacheConfig.model_validate(job["config"])


def _hold(job: Job, what: str, make: Callable[[], Any]) -> Any:
    """Return what this worker holds for the run, made at the first call; what was of another run goes."""
    if _held.get("run") != job["run"]:
        _held.clear()
        _held["run"] = job["run"]
    if what not in _held:
        _held[what] = make()
    return _held[what]
