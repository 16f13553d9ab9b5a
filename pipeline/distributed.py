"""Stage one on Dask: workers that each hold a teacher do the shards, and this process hands them out.

Features never travel: a task is one shard, which the worker reads, computes, writes and commits. Workers may
die, be slow or do a shard twice: each task begins with a look at the commit log.
"""

import asyncio
import json
import logging
import os
import signal
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from distributed import Client, Future, Nanny, Scheduler, SpecCluster, as_completed, wait
from distributed.comm.core import connect
from distributed.scheduler import KilledWorker
from distributed.security import Security

from molkd.cache_schema.files import host_name
from molkd.cache_schema.writer import Store
from molkd.pipeline import errors, worker
from molkd.pipeline.config import CacheConfig
from molkd.pipeline.device import choose_device
from molkd.pipeline.errors import CacheError, ConfigError, MolkdError, TeacherError
from molkd.pipeline.progress import Progress
from molkd.pipeline.shard_output import Written
from molkd.pipeline.shard_work import Outcome, missing_shards, sweep_shards

log = logging.getLogger(__name__)

_DEATHS = 8  # of workers over the same shard, until it is called the shard's fault
_RETRIES = 2  # of a task that fails for a reason that is not the user's
_IN_FLIGHT = 32  # shards handed out at least, so that a cluster that grows sees that there is work
_GRACE_SECONDS = 20.0  # for a worker to drop a shard after Ctrl-C
_CONNECT_SECONDS = 30.0
_LOOPBACK = "127.0.0.1"


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
        if not shards:
            log.info("%s: all of %s is there, nothing to do", config.store, ", ".join(groups))
        n_systems = {shard: len(store.systems_of_shard(shard)) for shard in shards}
        n_computed, written = 0, Written()
        with Progress(sum(n_systems.values()), "teacher", "system") as progress:
            for shard, receipt in crew.do_shards(shards):
                n_computed += receipt["systems"]
                written.n_bytes += receipt["bytes"]
                written.bad_systems.update(receipt["bad"])
                progress.update(n_systems[shard])
        crew.look()
        if crew.lost_some:
            sweep_shards(store, groups, shards)
        return Outcome(store, crew.job["name"], groups, n_computed, written)


