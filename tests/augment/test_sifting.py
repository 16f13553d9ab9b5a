"""What is left out, on structures whose distances are known by hand."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from augment_cases import ethanol, system

from molkd.pipeline.augment.frame import Frame, moved
from molkd.pipeline.augment.sifting import (
    DUPLICATE,
    LARGE,
    NEAR,
    NOT_FINITE,
    SHORT,
    Met,
    largest_displacements,
    shortest_contact,
    within_forces,
    without_contacts,
)


@pytest.mark.parametrize(
    ("atoms", "expected"),
    [
        (Atoms("H2", [[0, 0, 0], [0, 0, 0.5]]), 0.5 / 0.62),  # radii of ase.data: H 0.31, C 0.76, O 0.66
        (Atoms("CO", [[0, 0, 0], [0, 0, 1.13]]), 1.13 / 1.42),
        (Atoms("H2", [[0, 0, 0], [0, 0, 0.74]]), np.inf),  # no nearer than the sum
        (Atoms("H"), np.inf),
        # the oxygen's image lies 0.5 A below the carbon
        (Atoms("CO", [[0, 0, 0], [0, 0, 5.5]], cell=[6, 6, 6], pbc=True), 0.5 / 1.42),
        (bulk("Cu", a=3.6), 3.6 / 2**0.5 / 2.64),  # an atom and its own image
    ],
)
def test_shortest_contact(atoms, expected):
    assert shortest_contact(system(atoms)) == pytest.approx(expected, rel=1e-6)


def test_contacts_and_forces_are_counted_by_reason():
    close = Frame(system(Atoms("H2", [[0, 0, 0], [0, 0, 0.3]])))
    fine = Frame(system(Atoms("H2", [[0, 0, 0], [0, 0, 0.5]])))
    dropped = Counter()
    assert without_contacts([close, fine], 0.6, dropped) == [fine]
    frames = [
        replace(fine, energy=e, largest_force=f) for e, f in ((0, 9), (0, 11), (np.nan, 1), (0, np.nan))
    ]
    assert within_forces(frames, 10.0, dropped) == frames[:1]
    assert dropped == {SHORT: 1, LARGE: 1, NOT_FINITE: 2}


def turned(atoms):
    atoms = atoms.copy()
    atoms.rotate(70, (1, 2, 3))
    atoms.translate((4, -2, 1))
    return atoms


def test_molecules_are_laid_over_each_other():
    parent = system(ethanol())
    far = ethanol()
    far.positions[8] += [0.3, 0, 0]
    mirrored = ethanol()
    mirrored.positions[:, 0] *= -1
    others = np.stack([turned(a).positions for a in (ethanol(), far, mirrored)])
    displaced = largest_displacements(parent, others)
    assert displaced[0] == pytest.approx(0, abs=1e-6)
    assert 0.15 < displaced[1] < 0.3  # laying over spreads the 0.3 A over all atoms
    assert displaced[2] > 0.3  # ethanol with noise has no mirror plane: no rotation does it


def test_along_periodic_axes_the_shortest_way_counts():
    cell = system(Atoms("CO", [[0.1, 0, 0], [0, 0, 2]], cell=[6, 6, 6], pbc=True))
    wrapped = cell.positions + np.array([[5.9, 0, 0], [0, 0.04, 0]])  # the carbon at 6.0 is at 0
    assert largest_displacements(cell, wrapped[None]) == pytest.approx([0.1])


def test_duplicates_and_near_duplicates():
    parent = Frame(system(ethanol()), energy=-10.0)
    nudged, pushed = (parent.system.positions.copy() for _ in range(2))
    nudged[8, 0] += 0.02
    pushed[8, 0] += 0.5
    near = Frame(moved(parent.system, nudged), energy=-10.0)
    steep = Frame(moved(parent.system, nudged + 0.001), energy=-9.9)  # 0.1 eV off: 11 meV an atom
    far = Frame(moved(parent.system, pushed), energy=-10.0)
    other = Frame(system(molecule("CH3OCH3")), energy=-10.0)  # the same atoms in another order
    dropped = Counter()
    kept = Met(0.05, 1e-3).new_ones([parent, parent, near, steep, far, other], dropped)
    assert kept == [parent, steep, far, other]
    assert dropped == {DUPLICATE: 1, NEAR: 1}
    assert Met(0.0, 1e-3).new_ones([parent, near], Counter()) == [parent, near]
