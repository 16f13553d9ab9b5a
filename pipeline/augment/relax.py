"""Relaxation with the teacher: many structures side by side, ASE's FIRE for each, one batch for all."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase.calculators.singlepoint import SinglePointCalculator
from ase.optimize import FIRE
from numpy.typing import NDArray

from molkd.pipeline.augment.frame import Frame, moved, to_atoms
from molkd.pipeline.augment.look import Looking, largest_force
from molkd.pipeline.data.system import System

_LONGEST_STEP = 0.1  # A, norm over all atoms of a system: a bad first guess should not fly apart


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A relaxation, the start first."""

    frames: list[Frame]
    diverged: bool  # the last frame's forces are beyond the bound, or not finite


def relax(
    looking: Looking, systems: Sequence[System], *, steps: int, fmax: float, max_force: float
) -> list[Trajectory]:
    """Relax every system until no free atom feels more than `fmax` (eV/A), or for so many steps.

    What feels more than `max_force` stops there: its relaxation has diverged.
    """
    frames: list[list[Frame]] = [[] for _ in systems]
    diverged = [False] * len(systems)
    atoms = [to_atoms(system) for system in systems]
    optimizers = [FIRE(one, logfile=None, maxstep=_LONGEST_STEP) for one in atoms]
    active = list(range(len(systems)))
    for step in range(steps + 1):
        present = [moved(systems[k], atoms[k].positions) for k in active]
        still = []
        for k, system, seen in zip(active, present, looking.look(present), strict=True):
            largest = largest_force(seen.forces, system.fixed)
            frames[k].append(Frame(system, {"step": step}, seen.energy, largest))
            diverged[k] = not (np.isfinite(seen.energy) and largest <= max_force)
            if not diverged[k] and largest > fmax and step < steps:
                # Forces that are already known: FIRE asks for nothing more in a step.
                atoms[k].calc = SinglePointCalculator(atoms[k], energy=seen.energy, forces=seen.forces)
                optimizers[k].step()
                still.append(k)
        active = still
        if not active:
            break
    return [Trajectory(f, d) for f, d in zip(frames, diverged, strict=True)]


def evenly(n_steps: int, n_frames: int) -> NDArray[np.int64]:
    """Return up to `n_frames` of the numbers 0 to `n_steps` - 1, evenly, first and last among them."""
    return np.unique(np.round(np.linspace(0, n_steps - 1, min(n_frames, n_steps))).astype(np.int64))
