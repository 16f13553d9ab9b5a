"""Structures, teachers and comparisons of stores for the tests of stage one and of the command line."""

from pathlib import Path

import ase
import ase.io
import numpy as np
import torch
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from teacher_cases import random_schnetpack_arrays

from molkd.pipeline.config import IngestConfig
from molkd.pipeline.data.references import LabelScale
from molkd.pipeline.graphs.batch import Batch, make_batch
from molkd.pipeline.graphs.neighbors import NeighborRule
from molkd.pipeline.ingest import ingest
from molkd.pipeline.models.potential import Potential
from molkd.pipeline.models.registry import build_model

ELEMENTS = (1, 6, 8)
_CELL = [[4.1, 0.0, 0.0], [0.5, 4.4, 0.0], [0.2, -0.3, 4.7]]  # A, smaller than the teachers' cutoff


def structures(n_systems: int, seed: int = 0, *, labelled: bool = True) -> list[ase.Atoms]:
    """Return rattled molecules and cells of H, C, O, all different; every fourth is periodic."""
    rng = np.random.default_rng(seed)
    systems = []
    for k in range(n_systems):
        atoms = molecule(("CH3CH2OH", "H2O", "CH3OH", "CO2")[k % 4]) if k % 4 != 3 else _cell()
        noise = rng.normal(0, 0.05, (len(atoms), 3))
        atoms.positions = np.round(atoms.positions + noise, 6)  # digits that an extxyz file keeps
        atoms.set_tags(rng.integers(0, 3, len(atoms)))
        atoms.set_constraint(FixAtoms(mask=rng.random(len(atoms)) < 0.2))
        if labelled:
            label(atoms, rng.normal(-50, 5), rng.normal(0, 1, (len(atoms), 3)))
        systems.append(atoms)
    return systems


def label(atoms: ase.Atoms, energy: float, forces: np.ndarray) -> ase.Atoms:
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
    return atoms


def _cell() -> ase.Atoms:
    positions = [[0.0, 0.0, 0.0], [0.3, 0.1, 0.05], [0.5, 0.55, 0.5], [0.7, 0.6, 0.55]]
    return ase.Atoms("COHH", scaled_positions=positions, cell=_CELL, pbc=True)


def write_extxyz(path: Path, systems: list[ase.Atoms]) -> Path:
    ase.io.write(path, systems, format="extxyz")
    return path


def make_store(store: Path, *data: Path, **settings: object) -> Path:
    """Put data into a store of small shards."""
    ingest(IngestConfig(data=data, store=store, **{"shard_atoms": 1024, **settings}))
    return store


def write_teacher(path: Path, kind: str = "painn-direct", channels: int = 8, seed: int = 3) -> Path:
    """Write a small teacher with random weights.

    `kind` is painn-direct, painn-gradient, schnet, gemnet or schnetpack.
    """
    if kind == "schnetpack":
        np.savez(path.with_suffix(".npz"), **random_schnetpack_arrays())
        return path.with_suffix(".npz")
    config: dict[str, object] = {
        "name": "painn", "hidden_channels": channels, "num_layers": 1, "num_rbf": 8,
        "direct_forces": kind == "painn-direct",
    }  # fmt: skip
    if kind == "schnet":
        config = {"name": "schnet", "hidden_channels": channels, "num_filters": 8, "num_interactions": 1}
    if kind == "gemnet":
        sizes = dict.fromkeys(("trip_in", "trip_out", "quad_in", "quad_out", "aint_in", "aint_out"), 4)
        sizes |= {"atom": channels, "edge": channels + 2, "rbf": 4, "cbf": 4, "sbf": 4}
        config = {"name": "gemnet_oc", "num_spherical": 3, "num_radial": 8, "num_blocks": 1}
        config |= {"max_neighbors": 12, "max_neighbors_aint": 1000}
        config |= {f"emb_size_{name}": size for name, size in sizes.items()}
    config = {"max_neighbors": 1000, **config, "cutoff": 5.0}
    torch.manual_seed(seed)
    model = build_model(config)
    for parameter in model.parameters():  # fresh biases are zero and hide mistakes
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    scale = LabelScale(-0.7, 1.9, 1.9, {1: -13.0, 6: -1030.0, 8: -2040.0})
    path = path.with_suffix(".safetensors")
    Potential(model, scale, {"model": config, "provenance": {"elements": list(ELEMENTS)}}).save(path)
    return path


def one_batch(atoms: ase.Atoms, rule: NeighborRule, dtype: torch.dtype) -> Batch:
    """Return a batch of this structure alone, its positions rounded as a store keeps them."""
    return make_batch(
        atomic_numbers=atoms.numbers.astype(np.uint8),
        positions=atoms.positions.astype(np.float32),
        n_atoms=np.array([len(atoms)]),
        cell=atoms.cell.array[None].astype(np.float32),
        pbc=atoms.pbc[None],
        tags=np.zeros(len(atoms), np.uint8),
        fixed=np.zeros(len(atoms), bool),
        rule=rule,
        dtype=dtype,
    )


class Shuffled:
    """A teacher that gives its edges in an order of its own, systems mixed."""

    def __init__(self, teacher):
        self._teacher = teacher
        self.random = torch.Generator().manual_seed(1)

    def __getattr__(self, name):
        return getattr(self._teacher, name)

    def compute(self, batch, signals):
        out = self._teacher.compute(batch, signals)
        order = torch.randperm(out["edge_index"].shape[1], generator=self.random)
        return out | {
            "edge": out["edge"][order],
            "edge_index": out["edge_index"][:, order],
            "edge_shift": out["edge_shift"][order],
        }


def files(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder with its bytes."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_same_files(folder: Path, expected: Path) -> None:
    """Compare folders by content; nothing may be missing or left over."""
    found, wanted = files(folder), files(expected)
    assert sorted(found) == sorted(wanted)
    assert [name for name in wanted if found[name] != wanted[name]] == []
