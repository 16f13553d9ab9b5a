"""How errors are spread: quantiles, the largest, and what share of all error the worst hundredth carries."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from molkd.pipeline.units import MILLI

QUANTILES = (0.5, 0.9, 0.95, 0.99)
WORST = 0.01  # the share of errors whose part in the sum is told
_BINS_PER_OCTAVE = 512  # an error within a bin is known to 1 part in 740
_SMALLEST = -30  # log2 of 1e-9 eV or eV/A; what is smaller counts as 0
_LARGEST = 20  # log2 of 1e6; what is larger counts with the last bin
_N_BINS = (_LARGEST - _SMALLEST) * _BINS_PER_OCTAVE


@dataclass(frozen=True)
class Tail:
    """Of n absolute errors in eV, or eV/A."""

    n: int
    quantiles: tuple[float, ...]  # at QUANTILES, to 0.14 %: half of the errors are below the first, and so on
    largest: float
    worst_share: float  # part of the sum of errors that the largest hundredth (WORST) of them makes up

    def to_report(self, unit: str) -> dict[str, float]:
        """Return p50_meV and so on, for a unit such as meV, and the share in percent."""
        values = {f"p{100 * q:g}_{unit}": MILLI * v for q, v in zip(QUANTILES, self.quantiles, strict=True)}
        share = {f"share_of_worst_{100 * WORST:g}_percent": 100 * self.worst_share}
        return {**values, f"max_{unit}": MILLI * self.largest, **share}


class ErrorHistogram:
    """Counts and sums of errors in bins of equal ratio: any number of errors in 400 kB.

    Sums are exact, and so is the largest error. A quantile is the mean of its bin, so right to 0.14 %, and
    does not depend on the order of the errors or on how they were divided among workers.
    """

    def __init__(self) -> None:
        self._counts = np.zeros(_N_BINS + 1, np.int64)  # the first bin is for zeros
        self._sums = np.zeros(_N_BINS + 1)
        self._largest = 0.0

    def add(self, errors: NDArray[np.floating]) -> None:
        """Add absolute errors (n,), all finite."""
        if not len(errors):
            return
        values = np.asarray(errors, np.float64)
        with np.errstate(divide="ignore"):
            place = np.floor((np.log2(values) - _SMALLEST) * _BINS_PER_OCTAVE) + 1
        bins = np.clip(place, 0, _N_BINS).astype(np.int64)
        self._counts += np.bincount(bins, minlength=_N_BINS + 1)
        self._sums += np.bincount(bins, values, _N_BINS + 1)
        self._largest = max(self._largest, float(values.max()))

    def merge(self, other: Self) -> None:
        """Add the errors of another worker or rank."""
        self._counts += other._counts
        self._sums += other._sums
        self._largest = max(self._largest, other._largest)

    def result(self) -> Tail | None:
        """Return quantiles and shares; None if there was no error to count.

        The quantile q of n errors is the one in place ceil(q n) from below. The worst hundredth are n/100 of
        them, of which one may count in part.
        """
        n = int(self._counts.sum())
        if n == 0:
            return None
        used = np.flatnonzero(self._counts)
        counts, means = self._counts[used], self._sums[used] / self._counts[used]
        below = np.cumsum(counts)
        # 0.95 x 20 is a hair above 19 in binary: without the rounding the next error would be taken
        places = [int(np.ceil(round(q * n, 6))) for q in QUANTILES]
        quantiles = tuple(float(means[np.searchsorted(below, place)]) for place in places)
        # from above: whole bins as long as they fit into the hundredth, then a part of the next
        taken = np.clip(WORST * n - (n - below), 0, counts)
        total = float(self._sums.sum())
        share = float((taken * means).sum()) / total if total else 0.0
        return Tail(n, tuple(min(q, self._largest) for q in quantiles), self._largest, share)
