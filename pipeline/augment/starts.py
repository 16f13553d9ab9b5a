"""Where new structures start from: systems of the user's data, drawn by a seed, checked before any work."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molkd.pipeline.data.lineage import roots_by_id
from molkd.pipeline.data.sources import Source, open_source
from molkd.pipeline.data.store_source import StoreSource
from molkd.pipeline.data.system import System
from molkd.pipeline.data.validate import check_system
from molkd.pipeline.progress import Progress


def generator(seed: int, *place: int) -> np.random.Generator:
    """Return the random numbers of one start: the same in any order, chunk and process."""
    return np.random.default_rng([seed, *place])


@dataclass(frozen=True, eq=False)
class Parents:
    """The systems that are started from, read when they are asked for, and what is kept of their origin."""

    source: Source
    order: NDArray[np.int64]  # (S,) which systems of the source, in the order drawn
    fingerprint: str  # of those drawn as the data order them, with tags and fixed atoms
    facts: dict[str, str | int]  # where they are from
    licence: str
    citation: str
    roots: dict[str, str] | None  # of systems that were made themselves, see `parents_facts`

    def __len__(self) -> int:
        """Return how many systems were drawn."""
        return len(self.order)

    def of(self, start: int) -> System:
        """Return the parent of a start; after the last one the first comes again."""
        return self.source.read(int(self.order[start % len(self.order)]))


@contextmanager
def draw_parents(
    data: Path | str, n: int | None, seed: int, checks: Sequence[Callable[[System], None]]
) -> Iterator[Parents]:
    """Draw `n` systems by the seed, or take all of them if there are fewer or n is None, and check each.

    Parameters
    ----------
    checks : called with every system drawn; they refuse it by raising

    Raises
    ------
    DataError
        If the data cannot be read, or a system makes no sense.
    """
    with closing(open_source(data)) as source:
        order = generator(seed).permutation(len(source))[:n]
        digests = np.empty((len(order), 32), dtype=np.uint8)
        with Progress(len(order), "check", "system") as progress:
            for k, index in enumerate(order):
                system = source.read(int(index))
                for check in (check_system, *checks):
                    check(system)
                about = system.id + system.tags.tobytes() + system.fixed.tobytes()
                digests[k] = np.frombuffer(hashlib.sha256(about).digest(), dtype=np.uint8)
                progress.update()
        facts: dict[str, str | int] = {"data": str(data), "n_systems": len(source), "n_drawn": len(order)}
        dataset: dict[str, Any] = {}
        roots: dict[str, str] | None = {}
        if isinstance(source, StoreSource):
            dataset, facts["store_fingerprint"] = source.cache.dataset, source.cache.fingerprint
            roots = roots_by_id(source.cache)
        licence, citation = (str(dataset.get(key) or "") for key in ("licence", "citation"))
        # In the order of the data: in another one start k would begin elsewhere.
        fingerprint = hashlib.sha256(digests[np.argsort(order)].tobytes()).hexdigest()
        yield Parents(source, order, fingerprint, facts, licence, citation, roots)


def mobile(system: System, *, move_fixed: bool) -> NDArray[np.bool_]:
    """Return which atoms (N,) may be displaced."""
    return np.ones(system.n_atoms, dtype=bool) if move_fixed else ~system.fixed
