"""Sums over stored values, added up shard by shard, and the means they give."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.encoding import decode
from molkd.cache_schema.fields import FieldSpec

_SLICE_VALUES = 1 << 15  # a float64 copy of so many values stays in the processor's cache


@dataclass(frozen=True)
class Statistics:
    """Per channel, over all values (for vectors also over x, y, z); shape (C,), C = 1 for plain numbers."""

    count: int  # values per channel
    mean: NDArray[np.float64]
    variance: NDArray[np.float64]
    rms: NDArray[np.float64]


@dataclass
class Moments:
    """Sums over the decoded values of one array; bad systems and missing labels are left out."""

    sum: NDArray[np.float64]  # (C,)
    sum_squares: NDArray[np.float64]  # (C,)
    count: int = 0  # values per channel
    max_abs: float = 0.0
    error_max_abs: float = 0.0  # of decoded minus given values
    error_sum_squares: float = 0.0

    @classmethod
    def empty(cls, spec: FieldSpec) -> "Moments":
        """Return zeros for a field."""
        n = n_channels(spec)
        return cls(np.zeros(n), np.zeros(n))

    def add(self, values: NDArray[Any], stored: NDArray[Any], spec: FieldSpec) -> None:
        """Add rows, `values` as given and as `stored`, both (n, *spec.shape)."""
        channels = n_channels(spec)
        step = max(1, _SLICE_VALUES // int(np.prod(spec.shape, dtype=np.int64)))
        for begin in range(0, len(values), step):
            given, read = values[begin : begin + step], decode(stored[begin : begin + step], spec)
            narrow = read.reshape(len(read), -1)
            wide = narrow.astype(np.float64)
            total = wide.sum(axis=0)
            if not np.isfinite(total).all():
                known = np.isfinite(wide.sum(axis=1))
                if not known.any():
                    continue
                given, narrow, wide = given[known], narrow[known], wide[known]
                total = wide.sum(axis=0)
            self.count += wide.size // channels
            self.sum += total.reshape(-1, channels).sum(axis=0)
            self.sum_squares += np.einsum("nc,nc->c", wide, wide).reshape(-1, channels).sum(axis=0)
            self.max_abs = max(self.max_abs, float(narrow.max()), -float(narrow.min()))
            if stored is not values:
                error = (narrow - given.reshape(len(given), -1)).reshape(-1)
                self.error_sum_squares += float(error @ error)
                self.error_max_abs = max(self.error_max_abs, float(error.max()), -float(error.min()))

    def merge(self, other: "Moments") -> None:
        """Add the sums of another shard."""
        self.sum = self.sum + other.sum
        self.sum_squares = self.sum_squares + other.sum_squares
        self.count += other.count
        self.max_abs = max(self.max_abs, other.max_abs)
        self.error_max_abs = max(self.error_max_abs, other.error_max_abs)
        self.error_sum_squares += other.error_sum_squares

    def statistics(self) -> Statistics:
        """Return mean, variance (of the population) and root mean square; NaN where nothing was counted."""
        n = self.count if self.count else np.nan
        mean, mean_square = self.sum / n, self.sum_squares / n
        return Statistics(self.count, mean, np.maximum(mean_square - mean**2, 0.0), np.sqrt(mean_square))

    @property
    def error_rms(self) -> float:
        """Root mean square of what the encoding changed; NaN where nothing was counted."""
        n = self.count * len(self.sum)
        return float(np.sqrt(self.error_sum_squares / n)) if n else float("nan")

    def to_json(self) -> dict[str, Any]:
        """Plain values for a record."""
        return {
            "count": self.count,
            "sum": self.sum.tolist(),
            "sum_squares": self.sum_squares.tolist(),
            "max_abs": self.max_abs,
            "error_max_abs": self.error_max_abs,
            "error_sum_squares": self.error_sum_squares,
        }


def n_channels(spec: FieldSpec) -> int:
    """Return the length of the last axis, the channels; a plain vector (3,) and a number have one."""
    if spec.shape == () or (spec.symmetry == "vector" and len(spec.shape) == 1):
        return 1
    return spec.shape[-1]
