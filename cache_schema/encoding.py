"""How values are narrowed on disk: name, stored dtype and formula of every encoding of format 1.

A plain encoding stores an array by itself, rounded. A fitted one (``int8``, ``pca:BYTES``; `codebook`) stores
small integers and a scale a row; steps, mean and rotation that give them a meaning lie beside.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.errors import CacheError
from molkd.cache_schema.fields import FieldSpec


@dataclass(frozen=True)
class Encoding:
    """One way to store an array by itself."""

    name: str
    dtype: str  # numpy dtype on disk, little-endian
    formula: str

    @property
    def is_float(self) -> bool:
        """Whether stored values may be NaN."""
        return np.dtype(self.dtype).kind == "f"


ENCODINGS = {
    e.name: e
    for e in (
        Encoding("fp64", "float64", "value = stored"),
        Encoding(
            "fp32", "float32", "value = stored; stored = value rounded to the nearest IEEE 754 binary32"
        ),
        Encoding(
            "fp16", "float16", "value = stored; stored = value rounded to the nearest IEEE 754 binary16"
        ),
        Encoding("uint8", "uint8", "value = stored"),
        Encoding("int8", "int8", "value = stored"),
        Encoding("int16", "int16", "value = stored"),
        Encoding("int32", "int32", "value = stored"),
        Encoding("bool", "bool", "value = stored; 0 is false, 1 is true"),
    )
}
_OF_DTYPE = {"float64": "fp64", "float32": "fp32", "float16": "fp16"} | {
    name: name for name in ("uint8", "bool", "int8", "int16", "int32")
}
FITTED = ("int8", "pca")
_FITTED_NAME = re.compile(r"int8|pca:[1-9][0-9]{0,4}")


def check_signal_encoding(name: object, where: str) -> str:
    """Return the encoding of a signal if this version knows it.

    Raises
    ------
    CacheError
        If it does not.
    """
    if isinstance(name, str) and (name in ("fp64", "fp32", "fp16") or _FITTED_NAME.fullmatch(name)):
        return name
    raise CacheError(
        f"{where}: encoding {name!r} is unknown, it was written by a newer version; "
        "update molkd (this one knows fp64, fp32, fp16, int8 and pca:BYTES)"
    )


def is_fitted(encoding: str) -> bool:
    """Say whether an encoding needs arrays beside the values."""
    return encoding.split(":")[0] in FITTED


def exact_encoding(spec: FieldSpec) -> str:
    """Return the encoding that keeps every bit of a field."""
    return _OF_DTYPE[spec.dtype]


def encoding_for(spec: FieldSpec, wanted: str) -> str:
    """Return the encoding a teacher's signal should take when features are stored as `wanted`.

    Energies (float64 fields) stay fp64 and forces fp32: they are labels, and cost little beside features.
    """
    if spec.dtype == "float64" or spec.unit != "1":
        return exact_encoding(spec)
    return wanted


def encode(values: NDArray[Any], encoding: Encoding, where: str) -> NDArray[Any]:
    """Return `values` as stored, contiguous. NaN passes through; a value that would become infinite does not.

    Raises
    ------
    CacheError
        If a finite value is too large for the encoding, or an integer does not fit.
    """
    if not encoding.is_float:
        stored = np.ascontiguousarray(values, dtype=encoding.dtype)
        if not np.array_equal(stored, values):
            raise CacheError(f"{where}: holds values that are not {encoding.dtype}")
        return stored
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(values, dtype=encoding.dtype)
    if not all_finite(stored) and np.isinf(stored).any():
        place = tuple(int(k) for k in np.argwhere(np.isinf(stored))[0])
        raise too_large(where, place, place[0], np.asarray(values)[place])
    return stored


def too_large(where: str, place: tuple[int, ...], row: int, value: float) -> CacheError:
    """Return the error of a value that became infinite when stored, or was so.

    Parameters
    ----------
    place : of the value in its array
    row : in the shard
    value : as given, if known; else infinite
    """
    channel = f", channel {place[-1]}" if len(place) > 1 else ""
    if np.isinf(value):
        return CacheError(f"{where}: infinite value in row {row}{channel}, or one too large to be stored")
    return CacheError(
        f"{where}: {value:.6g} in row {row}{channel} is too large for its encoding; run the command again "
        "with --encoding fp32, and with another --name if shards of this signal are finished"
    )


def scale_too_large(where: str, row: int, signal: str, encoding: str) -> CacheError:
    """Return the error of a row (of the shard) that is too large beside what its codebook was fitted to."""
    return CacheError(
        f"{where}: row {row} is too large for {encoding}, fitted to the first systems of the store; "
        f"run the command again with --encoding {signal}=fp32, and with another --name if shards of this "
        "signal are finished"
    )


def rounding_error(stored: NDArray[Any], encoding: Encoding) -> NDArray[np.float64]:
    """Return how far stored values can be from the given ones: half a unit in their last place."""
    numbers = np.finfo(encoding.dtype)
    bound = np.abs(stored.astype(np.float64)) * float(numbers.eps) / 2
    return np.maximum(bound, float(numbers.smallest_subnormal) / 2)


def all_finite(stored: NDArray[Any]) -> bool:
    """Say whether no value is NaN or infinite; half precision is tested by its bits, 20 times faster."""
    if stored.dtype == np.float16:
        return bool(((stored.view(np.uint16) & 0x7FFF) < 0x7C00).all())
    return bool(np.isfinite(stored).all())


def finite_rows(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Say of rows (n, ...), of which there may be none, in which every value is finite; (n,)."""
    finite: NDArray[np.bool_] = np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
    return finite


def decode(stored: NDArray[Any], spec: FieldSpec) -> NDArray[Any]:
    """Return stored values in the field's dtype in memory; no copy where they agree."""
    return stored.astype(spec.dtype, copy=False)
