"""Teachers, structures and settings for the tests of `kd augment`."""

from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.build import molecule
from ase.constraints import FixAtoms
from stage_one_cases import write_extxyz, write_teacher

from molkd.pipeline.augment.frame import from_atoms
from molkd.pipeline.augment.look import Looking
from molkd.pipeline.data.references import LabelScale
from molkd.pipeline.data.system import System
from molkd.pipeline.graphs.neighbors import NeighborRule
from molkd.pipeline.models.potential import Potential
from molkd.pipeline.models.registry import build_model
from molkd.pipeline.teachers.interface import TeacherInfo
from molkd.pipeline.teachers.load import load_teacher

METALS = (1, 6, 7, 8, 29, 79)


def write_files(folder: Path) -> None:
    """Write smooth.safetensors (SchNet, gradient forces), direct, ethanol.npz, metal and molecules.extxyz."""
    write_teacher(folder / "smooth", "schnet")
    write_teacher(folder / "direct", "painn-direct")
    write_teacher(folder / "ethanol", "schnetpack")
    config = {"name": "schnet", "hidden_channels": 8, "num_filters": 8, "num_interactions": 1, "cutoff": 4.0}
    torch.manual_seed(1)
    provenance = {"elements": list(METALS)}
    model = build_model(config)
    Potential(model, LabelScale(), {"model": config, "provenance": provenance}).save(
        folder / "metal.safetensors"
    )
    write_extxyz(folder / "molecules.extxyz", [ethanol(seed) for seed in range(6)])


def ethanol(seed: int = 0) -> Atoms:
    """Return a rattled ethanol."""
    atoms = molecule("CH3CH2OH")
    atoms.positions = np.round(atoms.positions + np.random.default_rng(seed).normal(0, 0.03, (9, 3)), 6)
    return atoms


def system(atoms: Atoms, fixed: tuple[int, ...] = ()) -> System:
    """Return the structure without labels."""
    atoms = atoms.copy()
    if fixed:
        atoms.set_constraint(FixAtoms(list(fixed)))
    return from_atoms(atoms, "test")


def looking(path: Path, dtype: torch.dtype = torch.float64, max_atoms: int = 100_000) -> Looking:
    """Return a teacher that may look at many atoms at once."""
    return Looking(load_teacher(str(path), device="cpu", dtype=dtype), max_atoms, 10_000_000)


class Springs:
    """A teacher whose atoms are tied to places by springs: E = k/2 |x - x0|^2 over all atoms."""

    neighbor_rule = NeighborRule(0.5)
    atomic_numbers = frozenset(range(1, 119))
    device = torch.device("cpu")
    dtype = torch.float64
    signals: dict = {}  # noqa: RUF012
    info = TeacherInfo("springs", "springs", "0" * 64, {}, {}, "", "", "zero at rest")

    def __init__(self, places: np.ndarray, k: float = 5.0) -> None:
        self.places, self.k, self.n_calls = torch.as_tensor(places), k, 0

    def compute(self, batch, signals):
        self.n_calls += 1
        places = self.places.repeat(batch.n_systems, 1)
        d = batch.positions - places
        energy = torch.zeros(batch.n_systems, dtype=torch.float64)
        energy.index_add_(0, batch.system_idx, self.k / 2 * (d**2).sum(1))
        return {"energy": energy, "forces": -self.k * d}
