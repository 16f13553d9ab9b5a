"""crc32c of bytes, and of bytes put together from parts whose crc32c is known."""

from functools import lru_cache
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

_POLYNOMIAL = 0x82F63B78  # Castagnoli, reflected


def crc32c(data: NDArray[Any] | bytes, value: int = 0) -> int:
    """Continue the crc32c `value` over contiguous data."""
    if isinstance(data, np.ndarray):
        data = data.reshape(-1).view(np.uint8)
    return int(google_crc32c.extend(value, data))


def crc_hex(value: int) -> str:
    """Return a crc32c as the records write it: 8 lower-case hex digits."""
    return f"{value:08x}"


def crc32c_joined(first: int, second: int, n_bytes: int) -> int:
    """Return the crc32c of bytes whose parts have the crc32c `first` and `second`, the latter `n_bytes` long.

    A crc is linear over GF(2): the zeros that stand for the second part move the bits of the first by a
    matrix that depends on their number alone.
    """
    return _apply(_zeros(n_bytes), first) ^ second


@lru_cache(maxsize=64)
def _zeros(n_bytes: int) -> tuple[int, ...]:
    """Return what n zero bytes make of each bit of a crc: the columns of a 32 x 32 matrix."""
    power = (_POLYNOMIAL, *(1 << k for k in range(31)))  # of one zero bit
    for _ in range(3):
        power = _square(power)
    total = tuple(1 << k for k in range(32))
    while n_bytes:
        if n_bytes & 1:
            total = tuple(_apply(power, column) for column in total)
        power = _square(power)
        n_bytes >>= 1
    return total


def _square(matrix: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(_apply(matrix, column) for column in matrix)


def _apply(matrix: tuple[int, ...], bits: int) -> int:
    result = 0
    for column in matrix:
        if bits & 1:
            result ^= column
        bits >>= 1
    return result
