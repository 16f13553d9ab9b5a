"""Dask schedulers: one with workers on this machine, or one that is there already."""

import asyncio
import json
import logging
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from multiprocessing import resource_tracker
from pathlib import Path

import torch
from distributed import Client, Nanny, Scheduler, SpecCluster
from distributed.comm.core import connect
from distributed.security import Security

from molkd.pipeline.device import choose_device
from molkd.pipeline.errors import ConfigError
from molkd.pipeline.quiet import quiet

log = logging.getLogger(__name__)

_CONNECT_SECONDS = 30.0
_LOOPBACK = "127.0.0.1"


@contextmanager
def connect_to(where: str) -> Iterator[Client]:
    """Connect to the scheduler at an address, or to the one that wrote a scheduler file."""
    try:
        address = json.loads(Path(where).read_text())["address"] if Path(where).is_file() else where
        with ThreadPoolExecutor(1) as pool:  # in a notebook this thread has an event loop already
            pool.submit(asyncio.run, _knock(address)).result()
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


def quiet_dask() -> AbstractContextManager[None]:
    """Keep what Dask says about its own affairs out of the log."""
    return quiet("distributed", logging.CRITICAL)


@contextmanager
def local_cluster(device: str, n_workers: int, deaths: int) -> Iterator[tuple[SpecCluster, int | None]]:
    """Start workers on this machine, one thread each, on GPUs in turn.

    Parameters
    ----------
    device : as `--device`
    deaths : of workers over the same task, until it is given up

    Yields
    ------
    The cluster, and how many threads of torch each worker is to have; None on GPUs.

    Raises
    ------
    ConfigError
        If the device does not exist, or processes cannot be started.
    """
    devices = visible_devices(device)
    options = {
        "host": _LOOPBACK,
        "nthreads": 1,
        "memory_limit": 0,  # pinned memory and the page cache look like a leak to Dask's watchman
        "silence_logs": logging.CRITICAL,  # a connection that ends when all is done is no error
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
            "allowed_failures": deaths - 1,
        },
    }
    threads = None if devices else max(1, torch.get_num_threads() // n_workers)
    share = f"device {', '.join(devices)}" if devices else f"{threads} threads each"
    log.info("starting %d workers, %s", n_workers, share)
    try:
        with _without_interrupts():
            cluster = SpecCluster(workers, scheduler, silence_logs=logging.CRITICAL, name="molkd")
    except RuntimeError as error:
        raise ConfigError(
            f"--workers {n_workers}: a worker process ended while it started ({error}); if memory ran out, "
            'take fewer; a script that calls this needs its if __name__ == "__main__"'
        ) from error
    with cluster:
        yield cluster, threads


def visible_devices(name: str) -> list[str]:
    """Return the ids of the GPUs to hand out, as CUDA_VISIBLE_DEVICES names them; none for the CPU."""
    device = choose_device(name)
    if device.type != "cuda":
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    ids = visible.split(",") if visible else [str(k) for k in range(torch.cuda.device_count())]
    return ids if device.index is None else [ids[device.index]]


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Start threads and processes that a Ctrl-C on the terminal does not reach: this process stops them.

    Each inherits the mask of the thread that starts it.
    """
    resource_tracker.ensure_running()  # whoever starts it later takes the signal off the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