class _Crew:
    """Workers behind a scheduler, and the job they do."""

    def __init__(self, client: Client, job: worker.Job, where: str) -> None:
        self._client, self.job, self._where = client, job, where
        self._workers: set[str] = set()  # their addresses when last asked
        self.lost_some = False  # whether workers have gone that were there

    def look(self) -> int:
        """Return how many workers there are, and take note of those that have gone."""
        now = set(self._client.nthreads())
        if lost := len(self._workers - now):
            log.info("%d workers have gone; others do their shards again", lost)
            self.lost_some = True
        self._workers = now
        return len(now)

    def ask(self, task: str) -> Any:
        """Have one worker do a task, and return what it says."""
        future = self._submit(task)
        try:
            return self._receipt(future.result())
        except BaseException:
            self._halt(drop=True)
            raise

    def do_shards(self, shards: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield each shard with its receipt, in the order in which they are finished."""
        todo, flying, deaths = iter(shards), dict[object, tuple[int, Future[Any]]](), Counter[int]()
        finished = as_completed(loop=self._client.loop, with_results=True, raise_errors=False)
        failure: Exception | None = None

        def send(batch: Iterator[int] | list[int]) -> None:
            for shard in batch:
                future = self._submit("do shard", shard)
                flying[future.key] = shard, future
                finished.add(future)

        send(islice(todo, self._room(0)))
        try:
            for future, result in finished:
                shard, _ = flying.pop(future.key)
                try:
                    receipt = self._outcome(future, result, shard)
                except KilledWorker as killed:
                    deaths[shard] += killed.allowed_failures + 1
                    if deaths[shard] < _DEATHS:
                        send([shard])
                        continue
                    failure = failure or self._deadly(shard)
                except (MolkdError, OSError, RuntimeError) as error:
                    failure = failure or error
                else:
                    yield shard, receipt
                if failure is None:
                    send(islice(todo, self._room(len(flying))))
                else:
                    self._halt(drop=False)
        except BaseException:  # Ctrl-C above all: shards in work are dropped, committed ones stay
            self._halt(drop=True)
            with suppress(TimeoutError):
                wait([future for _, future in flying.values()], timeout=_GRACE_SECONDS)
            raise
        if failure is not None:
            raise failure

    def _submit(self, task: str, *arguments: Any) -> Future[Any]:
        key = "-".join(["kd", task.replace(" ", "-"), *map(str, arguments), uuid.uuid4().hex])
        return self._client.submit(
            worker.perform, task, self.job, *arguments, key=key, pure=False, retries=_RETRIES
        )

    def _room(self, n_flying: int) -> int:
        return max(0, max(_IN_FLIGHT, 2 * self.look()) - n_flying)

    def _outcome(self, future: Future[Any], result: Any, shard: int) -> dict[str, Any]:
        if future.status == "finished":
            receipt: dict[str, Any] = self._receipt(result)
            return receipt
        if future.status == "error":
            raise future.exception()
        raise CacheError(
            f"{self.job['config']['store']}: the scheduler {self._where} gave up shard {shard} "
            f"({future.status}), or is gone; run the same command again, finished shards are kept"
        )

    def _receipt(self, answer: Mapping[str, Any]) -> Any:
        """Return the receipt, or raise the error that a worker met."""
        if "receipt" in answer:
            return answer["receipt"]
        there = f"worker on {answer['host']}: " if answer["host"] != host_name() else ""
        raise getattr(errors, answer["error"], CacheError)(there + answer["message"])

    def _deadly(self, shard: int) -> TeacherError:
        return TeacherError(
            f"{self.job['config']['store']}: {_DEATHS} workers died over shard {shard}; if memory ran out, "
            "lower --batch-atoms and --batch-edges or take fewer workers, else see the workers' logs; "
            "finished shards are kept"
        )

    def _halt(self, *, drop: bool) -> None:
        with suppress(OSError, TimeoutError):  # no scheduler any more
            self._client.run(worker.halt, self.job["run"], drop=drop, on_error="ignore")


@contextmanager
def _crew(config: CacheConfig) -> Iterator[_Crew]:
    """Connect to a scheduler, or start one with workers on this machine; leaving ends what was started."""
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        if config.workers is not None:
            cluster, threads = stack.enter_context(_local_cluster(config, config.workers))
            client = stack.enter_context(Client(cluster, set_as_default=False))
            where = "on this machine"
            device = "cpu" if threads is not None else "cuda"
        else:
            where, threads, device = str(config.scheduler), None, config.device
            client = stack.enter_context(_connect(where))
        job = {"run": uuid.uuid4().hex, "config": _plain(config, device), "threads": threads}
        crew = _Crew(client, job, where)
        yield crew
        with suppress(OSError, TimeoutError):
            client.run(worker.release, job["run"], on_error="ignore")


@contextmanager
def _connect(where: str) -> Iterator[Client]:
    """Connect to the scheduler at an address, or to the one that wrote a scheduler file."""
    try:
        address = json.loads(Path(where).read_text())["address"] if Path(where).is_file() else where
        asyncio.run(_knock(address))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--scheduler {where}: no Dask scheduler answers there ({error}); give the address that the "
            "scheduler prints, as in tcp://host:8786, or its scheduler file"
        ) from error
    with Client(address, set_as_default=False) as client:
        if not client.nthreads():
            log.info("%s: no worker has come yet, waiting", where)
        if client.submit(find_spec, "molkd", pure=False).result() is None:
            raise ConfigError(
                f"--scheduler {where}: its workers cannot import molkd; start them where it is installed"
            )
        yield client


async def _knock(address: str) -> None:
    """Find out whether anybody answers: a client that found nobody could not be closed properly."""
    comm = await connect(address, timeout=_CONNECT_SECONDS, **Security().get_connection_args("client"))
    await comm.close()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what Dask says about its own affairs out of the log."""
    logger = logging.getLogger("distributed")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _local_cluster(config: CacheConfig, n_workers: int) -> Iterator[tuple[SpecCluster, int | None]]:
    """Start workers on this machine, one device each; with them come torch's threads of each, on the CPU."""
    devices = _devices(config.device)
    options = {
        "host": _LOOPBACK,
        "nthreads": 1,
        "memory_limit": 0,  # pinned memory and the page cache look like a leak to Dask's watchman
        "silence_logs": logging.ERROR,
    }
    workers = {}
    for k in range(n_workers):
        env = {"CUDA_VISIBLE_DEVICES": devices[k % len(devices)]} if devices else {}
        workers[k] = {"cls": Nanny, "options": {**options, "env": env}}
    scheduler = {
        "cls": Scheduler,
        "options": {
            "host": _LOOPBACK,
            "port": 0,
            "dashboard": False,
            "dashboard_address": f"{_LOOPBACK}:0",
            "allowed_failures": _DEATHS - 1,
        },
    }
    threads = None if devices else max(1, torch.get_num_threads() // n_workers)
    share = f"device {', '.join(devices)}" if devices else f"{threads} threads each"
    log.info("starting %d workers, %s", n_workers, share)
    with _without_interrupts():
        cluster = SpecCluster(workers, scheduler, silence_logs=logging.ERROR, name="molkd")
    with cluster:
        yield cluster, threads


def _devices(name: str) -> list[str]:
    """Return the ids of the GPUs to hand out, as CUDA_VISIBLE_DEVICES names them; none for the CPU."""
    device = choose_device(name)
    if device.type != "cuda":
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    ids = visible.split(",") if visible else [str(k) for k in range(torch.cuda.device_count())]
    return ids if device.index is None else [ids[device.index]]


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Start threads and processes that a Ctrl-C on the terminal does not reach: this process stops them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
