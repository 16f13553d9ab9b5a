import tarfile
from pathlib import Path

import lmdb
import numpy as np
import pytest

from molkd.pipeline.data.system import System

DATA = Path(__file__).parents[1] / "data" / "lmdb" / "lmdb.tar.xz"


@pytest.fixture(scope="session")
def lmdb_folder(tmp_path_factory):
    """The reference LMDBs, unpacked."""
    folder = tmp_path_factory.mktemp("lmdb")
    with tarfile.open(DATA) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="session")
def truth(lmdb_folder):
    """(sid, fid) -> dict of plain arrays."""
    with np.load(lmdb_folder / "labels.npz") as file:
        a = dict(file)
    ends = np.cumsum(a["natoms"])
    rows = {}
    for k, (sid, fid) in enumerate(zip(a["sid"], a["fid"], strict=True)):
        atoms = slice(ends[k] - a["natoms"][k], ends[k])
        per_atom = {key: a[key][atoms] for key in ("pos", "force", "Z", "tags", "fixed")}
        rows[int(sid), int(fid)] = {
            "y": a["y"][k],
            "raw_energy": a["raw_energy"][k],
            "cell": a["cell"][k],
            **per_atom,
        }
    return rows


@pytest.fixture
def write_lmdb():
    """Function that writes a dictionary of bytes as an LMDB file."""

    def write(path, values):
        environment = lmdb.open(str(path), subdir=False, map_size=1 << 24, lock=False)
        with environment.begin(write=True) as transaction:
            for key, value in values.items():
                transaction.put(key, value)
        environment.close()
        return path

    return write


@pytest.fixture
def make_system():
    """Function that builds a System from what differs from a labelled water molecule."""

    def make(**changes):
        n_atoms = len(changes.get("positions", changes.get("atomic_numbers", [0, 0, 0])))
        values = {
            "atomic_numbers": np.array([8, 1, 1, *[1] * n_atoms], dtype=np.uint8)[:n_atoms],
            "positions": np.array([[0.0, 0.0, 0.1], [0.0, 0.8, -0.5], [0.0, -0.8, -0.5]]),
            "cell": np.zeros((3, 3)),
            "pbc": np.zeros(3, dtype=bool),
            "energy": -14.2,
            "forces": np.zeros((n_atoms, 3)),
            "tags": np.zeros(n_atoms, dtype=np.uint8),
            "fixed": np.zeros(n_atoms, dtype=bool),
            "source": "water.extxyz#0",
        }
        return System(**{**values, **changes})

    return make


def assert_same_system(a, b, tolerance=0.0):
    np.testing.assert_array_equal(a.atomic_numbers, b.atomic_numbers)
    np.testing.assert_array_equal(a.pbc, b.pbc)
    np.testing.assert_array_equal(a.tags, b.tags)
    np.testing.assert_array_equal(a.fixed, b.fixed)
    for name in ("positions", "cell", "forces", "energy"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=0, atol=tolerance, err_msg=name)


@pytest.fixture
def same_system():
    """Assertion that two systems are equal; missing labels are equal to missing labels."""
    return assert_same_system
