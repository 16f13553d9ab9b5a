"""Progress of long work: a bar on a terminal, one line a minute in the log where there is none."""

import logging
import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 60.0


class Progress:
    """Context manager with `update`; counts `unit`s of work towards `total`.

    Parameters
    ----------
    total : how much there is to do
    label : what is being done, one word
    unit : of the count, for the rate
    initial : how much was done before
    """

    def __init__(self, total: int, label: str, unit: str, initial: int = 0) -> None:
        self.total = total
        self.label = label
        self.unit = unit
        self.done = initial
        self._first, self._began = initial, time.monotonic()
        self._last_line = self._began
        self._bar = tqdm(total=total, initial=initial, desc=label, unit=unit, disable=not sys.stderr.isatty())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def update(self, n: int = 1) -> None:
        """Count `n` more."""
        self.done += n
        self._bar.update(n)
        now = time.monotonic()
        if self._bar.disable and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            rate = (self.done - self._first) / (now - self._began)
            log.info(
                "%s: %d of %d %ss (%.0f %%), %.3g a second, about %.0f s left",
                self.label,
                self.done,
                self.total,
                self.unit,
                100 * self.done / max(self.total, 1),
                rate,
                (self.total - self.done) / rate if rate else float("inf"),
            )

    def advance_to(self, done: int, total: int | None = None) -> None:
        """Count up to `done` in all, of `total` if that is only known now."""
        if total is not None:
            self.total = self._bar.total = total
        self.update(done - self.done)
