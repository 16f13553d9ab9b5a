"""Trajectories, databases and other formats that ASE reads."""

import ase.db
import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms

from molkd.pipeline.data.sources import open_source, open_sources
from molkd.pipeline.errors import DataError


@pytest.fixture
def frames():
    rng = np.random.default_rng(0)
    frames = []
    for n_atoms in (3, 5, 4):
        atoms = Atoms(
            numbers=rng.integers(1, 30, n_atoms),
            positions=rng.random((n_atoms, 3)) * 4,
            cell=[5, 6, 7],
            pbc=[1, 1, 0],
        )
        atoms.set_tags(range(n_atoms))
        atoms.set_constraint(FixAtoms([1]))
        atoms.calc = SinglePointCalculator(
            atoms, energy=float(n_atoms), forces=rng.random((n_atoms, 3)), free_energy=9.0
        )
        frames.append(atoms)
    frames[2].calc = None
    return frames


def check(path, frames):
    source = open_source(path)
    assert len(source) == 3
    for i in (2, 0, 1):
        system, atoms = source.read(i), frames[i]
        np.testing.assert_array_equal(system.atomic_numbers, atoms.numbers)
        np.testing.assert_allclose(system.positions, atoms.positions, atol=1e-9)
        np.testing.assert_allclose(system.cell, atoms.cell[:], atol=1e-9)
        np.testing.assert_array_equal(system.pbc, atoms.pbc)
        np.testing.assert_array_equal(system.tags, atoms.get_tags())
        assert system.fixed.tolist() == [k == 1 for k in range(len(atoms))]
        assert system.source == f"{path.name}#{i}"
        if i == 2:
            assert np.isnan(system.energy)
            assert np.isnan(system.forces).all()
        else:
            assert system.energy == len(atoms)
            np.testing.assert_allclose(system.forces, atoms.calc.results["forces"], atol=1e-9)
    source.close()


@pytest.mark.parametrize("name", ["a.traj", "a@1.traj"])
def test_file(tmp_path, frames, name):
    with (tmp_path / name).open("wb") as file:
        ase.io.write(file, frames, format="traj")
    check(tmp_path / name, frames)


@pytest.mark.parametrize("name", ["a.db", "a.json"])
def test_database_with_a_deleted_row(tmp_path, frames, name):
    path = tmp_path / name
    with ase.db.connect(path) as database:
        ids = [database.write(frames[0]), *(database.write(f, origin=1.5, data={"fid": 3}) for f in frames)]
    ase.db.connect(path).delete([ids[0]])
    check(path, frames)
    source = open_source(path, energy_key="origin")
    assert source.read(2).energy == 1.5
    source.close()


def test_structure_without_labels(tmp_path, frames):
    path = tmp_path / "a.cif"
    bulk = frames[0].copy()
    bulk.pbc = True
    ase.io.write(path, bulk)
    source = open_source(path)
    assert len(source) == 1
    assert np.isnan(source.read(0).energy)
    assert source.read(0).pbc.all()
    source.close()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.traj", b"no trajectory"),
        ("a.traj", b""),
        ("a.db", b"no database"),
        ("a.json", b'{"not": "a database"}'),
        ("a.json", b"{"),
        ("a.cif", b"data_x\n_cell_length_a ??\n"),
        ("a.whatever", b"\x00\x01\x02"),
    ],
)
def test_unreadable_file(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}"):
        open_source(path)


@pytest.mark.parametrize("n_missing", [1, 500, 1000])
@pytest.mark.parametrize("name", ["a.traj", "a.db"])
def test_cut_off(tmp_path, frames, name, n_missing):
    path = tmp_path / name
    ase.io.write(path, frames)
    path.write_bytes(path.read_bytes()[:-n_missing])
    with pytest.raises(DataError, match=name):
        read_all(path)


def read_all(path):
    source = open_source(path)
    try:
        return [source.read(i) for i in range(len(source))]
    finally:
        source.close()


def test_atomic_number_out_of_range(tmp_path):
    path = tmp_path / "a.traj"
    ase.io.write(path, Atoms(numbers=[300, 1], positions=np.eye(3)[:2]))
    source = open_source(path)
    with pytest.raises(DataError, match=r"a\.traj#0: atomic numbers must be whole numbers from 0 to 255"):
        source.read(0)
    source.close()


def test_missing_file():
    with pytest.raises(DataError, match="does not exist"):
        open_source("/nonexistent/a.extxyz")


def test_all_bad_paths_are_told_at_once(tmp_path, frames):
    good, bad = tmp_path / "good.traj", tmp_path / "bad.npz"
    ase.io.write(good, frames)
    bad.write_bytes(b"")
    with pytest.raises(DataError, match=r"(?s)bad\.npz.*missing\.xyz"):
        open_sources([good, bad, tmp_path / "missing.xyz"])
    sources = open_sources([good, good])
    assert [len(s) for s in sources] == [3, 3]
    for source in sources:
        source.close()
