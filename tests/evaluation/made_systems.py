"""Systems with random structures, labels, fixed atoms and missing labels, and predictions for them."""

import numpy as np

from molkd.pipeline.data.system import System

ELEMENTS = np.array([1, 6, 8, 42], np.uint8)


def made_systems(n=60, seed=0):
    """Return n systems of 1 to 9 atoms from two files; every fifth lacks an energy, every seventh forces."""
    rng = np.random.default_rng(seed)
    systems = []
    for i in range(n):
        n_atoms = int(rng.integers(1, 10))
        forces = rng.normal(size=(n_atoms, 3))
        systems.append(
            System(
                atomic_numbers=rng.choice(ELEMENTS, n_atoms),
                positions=rng.normal(scale=3, size=(n_atoms, 3)),
                cell=np.zeros((3, 3)),
                pbc=np.zeros(3, bool),
                energy=np.nan if i % 5 == 4 else float(rng.normal()),
                forces=np.full((n_atoms, 3), np.nan) if i % 7 == 6 else forces,
                tags=rng.integers(0, 3, n_atoms).astype(np.uint8),
                fixed=rng.random(n_atoms) < 0.2,
                source=f"{'ab'[i % 2]}.extxyz#{i}",
                info={} if i % 3 == 2 else {"adsorbate": ("H", "NNH")[i % 3]},
            )
        )
    return systems


def made_predictions(systems, seed=1):
    """Return energies (S,) and forces (N, 3) that are off by errors with a heavy tail."""
    rng = np.random.default_rng(seed)
    energy = np.array([0.0 if np.isnan(s.energy) else s.energy for s in systems])
    forces = np.concatenate([np.nan_to_num(s.forces) for s in systems])
    return energy + rng.standard_t(2, len(energy)), forces + 0.1 * rng.standard_t(2, forces.shape)


def collected(collector, systems, batch_size):
    """Feed a collector in batches."""
    energy, forces = made_predictions(systems)
    ptr = np.concatenate([[0], np.cumsum([s.n_atoms for s in systems])])
    for begin in range(0, len(systems), batch_size):
        end = min(begin + batch_size, len(systems))
        collector.add(systems[begin:end], energy[begin:end], forces[ptr[begin] : ptr[end]])
    return collector.result(None, "", "")
