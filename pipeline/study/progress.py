"""What is said while runs are made: one line for each that ended, with the time that is left."""

import logging
import time
from collections.abc import Iterable, Sequence
from typing import Any

from molkd.pipeline.study.estimate import Clock, duration
from molkd.pipeline.study.grid import Run
from molkd.pipeline.study.process import Outcome
from molkd.pipeline.study.state import standing_of

log = logging.getLogger(__name__)


class Progress:
    """One line a run that ended, with the time that is left."""

    def __init__(self, chosen: Sequence[Run], runs: Sequence[Run]) -> None:
        self._clock = Clock(standing_of(run) for run in chosen)
        self._left = {run.name: run for run in runs}
        self._done: list[Run] = []
        self._n = len(runs)
        self._began = time.monotonic()

    def note(self, run: Run, outcome: Outcome) -> None:
        """Take note of how a run ended."""
        self._left.pop(run.name, None)
        self._done.append(run)
        head = f"[{len(self._done)}/{self._n}] {run.name}"
        if outcome.failure is not None:
            log.warning("%s failed: %s%s", head, outcome.failure.reason, self._time_left())
        elif outcome.ended == "busy":
            log.info("%s: another process is at it", head)
        elif outcome.ended == "finished":
            summary = standing_of(run).summary or {}
            self._clock.add(run, float(summary.get("seconds") or outcome.seconds))
            log.info("%s: %s; %s%s", head, _errors(summary), duration(outcome.seconds), self._time_left())

    def _time_left(self) -> str:
        if not self._left:
            return ""
        ahead, behind = self._work(self._left.values()), self._work(self._done)
        seconds = (time.monotonic() - self._began) * ahead / behind
        return f"; about {duration(seconds)} left"

    def _work(self, runs: Iterable[Run]) -> float:
        """Return what runs take, in seconds, or counted where no time is known."""
        return sum(self._clock.seconds(run) or 1.0 for run in runs)


def _errors(summary: dict[str, Any]) -> str:
    """Return the errors on the first test set, else on the validation data."""
    data, values = next(iter((summary.get("test") or {}).items()), ("validation", summary.get("val") or {}))
    units = {"energy_mae_meV": ("energy", "meV"), "force_mae_meV_A": ("forces", "meV/A")}
    known = [f"{what} {values[k]:.4g} {u}" for k, (what, u) in units.items() if values.get(k) is not None]
    return f"{data} {', '.join(known)}" if known else "finished"
