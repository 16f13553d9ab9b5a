"""Structures, batches and weights that the teacher tests share."""

from pathlib import Path

import ase
import numpy as np
import torch
from ase.build import molecule

from molkd.pipeline.graphs.batch import Batch, make_batch
from molkd.pipeline.graphs.neighbors import NeighborRule

ETHANOL_WEIGHTS = Path(__file__).parents[3] / "shared/data/painn-rmd17-ethanol-weights"


def structures() -> list[ase.Atoms]:
    """Return two molecules and a cell smaller than the cutoff, of H, C and O, which every teacher knows."""
    ethanol, water = molecule("CH3CH2OH"), molecule("H2O")
    cell = ase.Atoms(
        "COHH",
        scaled_positions=[[0.0, 0.0, 0.0], [0.3, 0.1, 0.05], [0.5, 0.55, 0.5], [0.7, 0.6, 0.55]],
        cell=[[4.1, 0.0, 0.0], [0.5, 4.4, 0.0], [0.2, -0.3, 4.7]],
        pbc=True,
    )
    for seed, atoms in enumerate((ethanol, water, cell)):
        atoms.rattle(0.05, seed=seed)
    return [ethanol, water, cell]


def batch_of(systems: list[ase.Atoms], rule: NeighborRule, dtype: torch.dtype = torch.float64) -> Batch:
    n_atoms = np.array([len(atoms) for atoms in systems])
    return make_batch(
        atomic_numbers=np.concatenate([atoms.numbers for atoms in systems]).astype(np.uint8),
        positions=np.concatenate([atoms.positions for atoms in systems]),
        n_atoms=n_atoms,
        cell=np.stack([atoms.cell.array for atoms in systems]),
        pbc=np.stack([atoms.pbc for atoms in systems]),
        tags=np.zeros(n_atoms.sum(), np.uint8),
        fixed=np.zeros(n_atoms.sum(), bool),
        rule=rule,
        dtype=dtype,
    )


def random_schnetpack_arrays(c: int = 8, n_layers: int = 2, k: int = 6, cutoff: float = 5.0) -> dict:
    """Weights in the published layout, smaller and random, about as large as trained ones."""
    rng = np.random.default_rng(0)

    def dense(n_out: int, n_in: int, name: str) -> dict[str, np.ndarray]:
        weight = rng.normal(0, 1 / np.sqrt(n_in), (n_out, n_in)).astype(np.float32)
        return {f"{name}.weight": weight, f"{name}.bias": rng.normal(0, 0.1, n_out).astype(np.float32)}

    arrays: dict[str, np.ndarray] = {
        "cutoff_fn.cutoff": np.array([cutoff], np.float32),
        "radial_basis.widths": np.full(k, cutoff / (k - 1), np.float32),
        "radial_basis.offsets": np.linspace(0, cutoff, k, dtype=np.float32),
        "embedding.weight": rng.normal(size=(10, c)).astype(np.float32),
        "energy_mean_per_atom_kcal_mol": np.array(-1234.5),
        **dense(3 * c * n_layers, k, "filter_net"),
        **dense(c // 2, c, "readout.0"),
        **dense(1, c // 2, "readout.1"),
    }
    for i in range(n_layers):
        arrays |= dense(c, c, f"interactions.{i}.interatomic_context_net.0")
        arrays |= dense(3 * c, c, f"interactions.{i}.interatomic_context_net.1")
        arrays |= dense(c, 2 * c, f"mixing.{i}.intraatomic_context_net.0")
        arrays |= dense(3 * c, c, f"mixing.{i}.intraatomic_context_net.1")
        arrays[f"mixing.{i}.mu_channel_mix.weight"] = dense(2 * c, c, "")[".weight"]
    return arrays
