"""Stage one on Dask: workers that each hold a teacher do the shards, and this process hands them out.

Features never travel: a task is one shard, which the worker reads, computes, writes and commits. Workers may
die, be slow or do a shard twice: each task begins with a look at the commit log.
"""

import logging
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from distributed import CancelledError, Client, Future, as_completed, wait
from distributed.scheduler import KilledWorker

from molkd.cache_schema.files import host_name
from molkd.cache_schema.writer import Store
from molkd.pipeline import errors, worker
from molkd.pipeline.cluster import connect_to, local_cluster, quiet_dask
from molkd.pipeline.config import CacheConfig
from molkd.pipeline.errors import CacheError, MolkdError, TeacherError
from molkd.pipeline.progress import Progress
from molkd.pipeline.shard_output import Written
from molkd.pipeline.shard_work import Outcome, announce, missing_shards, sweep_shards

log = logging.getLogger(__name__)

_DEATHS = 8  # of workers over the same shard, until it is called the shard's fault
_RETRIES = 2  # of a task that fails for a reason that is not the user's
_IN_FLIGHT = 32  # shards handed out at least, so that a cluster that grows sees that there is work
_GRACE_SECONDS = 20.0  # for workers to drop their shards after Ctrl-C
_GONE = (OSError, RuntimeError)  # what a client raises when its scheduler is not there any more


def cache_on_workers(config: CacheConfig, fill_store: Callable[[], None]) -> Outcome:
    """Do all missing shards on workers of this machine (`config.workers`) or of `config.scheduler`.

    Parameters
    ----------
    fill_store : puts structures into the store; called once a worker has loaded the teacher

    Raises
    ------
    ConfigError
        If the device does not exist, no scheduler answers, or its workers cannot import this package.
    TeacherError, ModelError, CacheError
        What stopped the first worker that failed, once the others have finished the shards they were at.
    """
    with _crew(config) as crew:
        crew.ask("check")
        fill_store()
        crew.job |= crew.ask("make room")
        groups = crew.job["groups"]
        store = Store.open(config.store, mode="a")
        shards = missing_shards(store, groups)
        n_computed, written = 0, Written()
        with Progress(announce(store, groups, shards), "teacher", "system") as progress:

            def note(shard: int, receipt: worker.Receipt) -> None:
                nonlocal n_computed
                n_computed += receipt["systems"]
                written.n_bytes += receipt["bytes"]
                written.bad_systems.update(receipt["bad"])
                progress.update(len(store.systems_of_shard(shard)))

            _HandOut(crew, shards, note).run()
        crew.look()
        if crew.lost_some:
            sweep_shards(store, groups, shards)
        return Outcome(store, crew.job["name"], groups, n_computed, written)


class _Crew:
    """Workers behind a scheduler, and the job they do."""

    def __init__(self, client: Client, job: worker.Job, where: str) -> None:
        self.client, self.job, self.where = client, job, where
        self._workers: set[str] = set()  # their addresses when last asked
        self.lost_some = False  # whether workers have gone that were there

    def look(self) -> int:
        """Return how many workers there are, and take note of those that have gone."""
        if self.is_cut_off:
            raise self.gone("connection lost")
        try:
            now = set(self.client.nthreads())
        except _GONE as error:
            raise self.gone(str(error)) from error
        if lost := len(self._workers - now):
            log.info("workers gone: %d; others do their shards", lost)
            self.lost_some = True
        self._workers = now
        return len(now)

    @property
    def is_cut_off(self) -> bool:
        """Whether there is no scheduler any more; each call to it would then wait for half a minute."""
        return bool(self.client.status != "running")

    def ask(self, task: str) -> Any:
        """Have one worker do a task, and return what it says."""
        future = self.submit(task)
        try:
            return self.receipt(future.result())
        except KilledWorker as killed:
            raise self.deadly(task) from killed
        except CancelledError as error:
            raise self.gone(str(error)) from error

    def submit(self, task: str, *arguments: Any) -> "Future[Any]":
        """Send a task to the scheduler."""
        key = "-".join(["kd", task.replace(" ", "-"), *map(str, arguments), uuid.uuid4().hex])
        future = self.client.submit(
            worker.perform, task, self.job, *arguments, key=key, pure=False, retries=_RETRIES
        )
        if self.is_cut_off:  # nobody would ever say what became of it
            raise self.gone("connection lost")
        return future

    def receipt(self, answer: Mapping[str, Any]) -> Any:
        """Return the receipt, or raise the error that a worker met."""
        if "receipt" in answer:
            return answer["receipt"]
        there = f"worker on {answer['host']}: " if answer["host"] != host_name() else ""
        raise getattr(errors, answer["error"], CacheError)(there + answer["message"])

    def deadly(self, task: str) -> TeacherError:
        """Return the error for a task that no worker survives."""
        return TeacherError(
            f"{self.job['config']['store']}: {_DEATHS} workers died over {task}; if memory ran out, lower "
            "--batch-atoms and --batch-edges or take fewer workers, else see the workers' logs; "
            "finished shards are kept"
        )

    def gone(self, found: str) -> CacheError:
        """Return the error for a scheduler that does not know its tasks any more."""
        return CacheError(
            f"{self.job['config']['store']}: the scheduler {self.where} has gone, or gave the work up "
            f"({found}); run the same command again, finished shards are kept"
        )

    def halt(self, *, drop: bool) -> None:
        """Have workers begin no shard any more, and drop those in work if so asked."""
        self._everywhere(worker.halt, drop=drop)

    def release(self) -> None:
        """Have workers let go of the teacher."""
        self._everywhere(worker.release)

    def _everywhere(self, function: Callable[..., None], **options: Any) -> None:
        if not self.is_cut_off:
            with suppress(*_GONE):
                self.client.run(function, self.job["run"], **options, on_error="ignore")


