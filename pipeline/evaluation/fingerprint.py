"""Which systems and labels a model was measured on, as one hash that does not depend on their order."""

import hashlib

import numpy as np

from molkd.cache_schema.identity import dataset_fingerprint
from molkd.pipeline.data.sources import Source
from molkd.pipeline.data.system import System


class Fingerprint:
    """Grows system by system, 48 bytes each."""

    def __init__(self) -> None:
        self._ids: list[bytes] = []
        self._labels: list[bytes] = []

    def add(self, system: System) -> None:
        """Add a system with its labels; which atoms are fixed counts too, their forces are not measured."""
        identity = system.id
        digest = hashlib.sha256(identity)
        digest.update(np.float64(system.energy).tobytes())
        digest.update(np.ascontiguousarray(system.forces, dtype="<f8").tobytes())
        digest.update(np.ascontiguousarray(system.fixed, dtype=np.uint8).tobytes())
        self._ids.append(identity)
        self._labels.append(digest.digest())

    def hexdigest(self) -> str:
        """Return the hex sha256 of the dataset's fingerprint and all labels."""
        ids = np.frombuffer(b"".join(self._ids), dtype=np.uint8)
        digest = hashlib.sha256(dataset_fingerprint(ids).encode())
        digest.update(b"".join(sorted(self._labels)))
        return digest.hexdigest()


def fingerprint(source: Source) -> str:
    """Return the fingerprint of everything in a source; reads it once, computes nothing."""
    seen = Fingerprint()
    for index in range(len(source)):
        seen.add(source.read(index))
    return seen.hexdigest()
