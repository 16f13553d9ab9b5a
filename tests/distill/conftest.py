"""Stores of a few dozen frames with the signals of a teacher with random weights."""

import sys
from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms

sys.path.insert(0, str(Path(__file__).parent))

from distill_cases import COLL, GEMNET_TEACHER, add_teacher, make_store, read_systems, save_teacher


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher.safetensors")


@pytest.fixture(scope="session")
def store(tmp_path_factory, teacher_file) -> Path:
    """All frames labelled, signals as float32."""
    path = make_store(tmp_path_factory.mktemp("stores") / "coll.kdcache", COLL)
    return add_teacher(path, teacher_file)


@pytest.fixture(scope="session")
def mixed_store(tmp_path_factory, teacher_file) -> Path:
    """A quarter each: all labels, energy only, forces only, none; some atoms fixed, some systems periodic."""
    folder = tmp_path_factory.mktemp("mixed")
    frames = []
    for k, system in enumerate(read_systems()):
        atoms = ase.Atoms(system.atomic_numbers, system.positions)
        if k % 5 == 0:
            atoms.set_constraint(FixAtoms([0, 2]))
        if k % 7 == 0:
            atoms.set_cell(np.diag([9.0, 8.0, 7.0]) + 0.1)
            atoms.set_pbc((True, True, False))
        labels = {"energy": system.energy} if k % 4 in (0, 1) else {}
        labels |= {"forces": system.forces} if k % 4 in (0, 2) else {}
        if labels:
            atoms.calc = SinglePointCalculator(atoms, **labels)
        frames.append(atoms)
    ase.io.write(folder / "mixed.extxyz", frames, format="extxyz")
    return add_teacher(make_store(folder / "mixed.kdcache", folder / "mixed.extxyz"), teacher_file)


@pytest.fixture(scope="session")
def bare_store(tmp_path_factory, teacher_file) -> Path:
    """The same structures without a single label."""
    path = make_store(tmp_path_factory.mktemp("bare") / "bare.kdcache", drop_labels=(COLL,))
    return add_teacher(path, teacher_file)


@pytest.fixture(scope="session")
def gemnet_file(tmp_path_factory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("gemnet") / "gemnet.safetensors", config=GEMNET_TEACHER)


@pytest.fixture(scope="session")
def gemnet_store(tmp_path_factory, gemnet_file) -> Path:
    """All frames labelled, edges and some layers of a GemNet-OC as float32."""
    path = make_store(tmp_path_factory.mktemp("gemnet_store") / "coll.kdcache", COLL)
    signals = ("atomic_energies", "node", "e2n", "v2v", "edge", "layer/H1", "layer/X2")
    return add_teacher(path, gemnet_file, signals=signals)
