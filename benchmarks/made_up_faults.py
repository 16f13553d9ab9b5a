"""The small stores, data and teacher that the fault campaign kills, damages and compares."""

from pathlib import Path

import ase
import ase.io
import numpy as np
import torch
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator

from molkd.pipeline.caching import cache_teacher
from molkd.pipeline.config import CacheConfig, IngestConfig
from molkd.pipeline.data.references import LabelScale
from molkd.pipeline.ingest import ingest
from molkd.pipeline.models.potential import Potential
from molkd.pipeline.models.registry import build_model
from molkd.pipeline.sharing.copying import copy_store
from molkd.pipeline.sharing.selection import Selection

KINDS = ("CH3CH2OH", "H2O", "CH3OH", "C6H6")
MODEL = {
    "name": "painn", "hidden_channels": 8, "num_layers": 1, "num_rbf": 8, "cutoff": 4.0, "max_neighbors": 30,
    "direct_forces": True,
}  # fmt: skip


def make(folder: Path, signals: tuple[str, ...], encodings: tuple[str, ...]) -> None:
    """Write first.extxyz and second.extxyz, teacher.safetensors, and the stores that come of them.

    whole : the systems of first.extxyz with the signals, in three shards; copy : the same; small and large :
    parts of it that overlap
    """
    systems = structures(300)
    ase.io.write(folder / "first.extxyz", systems[:250], format="extxyz")
    ase.io.write(folder / "second.extxyz", systems[200:], format="extxyz")
    write_teacher(folder / "teacher.safetensors")
    whole = folder / "whole.kdcache"
    ingest(IngestConfig(data=(folder / "first.extxyz",), store=whole, shard_atoms=1024))
    config = {"signals": signals, "encoding": encodings, "device": "cpu"}
    cache_teacher(CacheConfig(store=whole, teacher=str(folder / "teacher.safetensors"), **config))
    copy_store(whole, folder / "copy.kdcache")
    copy_store(whole, folder / "small.kdcache", selection=Selection(max_atoms=9))
    copy_store(whole, folder / "large.kdcache", selection=Selection(min_atoms=6))


def structures(n_systems: int) -> list[ase.Atoms]:
    """Return rattled molecules with made-up labels."""
    rng, systems = np.random.default_rng(0), []
    for k in range(n_systems):
        atoms = molecule(KINDS[k % len(KINDS)])
        atoms.positions += rng.normal(0, 0.05, (len(atoms), 3))
        forces = rng.normal(size=(len(atoms), 3))
        atoms.calc = SinglePointCalculator(atoms, energy=rng.normal(-50, 5), forces=forces)
        systems.append(atoms)
    return systems


def write_teacher(path: Path) -> None:
    """Write a tiny PaiNN with random weights."""
    torch.manual_seed(0)
    elements = {"provenance": {"elements": [1, 6, 8]}}
    Potential(build_model(MODEL), LabelScale(), {"model": MODEL} | elements).save(path)
