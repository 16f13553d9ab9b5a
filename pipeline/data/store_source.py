"""A store as a source of structures, so that every command that takes data also takes a store."""

from pathlib import Path

import numpy as np

from molkd.cache_schema.reader import Cache
from molkd.pipeline.data.system import System

_FIELDS = ("atomic_numbers", "positions", "forces", "tags", "fixed", "cell", "pbc", "energy")


class StoreSource:
    """The systems of a store in stored order; labels only, no teacher's signals."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.path = Path(cache.path)

    def __len__(self) -> int:
        return self.cache.n_systems

    def read(self, index: int) -> System:
        """Return one system; raises CacheError or IntegrityError as the cache does."""
        arrays = self.cache.read(np.array([index]), _FIELDS)
        return System(
            atomic_numbers=arrays["atomic_numbers"],
            positions=arrays["positions"].astype(np.float64),
            cell=arrays["cell"][0].astype(np.float64),
            pbc=arrays["pbc"][0].astype(bool),
            energy=float(arrays["energy"][0]),
            forces=arrays["forces"].astype(np.float64),
            tags=arrays["tags"],
            fixed=arrays["fixed"].astype(bool),
            source=f"{self.path}#{index}",
            origin=self.cache.source_names[int(self.cache.source[index])],
        )

    def close(self) -> None:
        """Let go of open files."""
        self.cache.close()
