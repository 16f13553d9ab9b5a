"""The System record: one structure with its labels, as read from any file."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.identity import system_id


@dataclass(frozen=True, slots=True, eq=False)
class System:
    """A structure in Angstrom with labels in eV and eV/A; a missing label is NaN, never zero."""

    atomic_numbers: NDArray[np.uint8]  # (N,)
    positions: NDArray[np.float64]  # (N, 3) A
    cell: NDArray[np.float64]  # (3, 3) A, rows are lattice vectors; zeros if not periodic
    pbc: NDArray[np.bool_]  # (3,)
    energy: float  # eV
    forces: NDArray[np.float64]  # (N, 3) eV/A
    tags: NDArray[np.uint8]  # (N,) OC20: 0 sub-surface, 1 surface, 2 adsorbate
    fixed: NDArray[np.bool_]  # (N,) atoms held during relaxation; left out of force losses and metrics
    source: str  # "train.extxyz#12": the file and the index in it, for messages
    origin: str = ""  # of a store's system: the file that it was ingested from
    info: Mapping[str, str] = field(default_factory=dict)  # words and numbers beside it; a store keeps none

    @property
    def n_atoms(self) -> int:
        """Number of atoms N."""
        return len(self.atomic_numbers)

    @property
    def file(self) -> str:
        """The file that the system comes from, also where a store lies between."""
        return self.origin or self.source.rpartition("#")[0] or self.source

    @property
    def id(self) -> bytes:
        """Content id, see `molkd.cache_schema.identity.system_id`."""
        return system_id(self.atomic_numbers, self.positions, self.cell, self.pbc)
