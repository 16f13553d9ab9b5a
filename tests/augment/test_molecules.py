"""Bonds, and what is done with them; dynamics at a temperature."""

import numpy as np
import pytest
from ase.build import molecule
from augment_cases import Springs, ethanol, looking, system

from molkd.pipeline.augment.distortion import open_bonds, rotatable, stretched, turned
from molkd.pipeline.augment.dynamics import simulate
from molkd.pipeline.augment.molecules import require_molecule
from molkd.pipeline.errors import DataError, ModelError
from molkd.pipeline.export.calculator import TeacherCalculator


def bond_between(given, first, second):
    return next(b for b in open_bonds(given) if {b[0], b[1]} == {first, second})


def test_bonds_in_rings_are_left_out():
    assert len(open_bonds(system(molecule("CH3CH2OH")))) == 8
    assert len(open_bonds(system(molecule("C6H6")))) == 6  # to the hydrogens
    assert open_bonds(system(molecule("H"))) == []


def test_fixed_atoms_are_on_the_side_that_stays():
    for first, second, side in open_bonds(system(ethanol(), fixed=(2, 3))):
        assert not side[[2, 3]].any()
        assert side[second]
        assert not side[first]


def test_a_stretched_bond_is_longer_and_its_sides_are_rigid():
    given = system(molecule("CH3CH2OH"))
    bond = bond_between(given, 0, 1)  # the two carbons
    before, after = given.positions, stretched(given, bond, 0.2)
    assert np.linalg.norm(after[0] - after[1]) == pytest.approx(np.linalg.norm(before[0] - before[1]) + 0.2)
    for side in (bond[2], ~bond[2]):
        np.testing.assert_allclose(distances(after[side]), distances(before[side]), atol=1e-9)


def test_a_turn_keeps_bonds_and_changes_the_dihedral():
    given = system(molecule("CH3CH2OH"))
    first, second, side = bond = bond_between(given, 0, 1)
    after = turned(given, bond, 60)
    np.testing.assert_allclose(distances(after[side]), distances(given.positions[side]), atol=1e-9)
    np.testing.assert_allclose(after[[first, second]], given.positions[[first, second]], atol=1e-9)
    atoms = molecule("CH3CH2OH")
    ends = [next(k for k in np.flatnonzero(mask) if k not in (0, 1)) for mask in (~side, side)]
    before = atoms.get_dihedral(ends[0], first, second, ends[1])
    atoms.positions = after
    change = atoms.get_dihedral(ends[0], first, second, ends[1]) - before
    assert (change % 360) == pytest.approx(60) or (change % 360) == pytest.approx(300)


@pytest.mark.parametrize(
    ("name", "bonds"),
    [
        ("CH3CH2OH", {("C", "C"), ("C", "O")}),
        ("H2O2", {("O", "O")}),
        ("H2O", set()),
        ("CH4", set()),
        ("C6H6", set()),
    ],
)
def test_only_turns_that_change_the_shape(name, bonds):
    """Around a bond to a hydrogen a turn moves nothing; else distances between the sides change."""
    given, symbols = system(molecule(name)), molecule(name).symbols
    found = rotatable(given, open_bonds(given))
    assert {tuple(sorted((symbols[i], symbols[j]))) for i, j, _ in found} == bonds
    for bond in found:
        change = distances(turned(given, bond, 40)) - distances(given.positions)
        assert np.abs(change[bond[2]][:, ~bond[2]]).max() > 0.1


def distances(positions):
    return np.linalg.norm(positions[:, None] - positions[None], axis=-1)


def test_dynamics_reach_the_temperature():
    """Springs at 300 K hold kT/2 for each of 3N - 3 degrees of freedom: the center rests."""
    start = system(ethanol())
    path = simulate(
        Springs(start.positions, k=2.0), start, temperature=300.0, steps=1000, timestep=2.0, frames=100,
        max_force=1e3, random=np.random.default_rng(0),
    )  # fmt: skip
    energies = np.array([f.energy for f in path.frames[10:]])
    assert energies.mean() == pytest.approx(
        24 * 0.5 * 8.617e-5 * 300, rel=0.2
    )  # 24 degrees of freedom, some 20 times
    assert [f.made["step"] for f in path.frames[:2]] == [10, 20]
    assert path.frames[-1].made["step"] == 1000


def test_dynamics_hold_fixed_atoms_and_stop_at_large_forces():
    start = system(ethanol(), fixed=(0,))
    given = {"temperature": 300.0, "steps": 20, "timestep": 1.0, "frames": 2}
    path = simulate(Springs(start.positions), start, **given, max_force=1e3, random=np.random.default_rng(0))
    assert all((f.system.positions[0] == start.positions[0]).all() for f in path.frames)
    path = simulate(Springs(start.positions), start, **given, max_force=1e-3, random=np.random.default_rng(0))
    assert path.diverged
    assert len(path.frames) == 1


def test_periodic_systems_are_refused():
    cell = ethanol()
    cell.set_cell([9, 9, 9])
    cell.pbc = True
    with pytest.raises(DataError, match=r"is periodic.*kd augment rattle"):
        require_molecule(system(cell))


def test_calculator_gives_what_the_teacher_says(files):
    look = looking(files / "smooth.safetensors")
    atoms = ethanol()
    atoms.calc = TeacherCalculator(look.teacher)
    (seen,) = look.look([system(atoms)])
    assert atoms.get_potential_energy() == pytest.approx(seen.energy, rel=1e-12)
    np.testing.assert_allclose(atoms.get_forces(), seen.forces, rtol=1e-9)
    step = 1e-4
    atoms.positions[3, 1] += step
    above = atoms.get_potential_energy()
    atoms.positions[3, 1] -= 2 * step
    slope = (above - atoms.get_potential_energy()) / (2 * step)
    assert slope == pytest.approx(-seen.forces[3, 1], abs=1e-5)
    atoms.numbers[0] = 26
    with pytest.raises(ModelError, match="Fe"):
        atoms.get_potential_energy()


def test_a_molecule_that_explodes_between_two_frames_has_diverged():
    """Forces are large at one moment only: atoms have left each other when the next frame is due."""

    class Kick(Springs):
        def compute(self, batch, signals):
            found = super().compute(batch, signals)
            return found | {"forces": found["forces"] * (1e5 if self.n_calls == 3 else 0.0)}

    start = system(ethanol())
    given = {"temperature": 300.0, "steps": 50, "timestep": 0.5, "frames": 1, "max_force": 50.0}
    path = simulate(Kick(start.positions), start, **given, random=np.random.default_rng(0))
    assert path.diverged
    assert [f.made["step"] for f in path.frames] == [2]
    given |= {"temperature": 1e25}  # in one step farther than a neighbour list reaches
    path = simulate(Springs(start.positions, k=0.0), start, **given, random=np.random.default_rng(0))
    assert path.diverged
    assert path.frames == []


def test_a_single_step_of_dynamics_gives_a_frame():
    start = system(ethanol())
    given = {"temperature": 300.0, "steps": 1, "timestep": 0.5, "frames": 5, "max_force": 50.0}
    path = simulate(Springs(start.positions), start, **given, random=np.random.default_rng(0))
    assert [f.made["step"] for f in path.frames] == [1]
