"""The systems and signals that an export takes, array by array and piece by piece."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.collecting import gather
from molkd.cache_schema.fields import ATOM_FIELDS, N_EDGES
from molkd.cache_schema.groups import ATOMS
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.regroup import Arrays, Origins, pieces, read_rows
from molkd.cache_schema.signal import Signal

ABOUT = {
    "energy": "label, eV, NaN if unknown",
    "cell": "Angstrom, rows are lattice vectors",
    "forces": "label, eV/Angstrom, NaN if unknown",
    "positions": "Angstrom",
    "tags": "0 below the surface, 1 surface, 2 adsorbate",
    "fixed": "held during relaxation",
    "id": "content hash of the system",
    "atom_ptr": "system i has the atoms atom_ptr[i] to atom_ptr[i + 1] - 1",
}
SYSTEM_COLUMNS = ("id", "n_atoms", "energy", "cell", "pbc", "source", "source_row")


@dataclass(frozen=True, eq=False)
class Choice:
    """Part of a store."""

    cache: Cache
    origins: Origins
    groups: tuple[str, ...]  # of the signals

    @cached_property
    def n_atoms(self) -> NDArray[np.int64]:
        """Of each system, (S,)."""
        return gather(self.origins, "n_atoms").astype(np.int64)

    @cached_property
    def systems(self) -> dict[str, NDArray[Any]]:
        """Columns with a row a system."""
        columns = {name: gather(self.origins, name) for name in SYSTEM_COLUMNS}
        return columns | {"atom_ptr": np.concatenate([[0], np.cumsum(self.n_atoms)])}

    def signal(self, group: str) -> Signal:
        """Return the signal of a group."""
        return self.cache.state(group).group.signal

    def names(self, group: str, *, decode: bool) -> list[str]:
        """Return the arrays of a group."""
        if group == ATOMS:
            return list(ATOM_FIELDS)
        layouts = self.cache.state(group).group.layouts
        return [name for name in layouts if name != "scale" or not decode]

    def pieces(self, group: str) -> Iterator[NDArray[np.int64]]:
        """Cut the systems for reading a group."""
        yield from pieces(np.arange(len(self.n_atoms)), self.n_atoms, self.origins, (group,))

    def read(self, group: str, part: NDArray[np.int64], *, decode: bool) -> Arrays:
        """Return the arrays of a group for a piece of the systems."""
        return read_rows(self.origins, (group,), part, decode=decode and group != ATOMS)

    def rows(
        self, group: str, name: str, *, decode: bool, on_systems: Callable[[int], object] | None = None
    ) -> Iterator[NDArray[Any]]:
        """Yield one array of a group piece by piece."""
        for part in self.pieces(group):
            yield self.read(group, part, decode=decode)[name]
            if on_systems is not None:
                on_systems(len(part))

    def n_rows(self, group: str, name: str) -> int:
        """Return the rows of an array in all; on edges they have to be counted."""
        axis = "atom" if group == ATOMS else self.cache.state(group).group.layouts[name].spec.axis
        if axis == "edge":
            return sum(int(n.sum()) for n in self.rows(group, N_EDGES.name, decode=False))
        return len(self.n_atoms) if axis == "system" else int(self.n_atoms.sum())
