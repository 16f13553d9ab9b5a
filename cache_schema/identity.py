"""Who a system is: a content hash that survives files, formats and row numbers."""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

ID_BYTES = 16
_PREFIX = b"molkd-system-1\0"
_LABELS_PREFIX = b"molkd-labels-1\0"


def system_id(atomic_numbers: ArrayLike, positions: ArrayLike, cell: ArrayLike, pbc: ArrayLike) -> bytes:
    r"""Return the 16-byte id of a system from what makes it physically that system.

    The first 16 bytes of sha256 over: the prefix ``molkd-system-1\0``, the number of atoms (uint32),
    atomic numbers (uint8), positions in Angstrom (float32), cell rows in Angstrom (float32; all zero if no
    axis is periodic) and pbc (3 x uint8), everything little-endian and in C order. Negative zero counts
    as zero.

    Parameters
    ----------
    atomic_numbers : (N,)
    positions : (N, 3), Angstrom
    cell : (3, 3), Angstrom, rows are lattice vectors
    pbc : (3,)
    """
    numbers = np.ascontiguousarray(atomic_numbers, dtype=np.uint8)
    periodic = np.ascontiguousarray(pbc, dtype=np.uint8)
    box = np.asarray(cell, dtype="<f4").reshape(3, 3) if periodic.any() else np.zeros((3, 3), "<f4")
    digest = hashlib.sha256(_PREFIX)
    digest.update(np.uint32(len(numbers)).astype("<u4").tobytes())
    digest.update(numbers.tobytes())
    digest.update(_canonical(positions))
    digest.update(_canonical(box))
    digest.update(periodic.tobytes())
    return digest.digest()[:ID_BYTES]


def dataset_fingerprint(ids: NDArray[np.uint8]) -> str:
    """Return the hex sha256 of the sorted system ids (S, 16): equal for equal sets in any order."""
    rows = np.ascontiguousarray(ids, dtype=np.uint8).reshape(-1, ID_BYTES)
    return hashlib.sha256(rows[_sorting(rows)].data).hexdigest()


def _sorting(ids: NDArray[np.uint8]) -> NDArray[np.intp]:
    """Return the order (S,) in which ids (S, 16) are sorted byte strings."""
    high, low = ids.view(">u8").astype(np.uint64).T
    order = np.argsort(high)  # several times faster than sorting by both halves
    is_settled = (high[order[1:]] != high[order[:-1]]).all()
    return order if is_settled else np.lexsort((low, high))


def labels_digest(energy: float, forces: ArrayLike, tags: ArrayLike, fixed: ArrayLike) -> bytes:
    r"""Return the 32-byte hash of everything a store keeps of a system beside its identity.

    sha256 over: the prefix ``molkd-labels-1\0``, the energy (float64), forces (float32), tags and fixed
    (uint8), little-endian and in C order. Every NaN counts as the same one, negative zero as zero.

    Parameters
    ----------
    energy : eV, NaN if unknown
    forces : (N, 3), eV/Angstrom, NaN if unknown
    tags : (N,)
    fixed : (N,)
    """
    digest = hashlib.sha256(_LABELS_PREFIX)
    for values, dtype in ((energy, "<f8"), (forces, "<f4")):
        known = np.array(values, dtype=dtype) + np.array(0, dtype)  # a copy, and -0.0 + 0.0 = +0.0
        digest.update(np.where(np.isnan(known), np.array(np.nan, dtype), known).tobytes())
    digest.update(np.asarray(tags, dtype=np.uint8).tobytes())
    digest.update(np.asarray(fixed, dtype=np.uint8).tobytes())
    return digest.digest()


def labels_fingerprint(ids: NDArray[np.uint8], digests: Sequence[bytes]) -> str:
    """Return the hex sha256 of (id, labels digest) of all systems (S, 16), sorted by id."""
    rows = np.ascontiguousarray(ids, dtype=np.uint8).reshape(-1, ID_BYTES)
    pairs = sorted(row.tobytes() + digest for row, digest in zip(rows, digests, strict=True))
    return hashlib.sha256(b"".join(pairs)).hexdigest()


def _canonical(values: ArrayLike) -> bytes:
    return (np.asarray(values, dtype="<f4") + np.float32(0.0)).tobytes()  # -0.0 + 0.0 = +0.0
