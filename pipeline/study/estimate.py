"""How long runs take and what they leave on disk: from finished runs of the study, else from a few steps."""

import time
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from molkd.cache_schema.reader import Cache
from molkd.pipeline.config import TrainConfig
from molkd.pipeline.device import choose_device, synchronize
from molkd.pipeline.distill.recipe import automatic
from molkd.pipeline.distill.step import initial_state, train_step
from molkd.pipeline.distill.student import prepare
from molkd.pipeline.distill.train import run_length
from molkd.pipeline.study.grid import Run
from molkd.pipeline.study.state import Standing

_WARM_UP, _STEPS = 2, 5  # of a probe
_PROBE_SECONDS = 60.0  # all probes together
_FILES = 1 + 5  # the model; and last.pt: weights, average, three moments of AMSGrad
_BYTES = 4


class Clock:
    """Seconds of training that a run takes, learnt from those that finished."""

    def __init__(self, standings: Iterable[Standing]) -> None:
        self._seconds: dict[tuple[str, ...], list[float]] = {}
        for standing in standings:
            if standing.summary is not None and standing.summary.get("seconds"):
                self.add(standing.run, float(standing.summary["seconds"]))

    def add(self, run: Run, seconds: float) -> None:
        """Take note of how long a run took, or would take."""
        for key in _likeness(run):
            self._seconds.setdefault(key, []).append(seconds)

    def knows(self, run: Run) -> bool:
        """Whether a run of this kind, another seed of it perhaps, was timed."""
        return _likeness(run)[0] in self._seconds

    def seconds(self, run: Run) -> float | None:
        """Return the mean over the runs that are most alike; None if there are none at all."""
        alike = next((known for key in _likeness(run) if (known := self._seconds.get(key))), None)
        return fmean(alike) if alike else None

    def left(self, runs: Iterable[Run], side_by_side: int) -> float | None:
        """Return the seconds until all are made; None if nothing is known."""
        times = [self.seconds(run) for run in runs]
        if not times or any(t is None for t in times):
            return None
        known = [t for t in times if t is not None]
        return max(sum(known) / side_by_side, max(known))


def _likeness(run: Run) -> list[tuple[str, ...]]:
    """Return what a run shares with others, the most telling first: its line, its pair, the study."""
    pair, line = run.name.split("/")[:2]
    return [(pair, line), (pair,), ()]


def probe(clock: Clock, cache: Cache, runs: Sequence[Run]) -> None:
    """Time a few steps of the kinds of runs that the clock does not know, in a minute at most."""
    began = time.monotonic()
    for run in runs:
        if not clock.knows(run) and time.monotonic() - began < _PROBE_SECONDS:
            clock.add(run, _seconds_of(cache, run.config))


def _seconds_of(cache: Cache, config: TrainConfig) -> float:
    device = choose_device(config.device)
    if config.kd_auto:
        config = automatic(cache, config)
    setup = prepare(cache, config, device)
    state = initial_state(cache, setup, config, device)
    total, _ = run_length(state.loader.batches_per_epoch, config)
    samples = iter(state.loader)
    try:
        for step in range(_WARM_UP + _STEPS):
            if step == _WARM_UP:
                synchronize(device)
                began = time.perf_counter()
            train_step(state, next(samples), config, device, total)
        synchronize(device)
    finally:
        samples.close()  # type: ignore[attr-defined]  # a generator: this stops the prefetch thread
    return total * (time.perf_counter() - began) / _STEPS


def disk_bytes(runs: Iterable[Run], n_parameters: Callable[[TrainConfig], int]) -> int:
    """Return what runs leave on disk: models and checkpoints; logs and measurements are small beside."""
    return sum(_FILES * _BYTES * n_parameters(run.config) for run in runs)


def duration(seconds: float) -> str:
    """Write a time in words: 40 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
