"""Bad structures and labels: one line that names file, system and remedy, and nothing is lost or left."""

import os
import pickle
import re
import tarfile
from pathlib import Path

import ase
import ase.io
import lmdb
import numpy as np
import pytest
from cli_arguments import train
from stage_one_cases import structures, write_extxyz

LMDB = Path(__file__).parents[1] / "data" / "lmdb" / "lmdb.tar.xz"


@pytest.fixture(scope="module")
def lmdb_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lmdb")
    with tarfile.open(LMDB) as archive:
        archive.extractall(folder, filter="data")
    return folder / "s2ef_pyg2_y_force" / "data.0000.lmdb"


def test_truncated_lmdb(refused, tmp_path, lmdb_file):
    cut = tmp_path / "cut.lmdb"
    cut.write_bytes(lmdb_file.read_bytes()[: lmdb_file.stat().st_size // 2])
    refused("ingest", cut, tmp_path / "s", says=[str(cut), "cut off|truncated|damaged", r"[Cc]opy it again"])


def test_file_that_is_no_lmdb(refused, tmp_path):
    wrong = tmp_path / "wrong.lmdb"
    wrong.write_bytes(b"no database" * 1000)
    refused("ingest", wrong, tmp_path / "s", says=[str(wrong), "not an LMDB file", "Copy it again"])


class Evil:
    """Makes a file when it is unpickled."""

    def __reduce__(self):
        return (os.system, ("touch executed",))


@pytest.mark.parametrize("payload", [Evil(), re.compile("x"), {"pos": Evil()}])
def test_pickle_of_foreign_classes(refused, tmp_path, monkeypatch, payload):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.lmdb"
    environment = lmdb.open(str(path), subdir=False, map_size=1 << 20, lock=False)
    with environment.begin(write=True) as transaction:
        transaction.put(b"0", pickle.dumps(payload))
        transaction.put(b"length", pickle.dumps(1))
    environment.close()
    refused("ingest", path, tmp_path / "s", says=[r"evil\.lmdb", "key 0|#0", "refused|not allowed|may not"])
    assert not (tmp_path / "executed").exists()


def test_missing_energies(refused, tmp_path):
    systems = structures(3)
    systems[1].calc = None
    data = write_extxyz(tmp_path / "a.xyz", systems)
    says = [r"a\.xyz#1: no energy", "--energy-key", "--drop-labels"]
    refused("ingest", data, tmp_path / "s", "--require-labels", says=says)


def test_energy_under_another_name(refused, tmp_path):
    data = write_extxyz(tmp_path / "a.xyz", structures(3))
    says = [r"a\.xyz: no energy label 'E_dft'", "keys that fit: energy"]
    refused("ingest", data, tmp_path / "s", "--energy-key", "E_dft", says=says)


def _nan(atoms):
    atoms.positions[2, 1] = np.nan


def _infinite(atoms):
    atoms.positions[1, 0] = np.inf


def _flat(atoms):
    atoms.pbc = True
    atoms.cell = [[3.0, 0, 0], [0, 3.0, 0], [3.0, 3.0, 0]]


def _coinciding(atoms):
    atoms.positions[2] = atoms.positions[0]


def _unknown(atoms):
    atoms.numbers[0] = 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_nan, "positions of atoms 2 are NaN or infinite"),
        (_infinite, "positions of atoms 1 are NaN or infinite"),
        (_flat, "periodic along abc, but these lattice vectors are zero or linearly dependent"),
        (_coinciding, r"atoms 0 and 2 are closer than 0\.01 A"),
        (_unknown, "atomic numbers outside 1 to 118: 0"),
    ],
)
@pytest.mark.parametrize("command", ["ingest", "evaluate"])
def test_structure_without_sense(refused, everything, tmp_path, change, says, command):
    systems = structures(4, labelled=False)
    change(systems[1])
    data = write_extxyz(tmp_path / "a.xyz", systems)
    arguments = (data, tmp_path / "s") if command == "ingest" else (everything / "run", data)
    refused(command, *arguments, says=[r"a\.xyz#1: ", says, "Correct the system or leave it out"])


def test_cell_of_zeros_with_pbc(refused, tmp_path):
    """In a format that keeps pbc although there is no cell."""
    atoms = ase.Atoms("H2", [[0, 0, 0], [0, 0, 0.74]], pbc=True)
    ase.io.write(tmp_path / "a.traj", [atoms])
    refused("ingest", tmp_path / "a.traj", tmp_path / "s", says=[r"a\.traj#0", "lattice vectors are zero"])


@pytest.mark.parametrize("name", ["a.extxyz", "a.xyz.gz", "a.lmdb", "a.npz", "a.db", "a.traj", "a.cif"])
def test_empty_file(refused, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"")
    refused("ingest", path, tmp_path / "s", says=[re.escape(str(path)), r"\. \w+|; \w+"])


def test_empty_folder_no_file_no_data(refused, tmp_path):
    (tmp_path / "folder").mkdir()
    refused("ingest", tmp_path / "folder", tmp_path / "s", says=["folder without .lmdb", "Give a folder"])
    refused("ingest", tmp_path / "none", tmp_path / "s", says=["none does not exist", "Give the path"])
    refused("ingest", tmp_path / "s", says=["no data given; name at least one file"])


def test_extxyz_cut_off(refused, tmp_path):
    data = write_extxyz(tmp_path / "a.xyz", structures(3))
    data.write_text(data.read_text()[:-200])
    refused("ingest", data, tmp_path / "s", says=[r"a\.xyz, system 2", "cut off|cannot be read"])


def test_element_that_the_model_does_not_know(refused, everything, tmp_path):
    strange, teacher = everything / "strange.extxyz", everything / "teacher.safetensors"
    says = [r"strange\.extxyz#3", "atomic number 7|holds N", "leave such systems out, or take another"]
    refused("cache-teacher", strange, tmp_path / "s", "--teacher", teacher, says=says, new=["s"])
    refused("cache-teacher", strange, tmp_path / "s2", "--teacher", teacher, "--dry-run", says=says)
    refused("evaluate", everything / "run", strange, says=says)
    refused("evaluate", teacher, strange, "--predictions", tmp_path / "p.xyz", says=says)
    store = everything / "train.kdcache"
    refused(*train(store, tmp_path / "run", "--val", strange), says=says, new=["run"])
    refused(*train(store, tmp_path / "run-2", "--test", strange), says=says, new=["run-2"])
