"""A uniform random sample of bounded size from a stream of rows, the same however the stream is cut."""

import numpy as np
from numpy.typing import NDArray


class RowSample:
    """Keeps at most `size` rows: each row draws a random key, the smallest keys stay."""

    def __init__(self, size: int, *, n_columns: int, seed: int) -> None:
        self._size = size
        self._rng = np.random.default_rng(seed)
        self._n_seen = 0
        self._rows = np.empty((0, n_columns))
        self._order = np.empty(0, dtype=np.int64)  # position in the stream
        self._keys = np.empty(0)

    def add(self, rows: NDArray[np.floating]) -> None:
        """Offer rows (n, n_columns)."""
        order = np.arange(self._n_seen, self._n_seen + len(rows))
        self._n_seen += len(rows)
        keys = np.concatenate([self._keys, self._rng.random(len(rows))])
        everything = np.concatenate([self._rows, rows])
        order = np.concatenate([self._order, order])
        keep = np.argpartition(keys, self._size)[: self._size] if len(keys) > self._size else slice(None)
        self._keys, self._rows, self._order = keys[keep], everything[keep], order[keep]

    def rows(self) -> NDArray[np.float64]:
        """Return the kept rows in the order of the stream."""
        return self._rows[np.argsort(self._order)]
