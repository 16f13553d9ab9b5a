"""Fit a codebook to the first systems of a store, which are a random sample of it."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.codebook import LIMITS, MAX_PCA_CHANNELS, Codebook, is_vector, pca_bytes
from molkd.cache_schema.errors import CacheError
from molkd.cache_schema.fields import FieldSpec

_FLOOR = 0.003  # of the largest: a channel that hardly varies here may vary in systems still to come
_EQUAL_TO = 2.0**-12  # of the mean: rows that differ less are taken for equal
_USUAL_SIZE = 1.0  # of features, if all rows are zero
_TINY = float(np.finfo(np.float32).tiny) * 2**20
# What a code of so many bits leaves of a variance, if the largest component of a row is about 3 deviations.
_LEFT = {0: 1.0} | {bits: 3.0**2 / limit**2 / 12 for bits, limit in LIMITS.items()}
_STEPS = ((0, 4), (4, 8), (8, 16))
_MOST_ATOMS = 16_384
_FEWEST_ATOMS = 2048
ENOUGH_ATOMS = 2 * _FEWEST_ATOMS  # in a store: half of them to fit to, half to measure the error on
_SHARE = 16  # one in so many atoms is enough where that is more than the fewest


def calibration_systems(n_atoms: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return the systems that codebooks are fitted to, the first in stored order; `n_atoms` is (S,).

    A system is left to measure the error on, unless the others hold less than half of the atoms wanted.
    """
    ends = np.cumsum(n_atoms, dtype=np.int64)
    wanted = calibration_atoms(int(ends[-1]))
    n_systems = int(np.searchsorted(ends, wanted)) + 1
    if n_systems == len(ends) > 1 and 2 * ends[-2] >= wanted:
        n_systems -= 1
    return np.arange(n_systems)


def calibration_atoms(n_atoms: int) -> int:
    """Return how many atoms of a store codebooks are fitted to, about."""
    return min(max(n_atoms // _SHARE, _FEWEST_ATOMS), _MOST_ATOMS, n_atoms // 2)


def fit_codebook(values: NDArray[Any], spec: FieldSpec, encoding: str, n_systems: int) -> Codebook:
    """Return the codebook of a signal.

    Parameters
    ----------
    values : (n, *spec.shape), finite rows of the first systems
    encoding : "int8" or "pca:BYTES", bytes a row (of a vector signal: a direction)
    n_systems : whose rows these are

    Raises
    ------
    CacheError
        If the signal has no channels, too many for a rotation, or there are no rows.
    """
    if not spec.shape or spec.unit != "1" or spec.dtype != "float32":
        raise CacheError(f"signal {spec.name}: {encoding} is for features with channels; choose fp32")
    if not len(values):
        raise CacheError(f"signal {spec.name}: no finite row to fit {encoding} to; choose fp16")
    x = np.asarray(values, dtype=np.float64).reshape(-1, spec.shape[-1])
    mean = None if is_vector(spec) else x.mean(axis=0).astype(np.float32)
    if mean is not None:
        x = x - mean
    if encoding == "int8":
        deviation = np.sqrt((x**2).mean(axis=0))
        bits = np.full(len(deviation), 8, dtype=np.uint8)
        basis = None
    else:
        if spec.shape[-1] > MAX_PCA_CHANNELS:
            raise CacheError(
                f"signal {spec.name}: {spec.shape[-1]} channels, {encoding} rotates at most "
                f"{MAX_PCA_CHANNELS}; choose int8"
            )
        variance, vectors = np.linalg.eigh(x.T @ x / len(x))
        variance = np.maximum(variance[::-1], 0.0)
        bits = allocate_bits(variance, pca_bytes(encoding))
        deviation = np.sqrt(variance[: len(bits)])
        basis = np.ascontiguousarray(vectors[:, ::-1].T[: len(bits)], dtype=np.float32)
    limit = np.array([LIMITS[int(b)] for b in bits], dtype=np.float64)
    step = (_widths(deviation, mean) / limit).astype(np.float32)
    return Codebook(encoding, step, bits, mean, basis, n_systems)


def _widths(deviation: NDArray[np.float64], mean: NDArray[np.float32] | None) -> NDArray[np.float64]:
    """Return what the largest code of each component (K,) stands for at scale 1, from their deviations.

    Scales reach from 2^-14 to 65504. Rows that hardly vary do not tell how others will: then widths are
    equal, and leave room for 16 times the mean, while a unit of a code can be as small as float32's.
    """
    largest = float(deviation.max())
    size = 0.0 if mean is None else float(np.abs(mean).max())
    if largest <= _EQUAL_TO * size:
        return np.full(len(deviation), max(_EQUAL_TO * size, _TINY) if size else _USUAL_SIZE)
    return np.maximum(deviation, max(_FLOOR * largest, _TINY))


def allocate_bits(variance: NDArray[np.float64], n_bytes: int) -> NDArray[np.uint8]:
    """Return the bits (K,) of the components worth storing: what lowers the squared error most goes first.

    Parameters
    ----------
    variance : (C,) of the components, not increasing
    n_bytes : in all, at most
    """
    offers = [
        ((_LEFT[old] - _LEFT[new]) * float(one) / (new - old), -k, old, new)
        for k, one in enumerate(variance)
        for old, new in _STEPS
    ]
    bits = np.zeros(len(variance), dtype=np.int64)
    left = 8 * n_bytes
    for _, minus_k, old, new in sorted(offers, reverse=True):
        if new - old <= left and bits[-minus_k] == old:
            bits[-minus_k] = new
            left -= new - old
    if bits.sum() % 8:  # codes of 4 bits come in pairs; there is room, the bytes are whole
        k = int((bits > 0).sum())
        bits[k if k < len(bits) else int(np.flatnonzero(bits == 4)[0])] += 4
    return bits[bits > 0].astype(np.uint8)