class _HandOut:
    """Shards on their way to workers, and receipts on their way back."""

    def __init__(self, crew: _Crew, shards: list[int], note: Callable[[int, worker.Receipt], None]) -> None:
        self._crew, self._todo, self._note = crew, iter(shards), note
        self._flying: dict[object, tuple[int, Future[Any]]] = {}  # key -> shard, its task
        self._finished = as_completed(loop=crew.client.loop, with_results=True, raise_errors=False)
        self._deaths = Counter[int]()  # of workers over a shard
        self._failure: Exception | None = None

    def run(self) -> None:
        """Do all shards, and tell `note` of each; the first failure is raised when nothing is in work."""
        try:
            self._send_more()
            for future, result in self._finished:
                shard, _ = self._flying.pop(future.key)
                try:
                    self._note(shard, self._receipt(future, result, shard))
                except KilledWorker as killed:
                    self._deaths[shard] += killed.allowed_failures + 1
                    if self._deaths[shard] >= _DEATHS:
                        self._fail(self._crew.deadly(f"shard {shard}"))
                    elif self._failure is None:
                        self._send([shard])
                except (MolkdError, OSError, RuntimeError) as error:
                    self._fail(error)
                if self._failure is None:
                    self._send_more()
        except BaseException:  # Ctrl-C above all: shards in work are dropped, committed ones stay
            if self._crew.is_cut_off:
                raise
            self._crew.halt(drop=True)
            with suppress(TimeoutError, CancelledError), self._crew.client.as_current():
                wait([future for _, future in self._flying.values()], timeout=_GRACE_SECONDS)
            raise
        if self._failure is not None:
            raise self._failure

    def _send_more(self) -> None:
        """Keep so much in flight that no worker waits."""
        room = max(_IN_FLIGHT, 2 * self._crew.look()) - len(self._flying)
        self._send(islice(self._todo, max(0, room)))

    def _send(self, shards: Iterable[int]) -> None:
        for shard in shards:
            future = self._crew.submit("do shard", shard)
            self._flying[future.key] = shard, future
            self._finished.add(future)

    def _receipt(self, future: "Future[Any]", result: Any, shard: int) -> worker.Receipt:
        if future.status == "finished":
            receipt: worker.Receipt = self._crew.receipt(result)
            return receipt
        if future.status == "error":
            raise future.exception()
        raise self._crew.gone(f"shard {shard} is {future.status}")

    def _fail(self, error: Exception) -> None:
        """Take note of a failure; at the first, workers finish the shards they are at and begin no other."""
        if self._failure is not None:
            return
        self._failure = error
        if self._crew.is_cut_off:
            return
        self._crew.halt(drop=False)
        with suppress(*_GONE):
            with_workers = {key for keys in self._crew.client.processing().values() for key in keys}
            waiting = [future for key, (_, future) in self._flying.items() if key not in with_workers]
            self._crew.client.cancel(waiting)


@contextmanager
def _crew(config: CacheConfig) -> Iterator[_Crew]:
    """Connect to a scheduler, or start one with workers on this machine; leaving ends what was started."""
    with ExitStack() as stack:
        stack.enter_context(quiet_dask())
        where, threads, device = str(config.scheduler), None, config.device
        if config.workers is None:
            client = stack.enter_context(connect_to(where))
        else:
            cluster, threads = stack.enter_context(local_cluster(device, config.workers, _DEATHS))
            client = stack.enter_context(Client(cluster, set_as_default=False))
            where, device = "on this machine", "cuda" if threads is None else "cpu"
        job = {"run": uuid.uuid4().hex, "config": _plain(config, device), "threads": threads}
        crew = _Crew(client, job, where)
        try:
            yield crew
        finally:
            crew.release()


def _plain(config: CacheConfig, device: str) -> dict[str, Any]:
    """Return the settings of stage one for workers elsewhere: paths from the root, plain values."""
    teacher, scale_file = Path(config.teacher), config.scale_file
    there = {
        "store": config.store.absolute(),
        "teacher": str(teacher.absolute()) if teacher.exists() else config.teacher,
        "scale_file": scale_file.absolute() if scale_file else None,
        "device": device,
        "workers": None,
        "scheduler": None,
    }
    return config.model_copy(update=there).model_dump(mode="json")
