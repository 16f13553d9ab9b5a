"""Mean and spread over seeds: what a report says instead of one run's number."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class SeedStat:
    """Mean and sample standard deviation (n - 1) of one quantity over n runs that differ in the seed only."""

    mean: float | None  # None: no run has the quantity
    spread: float | None  # None: fewer than two runs
    n: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "SeedStat":
        """Summarise the values that exist; a NaN makes the mean NaN, so that a diverged run is seen."""
        present = [float(v) for v in values if v is not None]
        if not present:
            return cls(None, None, 0)
        if not all(math.isfinite(v) for v in present):
            return cls(math.nan, math.nan if len(present) > 1 else None, len(present))
        spread = statistics.stdev(present) if len(present) > 1 else None
        return cls(statistics.fmean(present), spread, len(present))
