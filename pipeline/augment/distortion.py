"""Displacements that a chemist would name: a bond is stretched, or a part of a molecule turned around it."""

from collections.abc import Sequence

import numpy as np
from ase import Atoms
from ase.neighborlist import build_neighbor_list, natural_cutoffs
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

from molkd.pipeline.augment.frame import to_atoms
from molkd.pipeline.data.system import System

_OFF_AXIS = 0.1  # A; a turn moves what is nearer to its axis by less than any noise

Bond = tuple[int, int, NDArray[np.bool_]]  # both atoms, and which atoms (N,) are on the second one's side


def open_bonds(system: System) -> list[Bond]:
    """Return the bonds that are in no ring.

    Atoms are bonded where ASE says so, within the sum of covalent radii. The side of fewer atoms moves; a
    bond is left out where that side holds a fixed atom and the other one does, too.
    """
    atoms = Atoms(system.atomic_numbers.astype(int), system.positions)  # open space: molecules only
    matrix = build_neighbor_list(atoms, natural_cutoffs(atoms, mult=1.15), self_interaction=False)
    connected = np.asarray(matrix.get_connectivity_matrix(sparse=False), dtype=bool)
    connected |= connected.T
    bonds = []
    for i, j in zip(*np.nonzero(np.triu(connected, 1)), strict=True):
        cut = connected.copy()
        cut[i, j] = cut[j, i] = False
        owner = connected_components(cut, directed=False)[1]
        if owner[i] == owner[j]:
            continue  # a ring
        sides = [(int(i), int(j), owner == owner[j]), (int(j), int(i), owner == owner[i])]
        sides.sort(key=lambda side: int(side[2].sum()))
        bonds += [side for side in sides if not system.fixed[side[2]].any()][:1]
    return bonds


def rotatable(system: System, bonds: Sequence[Bond]) -> list[Bond]:
    """Return the bonds around which a turn changes the shape: both sides have an atom beside the axis."""
    return [bond for bond in bonds if all(_is_beside(system, bond, side) for side in (bond[2], ~bond[2]))]


def _is_beside(system: System, bond: Bond, side: NDArray[np.bool_]) -> bool:
    first, second, _ = bond
    axis = system.positions[second] - system.positions[first]
    arms = system.positions[side] - system.positions[first]
    distances = np.linalg.norm(np.cross(arms, axis), axis=1) / np.linalg.norm(axis)
    return bool((distances > _OFF_AXIS).any())


def stretched(system: System, bond: Bond, by: float) -> NDArray[np.float64]:
    """Return positions (N, 3) with a bond longer by so many Angstrom, one side of it moved as a whole."""
    first, second, side = bond
    axis = system.positions[second] - system.positions[first]
    positions = system.positions.copy()
    positions[side] += by * axis / np.linalg.norm(axis)
    return positions


def turned(system: System, bond: Bond, degrees: float) -> NDArray[np.float64]:
    """Return positions (N, 3) with one side of a bond turned around it."""
    first, second, side = bond
    atoms = to_atoms(system)[side]
    axis = system.positions[second] - system.positions[first]
    atoms.rotate(degrees, axis, center=system.positions[second])
    positions = system.positions.copy()
    positions[side] = atoms.positions
    return positions
