"""Runs side by side on this machine."""

import logging
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

from molkd.pipeline.cluster import visible_devices
from molkd.pipeline.device import available_cores
from molkd.pipeline.interrupts import interruptible
from molkd.pipeline.study.grid import Run
from molkd.pipeline.study.process import Outcome, make_job, perform

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.2
Note = Callable[[Run, Outcome], None]
STOPPING = "stopping at checkpoints; a second Ctrl-C kills what is in work"


def share_out(device: str, jobs: int | None, threads: int | None) -> tuple[int, int | None, list[str]]:
    """Return how many runs go side by side, the threads of each (None: torch's choice), and the GPUs.

    A GPU takes one run; on a CPU a run has one thread unless said otherwise, and there are as many as cores:
    for small students this is the fastest, and results do not depend on the machine.

    Raises
    ------
    ConfigError
        If there is no such device.
    """
    devices = visible_devices(device)
    if devices:
        return jobs or len(devices), threads, devices
    threads = threads or 1
    return jobs or max(1, available_cores() // threads), threads, []


def run_here(
    runs: Sequence[Run], note: Note, *, jobs: int, threads: int | None, devices: Sequence[str]
) -> bool:
    """Make the runs, and tell `note` how each ended; return whether they were interrupted.

    Ctrl-C lets those in work stop at a checkpoint, a second one kills them.
    """
    free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for k in range(jobs):
        free.put(devices[k % len(devices)] if devices else None)

    with interruptible() as stops, ThreadPoolExecutor(jobs, "kd-run") as pool:

        def make(run: Run) -> Outcome:
            config = run.config.model_copy(update={"device": "cuda" if devices else run.config.device})
            job, device = make_job(config, threads), free.get()
            try:
                return perform(job | {"device": device}, stops)
            finally:
                free.put(device)

        waiting = {pool.submit(make, run): run for run in runs}
        told = 0
        while waiting:
            done, _ = wait(waiting, _LOOK_SECONDS, FIRST_COMPLETED)
            if stops() > told:
                told = stops()
                log.warning(STOPPING)
            for future in done:
                note(waiting.pop(future), future.result())
        return stops() > 0
