"""Fitted encodings: small integers and a scale a row; steps, mean and rotation are fitted to a signal once.

    int8        value = mean + scale * step * code               a code a channel, in 8 bits
    pca:BYTES   value = mean + scale * (step * code) @ basis     a code a component, in 16, 8 or 4 bits

The arithmetic is that of the array it is given, NumPy or torch, on whichever device that lies.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

from molkd.cache_schema.errors import IntegrityError
from molkd.cache_schema.fields import FieldSpec

LIMITS = {16: 32767, 8: 127, 4: 7}  # largest code by its bits; the smallest is its negative
MAX_PCA_CHANNELS = 8192
_ORTHONORMAL_TO = 1e-2  # of a combination with numbers of about 1; rotations in single precision reach 1e-5
_MIN_SCALE = 2.0**-14  # the smallest normal number of half precision
_ROUND_UP = 1 + 2.0**-10  # half precision keeps 11 bits: the rounded scale is not below the exact one


@dataclass(frozen=True, eq=False)
class Codebook:
    """What turns codes into values; C channels of the signal, K codes a row (K = C for int8).

    Attributes
    ----------
    encoding : "int8" or "pca:BYTES"
    step : (K,) float32, value of one unit of a code at scale 1
    bits : (K,) uint8, not increasing
    mean : (C,) float32; None for vectors, which have none, so that they stay equivariant
    basis : (K, C) float32, orthonormal rows; None for int8
    n_systems : the first so many systems in stored order were fitted
    """

    encoding: str
    step: NDArray[np.float32]
    bits: NDArray[np.uint8]
    mean: NDArray[np.float32] | None
    basis: NDArray[np.float32] | None
    n_systems: int

    @property
    def n_channels(self) -> int:
        """C."""
        return len(self.step) if self.basis is None else self.basis.shape[1]

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of the codes of one row, or of one direction of a vector."""
        return int(self.bits.sum(dtype=np.int64)) // 8

    @property
    def stored_dtype(self) -> str:
        """Of the codes: packed ones are bytes."""
        return "int8" if self.basis is None else "uint8"

    @cached_property
    def limit(self) -> NDArray[np.float32]:
        """Largest code of each component, (K,)."""
        return np.array([LIMITS[b] for b in self.bits.tolist()], dtype=np.float32)

    def n_of(self, bits: int) -> int:
        """Return how many codes have so many bits."""
        return int((self.bits == bits).sum())

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return what is stored beside the codes, by name."""
        named: dict[str, NDArray[Any] | None] = {"step": self.step, "mean": self.mean}
        if self.basis is not None:
            named |= {"bits": self.bits, "basis": self.basis}
        return {name: array for name, array in named.items() if array is not None}

    @property
    def formula(self) -> str:
        """How values follow from what is stored."""
        product = "step * values" if self.basis is None else "(step * codes(values, bits)) @ basis"
        return f"value = {'' if self.mean is None else 'mean + '}scale * {product}"


def make_codebook(
    encoding: str, arrays: dict[str, NDArray[Any]], n_systems: int, spec: FieldSpec, where: str
) -> Codebook:
    """Check what a store says and return it.

    Raises
    ------
    IntegrityError
        If arrays are missing, have other shapes or types, or hold values that no fit gives.
    """
    is_pca, n_channels = encoding != "int8", spec.shape[-1] if spec.shape else 0
    step, bits = arrays.get("step", np.empty(0, np.float32)), arrays.get("bits")
    if not is_pca:
        bits = np.full(n_channels, 8, np.uint8)
    problems = []
    wanted = {"step"} | ({"bits", "basis"} if is_pca else set()) | (set() if is_vector(spec) else {"mean"})
    if set(arrays) != wanted or bits is None:
        problems.append(f"arrays {', '.join(sorted(arrays))}, expected {', '.join(sorted(wanted))}")
    else:
        k = len(bits)
        shapes = {"step": (k,), "bits": (k,), "mean": (n_channels,), "basis": (k, n_channels)}
        types = {"bits": "uint8"}
        problems += [
            f"{name} is {a.dtype} {a.shape}"
            for name, a in arrays.items()
            if a.shape != shapes[name] or str(a.dtype) != types.get(name, "float32")
        ]
        if not set(bits.tolist()) <= set(LIMITS) or (np.diff(bits.astype(int)) > 0).any() or not k:
            problems.append("bits are no decreasing list of 16, 8 and 4")
        elif is_pca and (bits.sum(dtype=np.int64) % 8 or bits.sum(dtype=np.int64) > 8 * pca_bytes(encoding)):
            problems.append("bits do not add up to the bytes of the encoding")
        if not all(np.isfinite(a).all() for a in arrays.values()) or not (step > 0).all():
            problems.append("values are not finite, or a step is not positive")
        elif "basis" in arrays and not problems and not _is_orthonormal(arrays["basis"]):
            problems.append("the rows of the basis are not orthonormal")
    if problems or bits is None:
        raise IntegrityError(
            f"{where}: damaged codebook ({'; '.join(problems)}); restore it from a copy of the store"
        )
    return Codebook(encoding, step, bits, arrays.get("mean"), arrays.get("basis"), n_systems)


def _is_orthonormal(basis: NDArray[np.float32]) -> bool:
    """Say whether the rows of a basis (K, C) are; a random combination shows it in K C steps, not K K C."""
    mix = np.random.default_rng(0).standard_normal((len(basis), 4), dtype=np.float32)
    return np.allclose(basis @ (basis.T @ mix), mix, rtol=0, atol=_ORTHONORMAL_TO)


def pca_bytes(encoding: str) -> int:
    """Return the bytes a row, or a direction, that ``pca:BYTES`` names."""
    return int(encoding.split(":")[1])


def is_vector(spec: FieldSpec) -> bool:
    """Say whether a mean would break the signal's symmetry."""
    return spec.symmetry == "vector"


