"""Displacements that a chemist would name: a bond is stretched, or a part of a molecule turned around it."""

import numpy as np
from ase import Atoms
from ase.neighborlist import build_neighbor_list, natural_cutoffs
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

from molkd.pipeline.augment.frame import to_atoms
from molkd.pipeline.data.system import System


def open_bonds(system: System) -> list[tuple[int, int, NDArray[np.bool_]]]:
    """Return the bonds that are in no ring: both atoms, and which atoms (N,) are on the second one's side.

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


def stretched(system: System, bond: tuple[int, int, NDArray[np.bool_]], by: float) -> NDArray[np.float64]:
    """Return positions (N, 3) with a bond longer by so many Angstrom, one side of it moved as a whole."""
    first, second, side = bond
    axis = system.positions[second] - system.positions[first]
    positions = system.positions.copy()
    positions[side] += by * axis / np.linalg.norm(axis)
    return positions


def turned(system: System, bond: tuple[int, int, NDArray[np.bool_]], degrees: float) -> NDArray[np.float64]:
    """Return positions (N, 3) with one side of a bond turned around it."""
    first, second, side = bond
    atoms = to_atoms(system)[side]
    axis = system.positions[second] - system.positions[first]
    atoms.rotate(degrees, axis, center=system.positions[second])
    positions = system.positions.copy()
    positions[side] = atoms.positions
    return positions
