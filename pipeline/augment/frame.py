"""A structure that was made here: where it came from, and what the teacher says of it."""

from dataclasses import dataclass, field, replace

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms
from numpy.typing import NDArray

from molkd.pipeline.data.system import System

DIGITS = 8  # of positions in Angstrom, in memory as in the file of structures: both have the same ids
Facts = dict[str, str | int | float]


@dataclass(frozen=True, eq=False)
class Frame:
    """A new structure; its labels are NaN, whatever those of its parent were."""

    system: System
    made: Facts = field(default_factory=dict)  # parent (its id in hex), what was done, with what numbers
    energy: float = float("nan")  # eV, the teacher's; NaN: not looked at yet
    largest_force: float = float("nan")  # eV/A, the teacher's, over free atoms


def moved(system: System, positions: NDArray[np.float64]) -> System:
    """Return the system with other positions (N, 3) in Angstrom, and without labels."""
    return replace(
        system,
        positions=np.round(positions, DIGITS),
        energy=float("nan"),
        forces=np.full((system.n_atoms, 3), np.nan),
    )


def to_atoms(system: System) -> Atoms:
    """Return the structure for ASE, fixed atoms held."""
    return Atoms(
        system.atomic_numbers.astype(int),
        system.positions,
        cell=system.cell,
        pbc=system.pbc,
        tags=system.tags.astype(int),
        constraint=FixAtoms(mask=system.fixed) if system.fixed.any() else None,
    )


def from_atoms(atoms: Atoms, source: str) -> System:
    """Return ASE's structure without labels; atoms of a FixAtoms are fixed."""
    fixed = np.zeros(len(atoms), dtype=bool)
    for constraint in atoms.constraints:
        fixed[constraint.index] = True
    return System(
        atomic_numbers=atoms.numbers.astype(np.uint8),
        positions=np.round(atoms.positions, DIGITS),
        cell=np.asarray(atoms.cell[:], dtype=np.float64),
        pbc=atoms.pbc.copy(),
        energy=float("nan"),
        forces=np.full((len(atoms), 3), np.nan),
        tags=atoms.get_tags().astype(np.uint8),
        fixed=fixed,
        source=source,
    )
