"""Training and validation by content: a system keeps its side when others are added, renamed or reordered."""

import hashlib

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.identity import ID_BYTES
from molkd.pipeline.errors import ConfigError

_UNIFORM_BYTES = 8


def split_mask(ids: NDArray[np.uint8], fraction: float, salt: str = "val") -> NDArray[np.bool_]:
    """Return which systems belong to a part that holds about `fraction` of them.

    A system is chosen if the 8-byte blake2b(salt, a zero byte, id), as a number in [0, 1), lies below
    `fraction`. A larger fraction of the same salt contains the smaller one; different salts are independent.

    Parameters
    ----------
    ids : (S, 16), content ids
    fraction : from 0 (none) to 1 (all)
    salt : names the part; change it to draw another one

    Returns
    -------
    mask : (S,)

    Raises
    ------
    ConfigError
        If `fraction` is not between 0 and 1.
    """
    if not 0 <= fraction <= 1:
        raise ConfigError(f"a split of fraction {fraction} was asked for; give a number from 0 to 1.")
    rows = np.ascontiguousarray(ids, dtype=np.uint8).reshape(-1, ID_BYTES)
    start = hashlib.blake2b(salt.encode() + b"\0", digest_size=_UNIFORM_BYTES)
    digests = bytearray()
    for row in rows:
        digest = start.copy()
        digest.update(row.tobytes())
        digests += digest.digest()
    uniform = np.frombuffer(digests, dtype="<u8") / 2.0 ** (8 * _UNIFORM_BYTES)
    # The largest hashes round to 1.0 in float64; fraction 1 means all of them.
    return uniform < fraction if fraction < 1 else np.ones(len(rows), dtype=bool)