def encode_rows(values: Any, book: Codebook) -> tuple[Any, Any]:
    """Return codes (n, ..., C) int8 or (n, ..., B) uint8 and the scale (n,) float16 of rows (n, ..., C).

    A row that is not finite gets the scale NaN, one too large for half precision the scale infinity.
    """
    xp = array_namespace(values)
    own = _on(xp, values, book)
    x = xp.astype(values, xp.float32)
    known = xp.all(xp.reshape(xp.isfinite(x), (x.shape[0], prod(x.shape[1:]))), axis=1)
    if own.mean is not None:
        x = x - own.mean
    x = xp.where(xp.reshape(known, (-1, *[1] * (len(x.shape) - 1))), x, xp.zeros_like(x))
    if own.basis is not None:
        x = x @ own.basis.T
    flat = xp.reshape(x, (x.shape[0], prod(x.shape[1:-1]), x.shape[-1]))
    ratio = xp.abs(flat) / (own.step * own.limit)
    largest = xp.max(xp.max(ratio, axis=2), axis=1)
    with np.errstate(over="ignore"):  # to infinity, as said above
        scale = largest * _ROUND_UP
        # Not xp.clip, which may wait for a GPU.
        scale = xp.where(scale < _MIN_SCALE, xp.full_like(scale, _MIN_SCALE), scale)
        scale = xp.astype(scale, xp.float16)
    codes = xp.round(flat / (own.step * xp.astype(scale, xp.float32)[:, None, None]))
    codes = xp.where(codes > own.limit, own.limit, xp.where(codes < -own.limit, -own.limit, codes))
    scale = xp.where(known, scale, xp.full_like(scale, xp.nan))
    return _pack(xp, xp.reshape(codes, x.shape), book), scale


def decode_rows(codes: Any, scale: Any, book: Codebook, *, rotate: bool = True) -> Any:
    """Return the values (n, ..., C) float32 of codes and scale (n,).

    Parameters
    ----------
    rotate : False gives the components (n, ..., K) in the fitted basis, without the mean
    """
    xp = array_namespace(codes)
    own = _on(xp, codes, book)
    factor = xp.reshape(xp.astype(scale, xp.float32), (-1, *[1] * (len(codes.shape) - 1)))
    z = _unpack(xp, codes, book) * (own.step * factor)
    if not rotate:
        return z
    if own.basis is not None:
        z = z @ own.basis
    return z if own.mean is None else z + own.mean


def _pack(xp: Any, codes: Any, book: Codebook) -> Any:
    """Return codes (..., K) as stored: those of 16 bits (little-endian), then of 8, then of 4."""
    if book.basis is None:
        return xp.astype(codes, xp.int8)
    n16, n8 = book.n_of(16), book.n_of(8)
    codes = xp.astype(codes, xp.int32)
    wide, narrow, nibbles = codes[..., :n16], codes[..., n16 : n16 + n8], codes[..., n16 + n8 :]
    halves = xp.stack([wide & 255, (wide >> 8) & 255], axis=-1)
    parts = [
        xp.reshape(halves, (*wide.shape[:-1], 2 * n16)),
        narrow & 255,
        (nibbles[..., ::2] & 15) | ((nibbles[..., 1::2] & 15) << 4),
    ]
    return xp.astype(xp.concat(parts, axis=-1), xp.uint8)


def _unpack(xp: Any, stored: Any, book: Codebook) -> Any:
    """Return the codes (..., K) as float32."""
    if book.basis is None:
        return xp.astype(stored, xp.float32)
    n16, n8 = book.n_of(16), book.n_of(8)
    data = xp.astype(stored, xp.int32)
    wide, narrow, pairs = data[..., : 2 * n16], data[..., 2 * n16 : 2 * n16 + n8], data[..., 2 * n16 + n8 :]
    nibbles = xp.reshape(
        xp.stack([pairs & 15, pairs >> 4], axis=-1), (*pairs.shape[:-1], 2 * pairs.shape[-1])
    )
    parts = [(wide[..., ::2] | (wide[..., 1::2] << 8), 16), (narrow, 8), (nibbles, 4)]
    signed = [part - ((part >> (bits - 1)) << bits) for part, bits in parts]  # two's complement
    return xp.astype(xp.concat(signed, axis=-1), xp.float32)


@dataclass(frozen=True, eq=False)
class _Own:
    """A codebook's arrays in the namespace and on the device of the values."""

    step: Any
    limit: Any
    mean: Any
    basis: Any


def _on(xp: Any, values: Any, book: Codebook) -> _Own:
    if isinstance(values, np.ndarray):
        return _Own(book.step, book.limit, book.mean, book.basis)
    place = book.__dict__.setdefault("_places", {})
    if values.device not in place:
        arrays = (book.step, book.limit, book.mean, book.basis)
        place[values.device] = _Own(
            *(None if a is None else xp.asarray(a, device=values.device) for a in arrays)
        )
    own: _Own = place[values.device]
    return own
