"""Short Langevin dynamics with the teacher: ASE's integrator over the teacher's calculator."""

import numpy as np
from ase import units
from ase.constraints import FixCom
from ase.md.langevin import Langevin

from molkd.pipeline.augment.frame import Frame, moved, to_atoms
from molkd.pipeline.augment.look import largest_force
from molkd.pipeline.augment.relax import Trajectory, evenly
from molkd.pipeline.data.system import System
from molkd.pipeline.data.validate import is_in_reach
from molkd.pipeline.export.calculator import TeacherCalculator
from molkd.pipeline.teachers.interface import Teacher

_FRICTION = 0.01  # 1/fs: velocities forget themselves in 0.1 ps


def simulate(
    teacher: Teacher,
    system: System,
    *,
    temperature: float,
    steps: int,
    timestep: float,
    frames: int,
    max_force: float,
    random: np.random.Generator,
) -> Trajectory:
    """Move a system at a temperature, from velocities drawn for it, and keep frames evenly over the steps.

    The first frame is after some steps, not the start; a run stops where a force exceeds `max_force`.

    Parameters
    ----------
    temperature : K
    timestep : fs
    """
    atoms = to_atoms(system)
    if not atoms.constraints:
        atoms.set_constraint(FixCom())
    atoms.calc = TeacherCalculator(teacher)
    widths = np.sqrt(atoms.get_masses() * units.kB * temperature)  # of Maxwell and Boltzmann
    atoms.set_momenta(random.normal(size=(len(atoms), 3)) * widths[:, None])
    motion = Langevin(
        atoms, timestep * units.fs, temperature_K=temperature, friction=_FRICTION / units.fs, fixcm=False,
        rng=random, logfile=None,
    )  # fmt: skip
    found: list[Frame] = []
    wanted = set(evenly(steps + 1, frames + 1)[1:].tolist())
    # Every step is looked at: between frames atoms may collide and fly apart to where nothing pulls at them.
    for step in range(1, steps + 1):
        motion.run(1)
        present = moved(system, atoms.positions)
        if not is_in_reach(present):
            return Trajectory(found, diverged=True)
        energy = float(atoms.get_potential_energy())
        largest = largest_force(atoms.get_forces(apply_constraint=False), system.fixed)
        diverged = not (np.isfinite(energy) and largest <= max_force)
        if step in wanted or diverged:
            found.append(Frame(present, {"step": step, "temperature": temperature}, energy, largest))
        if diverged:
            return Trajectory(found, diverged=True)
    return Trajectory(found, diverged=False)
