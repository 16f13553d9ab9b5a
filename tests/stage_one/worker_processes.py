"""The worker processes of a run in this process, and somebody who kills them while they work."""

import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def pids() -> list[int]:
    """Return the processes of Dask workers that this process started and that live."""
    return [p.pid for p in multiprocessing.active_children() if p.name.startswith("Dask Worker")]


def kill(pid: int) -> bool:
    """Kill as hard as the system does; return whether there was such a process."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def background(step: Callable[[], bool]) -> Iterator[None]:
    """Call `step` again and again beside the ``with`` block, until it returns True or the block ends."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set() and not step():
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def killed_at(counts: list[int], count: Callable[[], int], seed: int) -> Iterator[list[int]]:
    """Kill one of the workers by chance each time `count` reaches one of `counts`; yield the dead."""
    rng, dead, ahead = random.Random(seed), [], list(counts)

    def step() -> bool:
        if ahead and count() >= ahead[0]:
            time.sleep(rng.uniform(0, 0.05))
            alive = [pid for pid in pids() if pid not in dead]
            if alive and kill(victim := rng.choice(alive)):
                dead.append(victim)
                ahead.pop(0)
        return not ahead

    with background(step):
        yield dead


def writers(store: Path) -> set[int]:
    """Return the processes that have files of shards in work in a store."""
    return {int(path.name.split("-")[-2]) for path in store.glob("data.zarr/teachers/**/values/c/**/.tmp-*")}
