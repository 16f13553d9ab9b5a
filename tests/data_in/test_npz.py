"""COLL's npz layout."""

import numpy as np
import pytest

from molkd.pipeline.data.sources import open_source
from molkd.pipeline.errors import DataError


@pytest.fixture
def arrays():
    return {
        "R": np.arange(15.0, dtype=np.float32).reshape(5, 3),
        "Z": np.array([8, 1, 1, 6, 8]),
        "N": np.array([3, 2]),
        "E": np.array([-1.5, -2.5]),
        "F": -np.arange(15.0).reshape(5, 3),
    }


def test_systems(tmp_path, arrays):
    path = tmp_path / "coll.npz"
    np.savez(path, **arrays, id=np.array([7, 8]), name=np.array(["a", "b"]))
    source = open_source(path)
    assert len(source) == 2
    carbon_monoxide, water = source.read(1), source.read(0)
    assert water.atomic_numbers.tolist() == [8, 1, 1]
    assert carbon_monoxide.atomic_numbers.tolist() == [6, 8]
    np.testing.assert_array_equal(carbon_monoxide.positions, [[9, 10, 11], [12, 13, 14]])
    np.testing.assert_array_equal(carbon_monoxide.forces, [[-9, -10, -11], [-12, -13, -14]])
    assert (water.energy, carbon_monoxide.energy) == (-1.5, -2.5)
    assert not water.pbc.any()
    assert carbon_monoxide.source == "coll.npz#1"
    source.close()


def test_energy_column_and_missing_forces(tmp_path, arrays):
    del arrays["F"]
    arrays["E"] = arrays["E"][:, None]
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    source = open_source(tmp_path / "a.npz")
    assert source.read(1).energy == -2.5
    assert np.isnan(source.read(1).forces).all()
    source.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"Z": None}, "no array Z"),
        ({"N": np.array([3, 3])}, r"R has shape \(5, 3\), expected \(6, 3\); Z has"),
        ({"N": np.array([6, -1])}, "N must be one count"),
        ({"E": np.zeros(3)}, r"E has shape \(3,\), expected \(2,\) or \(2, 1\)"),
        ({"F": np.zeros((5, 2))}, "F has shape"),
        ({"R": np.array([{}, 1], dtype=object)}, "not a readable npz.*pickles are refused"),
    ],
)
def test_wrong_content(tmp_path, arrays, changes, message):
    path = tmp_path / "a.npz"
    np.savez(path, **{k: v for k, v in (arrays | changes).items() if v is not None})
    with pytest.raises(DataError, match=rf"a\.npz: {message}"):
        open_source(path)


def test_truncated(tmp_path, arrays):
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    data = path.read_bytes()
    for n_bytes in (0, 10, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:n_bytes])
        with pytest.raises(DataError, match=r"a\.npz: not a readable npz"):
            open_source(path)
