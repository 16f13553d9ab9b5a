"""Where new structures start from: systems of the user's data, drawn by a seed, checked before any work."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.identity import dataset_fingerprint
from molkd.pipeline.data.sources import open_source
from molkd.pipeline.data.store_source import StoreSource
from molkd.pipeline.data.system import System
from molkd.pipeline.data.validate import check_system
from molkd.pipeline.progress import Progress
from molkd.pipeline.scope import Scope


def generator(seed: int, *place: int) -> np.random.Generator:
    """Return the random numbers of one start: the same in any order, chunk and process."""
    return np.random.default_rng([seed, *place])


@dataclass(frozen=True, eq=False)
class Parents:
    """The systems that are started from, without labels, and what the new store keeps of their origin."""

    systems: Sequence[System]
    fingerprint: str  # of those drawn
    facts: dict[str, str | int]  # where they are from
    licence: str
    citation: str

    def of(self, start: int) -> System:
        """Return the parent of a start; after the last one the first comes again."""
        return self.systems[start % len(self.systems)]


def draw_parents(data: Path | str, n: int | None, seed: int, scopes: Sequence[Scope]) -> Parents:
    """Read `n` systems in an order drawn by the seed, or all of them if there are fewer or n is None.

    Raises
    ------
    DataError
        If the data cannot be read, or a system makes no sense.
    ModelError
        If one of them is out of a model's scope.
    """
    with closing(open_source(data)) as source:
        order = generator(seed).permutation(len(source))[:n]
        systems = []
        with Progress(len(order), "read", "system") as progress:
            for index in order:
                system = source.read(int(index))
                check_system(system)
                for scope in scopes:
                    scope.check(system)
                systems.append(system)
                progress.update()
        cache = source.cache if isinstance(source, StoreSource) else None
        about, fingerprint = (cache.dataset, cache.fingerprint) if cache else ({}, "")
        n_systems = len(source)
    ids = np.frombuffer(b"".join(s.id for s in systems), dtype=np.uint8).reshape(len(systems), -1)
    facts: dict[str, str | int] = {"data": str(data), "n_systems": n_systems, "n_drawn": len(systems)}
    if fingerprint:
        facts["store_fingerprint"] = fingerprint
    return Parents(
        systems,
        dataset_fingerprint(ids),
        facts,
        str(about.get("licence") or ""),
        str(about.get("citation") or ""),
    )


def mobile(system: System, *, move_fixed: bool) -> NDArray[np.bool_]:
    """Return which atoms (N,) may be displaced."""
    return np.ones(system.n_atoms, dtype=bool) if move_fixed else ~system.fixed
