"""What write_extxyz writes, ASE and our own reader read back."""

import ase.io
import numpy as np
import pytest

from molkd.pipeline.data.sources import open_source
from molkd.pipeline.data.write import write_extxyz
from molkd.pipeline.errors import DataError

PREDICTION = {"energy": -14.1, "forces": np.full((3, 3), 0.25)}


def test_round_trip(tmp_path, make_system, same_system):
    systems = [
        make_system(),
        make_system(
            cell=np.diag([9.0, 9, 9]),
            pbc=np.ones(3, bool),
            tags=np.array([0, 1, 2], np.uint8),
            fixed=np.array([True, False, False]),
            energy=np.nan,
            forces=np.full((3, 3), np.nan),
        ),
        make_system(forces=np.full((3, 3), np.nan)),
    ]
    path = tmp_path / "out.extxyz"
    assert write_extxyz(path, iter(systems), [PREDICTION, {"energy": 1.0}, PREDICTION]) == 3
    source = open_source(path)
    for i, system in enumerate(systems):
        same_system(source.read(i), system, tolerance=1e-8)
    source.close()
    frames = ase.io.read(path, ":")
    assert frames[0].info["pred_energy"] == -14.1
    assert frames[0].info["source"] == "water.extxyz#0"
    np.testing.assert_array_equal(frames[0].arrays["pred_forces"], PREDICTION["forces"])
    assert frames[1].calc is None
    assert "pred_forces" not in frames[1].arrays
    source = open_source(path, energy_key="pred_energy", forces_key="pred_forces")
    assert source.read(2).energy == -14.1
    source.close()


def test_failure_leaves_the_old_file(tmp_path, make_system):
    path = tmp_path / "out.extxyz"
    path.write_text("old")
    with pytest.raises(ValueError, match="zip"):
        write_extxyz(path, [make_system()] * 2, [PREDICTION])
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out.extxyz"]


def test_unwritable_place(tmp_path, make_system):
    with pytest.raises(DataError, match="cannot be written"):
        write_extxyz(tmp_path / "no" / "out.extxyz", [make_system()], [PREDICTION])
