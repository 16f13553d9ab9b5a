"""How far student and teacher are apart, and where that grows: the objective of adversarial rattling.

For a system of N atoms, N_free of them free,

    L = a_E (dE / N)^2 + a_F sum over free atoms of |dF|^2 / N_free,   dE = E_s - E_t,  dF = F_s - F_t

in eV^2 and (eV/A)^2. Its gradient by positions is that of ``a E_s + v . F_s`` minus that of
``a E_t + v . F_t`` with a = dL/dE_s and v = dL/dF_s held. For the student, and a teacher that is a
`Potential`, it comes from autograd. Of any other teacher only its outputs are needed: dE_t/dx = -F_t, and
because the derivative of forces is symmetric, that of v . F_t is their change along v, taken between two
structures displaced along it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from molkd.pipeline.augment.frame import moved
from molkd.pipeline.augment.look import Looking
from molkd.pipeline.data.system import System
from molkd.pipeline.graphs.batch import batch_from_systems, to_device
from molkd.pipeline.models.potential import Potential

_STEP = 5e-3  # A, of the atom that moves most in a difference of forces; float32 forces still tell it
_Pull = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]


class Discrepancy(NamedTuple):
    """Of each system of a group."""

    values: NDArray[np.float64]  # (S,) L
    gradient: NDArray[np.float64]  # (N, 3) dL/dx
    energies: NDArray[np.float64]  # (S,) eV, dE


class _Surface(NamedTuple):
    """Energies (S,), forces (N, 3) and the gradient (N, 3) of a . E + v . F for given a (S,) and v (N, 3)."""

    energies: NDArray[np.float64]
    forces: NDArray[np.float64]
    pull: _Pull


def measure(
    student: Potential,
    looking: Looking,
    systems: Sequence[System],
    energy_weight: float,
    forces_weight: float,
) -> Discrepancy:
    """Return the discrepancy of a group of systems that fits in one batch; neighbour lists are built anew."""
    n_atoms = np.array([s.n_atoms for s in systems])
    owner = np.repeat(np.arange(len(systems)), n_atoms)
    free = ~np.concatenate([s.fixed for s in systems])
    n_free = np.maximum(np.bincount(owner, weights=free, minlength=len(systems)), 1)
    teacher = getattr(looking.teacher, "potential", None)
    dtype = looking.teacher.dtype
    here = _of_potential(student, systems, dtype)
    there = _of_potential(teacher, systems, dtype) if teacher is not None else _of_outputs(looking, systems)
    dE = here.energies - there.energies  # (S,)
    dF = (here.forces - there.forces) * free[:, None]  # (N, 3)
    squares = np.bincount(owner, weights=(dF**2).sum(axis=1), minlength=len(systems))
    values = energy_weight * (dE / n_atoms) ** 2 + forces_weight * squares / n_free
    a = 2 * energy_weight * dE / n_atoms**2
    v = 2 * forces_weight * dF / n_free[owner][:, None]
    return Discrepancy(values, here.pull(a, v) - there.pull(a, v), dE)


def _of_potential(potential: Potential, systems: Sequence[System], dtype: torch.dtype) -> _Surface:
    batch = to_device(batch_from_systems(systems, potential.neighbor_rule, dtype), potential.device, dtype)
    positions = batch.positions.requires_grad_()
    with torch.enable_grad():
        out = potential.predict(batch._replace(positions=positions))
    energies, forces = out["energy"], out["forces"]

    def pull(a: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.float64]:
        product = (energies * energies.new_tensor(a)).sum()
        if v.any():  # a second derivative for forces that are gradients: not for nothing
            product = product + (forces * forces.new_tensor(v)).sum()
        (gradient,) = torch.autograd.grad(product, positions, materialize_grads=True)
        return np.asarray(gradient.double().cpu().numpy())

    return _Surface(energies.detach().cpu().numpy(), forces.detach().double().cpu().numpy(), pull)


def _of_outputs(looking: Looking, systems: Sequence[System]) -> _Surface:
    seen = looking.look(systems)
    forces = np.concatenate([s.forces for s in seen])
    n_atoms = [s.n_atoms for s in systems]

    def pull(a: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.float64]:
        gradient = -forces * np.repeat(a, n_atoms)[:, None]
        return gradient + _change_of_forces(looking, systems, v) if v.any() else gradient

    return _Surface(np.array([s.energy for s in seen]), forces, pull)


def _change_of_forces(
    looking: Looking, systems: Sequence[System], v: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the derivative of the teacher's forces along v (N, 3), by central differences."""
    ends = np.cumsum([s.n_atoms for s in systems])
    changes = []
    parts = np.split(np.nan_to_num(v, posinf=0.0, neginf=0.0), ends[:-1])  # what is not finite climbs nowhere
    lengths = [max(float(np.linalg.norm(p, axis=1).max()), 1e-300) for p in parts]
    displaced = [
        moved(s, s.positions + sign * _STEP / length * p)
        for s, p, length in zip(systems, parts, lengths, strict=True)
        for sign in (1, -1)
    ]
    seen = looking.look(displaced)
    for k, length in enumerate(lengths):
        changes.append((seen[2 * k].forces - seen[2 * k + 1].forces) * length / (2 * _STEP))
    return np.concatenate(changes)
