"""Sums over stored values, added up shard by shard, and the means they give."""

from dataclasses import dataclass, fields
from math import prod
from typing import Any

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

from molkd.cache_schema.fields import FieldSpec

_HELD_OUT = "held_out_"


@dataclass(frozen=True)
class Statistics:
    """Per channel, over all values (for vectors also over x, y, z); shape (C,), C = 1 for plain numbers."""

    count: int  # values per channel
    mean: NDArray[np.float64]
    variance: NDArray[np.float64]
    rms: NDArray[np.float64]


@dataclass
class Moments:
    """Sums over the decoded values of one array; bad systems and missing labels are left out.

    Errors are those of decoded minus given values. A held-out row is one that the encoding was not fitted to.
    """

    sum: NDArray[np.float64]  # (C,)
    sum_squares: NDArray[np.float64]  # (C,)
    count: int = 0  # values per channel
    max_abs: float = 0.0
    error_max_abs: float = 0.0
    error_sum_squares: float = 0.0
    held_out_count: int = 0  # values per channel; 0 for encodings that are not fitted
    held_out_error_max_abs: float = 0.0
    held_out_error_sum_squares: float = 0.0

    @classmethod
    def empty(cls, spec: FieldSpec) -> "Moments":
        """Return zeros for a field."""
        n = n_channels(spec)
        return cls(np.zeros(n), np.zeros(n))

    def add(self, given: NDArray[Any], decoded: NDArray[Any]) -> None:
        """Add rows (n, *shape), as given and as they read; rows that are not finite are left out."""
        if not len(given):
            return
        keep = np.isfinite(decoded).reshape(len(decoded), -1).all(axis=1)
        self.merge(measure(given, decoded, keep, None, len(self.sum)))

    def merge(self, other: "Moments") -> None:
        """Add the sums of other rows."""
        for one in fields(self):
            ours, theirs = getattr(self, one.name), getattr(other, one.name)
            setattr(self, one.name, max(ours, theirs) if one.name.endswith("max_abs") else ours + theirs)

    def statistics(self) -> Statistics:
        """Return mean, variance (of the population) and root mean square; NaN where nothing was counted."""
        n = self.count if self.count else np.nan
        mean, mean_square = self.sum / n, self.sum_squares / n
        return Statistics(self.count, mean, np.maximum(mean_square - mean**2, 0.0), np.sqrt(mean_square))

    @property
    def error_rms(self) -> float:
        """Root mean square of what the encoding changed; NaN where nothing was counted."""
        return _rms(self.error_sum_squares, self.count * len(self.sum))

    @property
    def held_out_error_rms(self) -> float:
        """The same over rows that the encoding was not fitted to."""
        return _rms(self.held_out_error_sum_squares, self.held_out_count * len(self.sum))

    def to_json(self) -> dict[str, Any]:
        """Plain values for a record."""
        named = {one.name: np.asarray(getattr(self, one.name)).tolist() for one in fields(self)}
        return {
            name: value
            for name, value in named.items()
            if self.held_out_count or not name.startswith(_HELD_OUT)
        }


def measure(given: Any, decoded: Any, keep: Any, held_out: Any | None, channels: int) -> Moments:
    """Return the sums over rows (n, *shape) of NumPy or torch arrays, as small arrays where these lie.

    Parameters
    ----------
    given, decoded : before and after encoding; the same array where nothing is lost
    keep : (n,) bool, rows that count
    held_out : (n,) bool, rows that the encoding was not fitted to; None if it is not fitted
    channels : length of the last axis, or 1
    """
    xp = array_namespace(decoded)
    n = decoded.shape[0]
    mask = xp.reshape(keep, (n, 1, 1))
    read = xp.reshape(decoded, (n, prod(decoded.shape[1:]) // channels, channels))
    zero = xp.zeros_like(read)
    read = xp.where(mask, read, zero)
    per_row = read.shape[1]
    wide = xp.astype(read, xp.float64)
    found: dict[str, Any] = {
        "count": xp.sum(xp.astype(keep, xp.int64)) * per_row,
        "sum": xp.sum(wide, axis=(0, 1)),
        "sum_squares": xp.sum(wide * wide, axis=(0, 1)),
    }
    if n:  # no rows have no largest value
        found["max_abs"] = xp.max(xp.abs(read))
    if n and decoded is not given:
        error = xp.where(mask, read - xp.reshape(given, read.shape), zero)
        found |= _errors(xp, error, "")
        if held_out is not None:
            count = xp.sum(xp.astype(keep & held_out, xp.int64)) * per_row
            kept = xp.where(xp.reshape(held_out, (n, 1, 1)), error, zero)
            found |= {f"{_HELD_OUT}count": count} | _errors(xp, kept, _HELD_OUT)
    return Moments(**found)


def _errors(xp: Any, error: Any, prefix: str) -> dict[str, Any]:
    wide = xp.astype(error, xp.float64)
    return {
        f"{prefix}error_max_abs": xp.max(xp.abs(error)),
        f"{prefix}error_sum_squares": xp.sum(wide * wide),
    }


def _rms(sum_squares: float, n: int) -> float:
    return float(np.sqrt(sum_squares / n)) if n else float("nan")


def n_channels(spec: FieldSpec) -> int:
    """Return the length of the last axis, the channels; a plain vector (3,) and a number have one."""
    if spec.shape == () or (spec.symmetry == "vector" and len(spec.shape) == 1):
        return 1
    return spec.shape[-1]
