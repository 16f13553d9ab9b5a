"""Relaxation side by side against ASE alone, and on springs whose rest is known."""

import numpy as np
import pytest
from ase.optimize import FIRE
from augment_cases import Springs, ethanol, looking, system

from molkd.pipeline.augment.frame import to_atoms
from molkd.pipeline.augment.look import Looking
from molkd.pipeline.augment.relax import evenly, relax
from molkd.pipeline.export.calculator import TeacherCalculator


def test_side_by_side_is_what_ase_does_alone(files):
    look = looking(files / "smooth.safetensors", max_atoms=20)  # two at a time
    systems = [system(ethanol(k), fixed=(0,) if k == 1 else ()) for k in range(3)]
    paths = relax(look, systems, steps=12, fmax=1e-3, max_force=1e6)
    for one, path in zip(systems, paths, strict=True):
        atoms = to_atoms(one)
        atoms.calc = TeacherCalculator(look.teacher)
        motion = FIRE(atoms, logfile=None, maxstep=0.1)
        energies = []
        motion.attach(lambda atoms=atoms, e=energies: e.append(atoms.get_potential_energy()))
        motion.run(fmax=1e-3, steps=12)
        np.testing.assert_allclose(path.frames[-1].system.positions, atoms.positions, atol=1e-7)
        np.testing.assert_allclose([f.energy for f in path.frames], energies, atol=1e-6)


def test_springs_come_to_rest_and_free_ones_stop_early():
    rest = ethanol().positions
    teacher = Springs(rest)
    start = ethanol()
    start.positions[3] += [0.2, 0, 0]
    held = system(start, fixed=(3,))
    free, fixed = relax(
        Looking(teacher, 1000, 10**6), [system(start), held], steps=200, fmax=0.01, max_force=50
    )
    assert free.frames[0].energy == pytest.approx(5 / 2 * 0.04)
    assert free.frames[0].largest_force == pytest.approx(1.0)
    np.testing.assert_allclose(free.frames[-1].system.positions, rest, atol=0.01 / 5)
    assert len(free.frames) < 200
    assert not free.diverged
    assert len(fixed.frames) == 1  # its only force is on the atom that is held
    assert (fixed.frames[0].system.positions == start.positions).all()


def test_what_diverges_stops():
    start = ethanol()
    start.positions[3] += [2.0, 0, 0]
    (path,) = relax(
        Looking(Springs(ethanol().positions), 1000, 10**6), [system(start)], steps=9, fmax=0.1, max_force=5
    )
    assert path.diverged
    assert len(path.frames) == 1


@pytest.mark.parametrize(
    ("n_steps", "n_frames", "expected"),
    [(11, 5, [0, 2, 5, 8, 10]), (3, 5, [0, 1, 2]), (1, 5, [0]), (100, 2, [0, 99]), (7, 1, [0])],
)
def test_evenly(n_steps, n_frames, expected):
    assert evenly(n_steps, n_frames).tolist() == expected
