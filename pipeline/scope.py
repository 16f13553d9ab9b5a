"""Which systems a model or teacher was made for: its elements, and periodic ones only if it sees cells."""

from collections.abc import Set
from dataclasses import dataclass

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray

from molkd.cache_schema.reader import Cache
from molkd.pipeline.data.system import System
from molkd.pipeline.errors import ModelError
from molkd.pipeline.graphs.neighbors import NeighborRule

_SYSTEMS_PER_READ = 10_000


@dataclass(frozen=True)
class Scope:
    """What a model was made for; `check` and `check_store` refuse everything else, on the host."""

    model: str  # its name, for messages
    elements: Set[int]  # atomic numbers
    rule: NeighborRule

    def check(self, system: System) -> None:
        """Refuse a system with another element, or a periodic one if the model ignores cells.

        Raises
        ------
        ModelError
            With the system, what is wrong with it and what to do.
        """
        self._check_pbc(system.pbc, system.source)
        self._check_elements(system.atomic_numbers, system.source)

    def check_store(self, cache: Cache, systems: NDArray[np.integer] | None = None) -> None:
        """Refuse a store that holds a system out of scope; only the atomic numbers are read.

        Parameters
        ----------
        systems : stored indices to look at, (S,); None takes all

        Raises
        ------
        ModelError
            With the first such system, named by the file it came from.
        """
        chosen = np.arange(cache.n_systems) if systems is None else np.sort(systems)
        periodic = chosen[np.asarray(cache.pbc)[chosen].any(axis=1)]
        if len(periodic):
            self._check_pbc(cache.pbc[periodic[0]], source_of(cache, int(periodic[0])))
        for begin in range(0, len(chosen), _SYSTEMS_PER_READ):
            part = chosen[begin : begin + _SYSTEMS_PER_READ]
            numbers = cache.read(part, ("atomic_numbers",))["atomic_numbers"]  # (N,)
            unknown = ~np.isin(numbers, list(self.elements))
            if unknown.any():
                ends = np.cumsum(cache.system_n_atoms[part])
                first = int(part[np.searchsorted(ends, np.argmax(unknown), side="right")])
                self._check_elements(numbers[unknown], source_of(cache, first))

    def _check_pbc(self, pbc: NDArray[np.bool_], source: str) -> None:
        if not self.rule.use_pbc and np.any(pbc):
            raise ModelError(
                f"{source}: is periodic, and {self.model} ignores cells (use_pbc is false); "
                "leave such systems out, or take a model made for periodic systems"
            )

    def _check_elements(self, atomic_numbers: NDArray[np.integer], source: str) -> None:
        unknown = [int(z) for z in np.unique(atomic_numbers) if int(z) not in self.elements]
        if unknown:
            raise ModelError(
                f"{source}: holds {chemical_symbols[unknown[0]]} (atomic number {unknown[0]}), which "
                f"{self.model} was not made for; leave such systems out, or take another model"
            )


def source_of(cache: Cache, index: int) -> str:
    """Return where a stored system came from, as a person would look for it."""
    return f"{cache.source_names[int(cache.source[index])]}#{int(cache.source_row[index])}"
