"""Every OC20 layout against the plain arrays it was made from, and damaged files."""

import json
import pickle
import zlib
from pathlib import Path

import lmdb
import numpy as np
import pytest

from molkd.pipeline.data.aselmdb import AseLmdbReader
from molkd.pipeline.data.lmdb_file import LmdbFile
from molkd.pipeline.data.oc20_lmdb import Oc20LmdbReader
from molkd.pipeline.data.sources import open_source
from molkd.pipeline.errors import DataError

PICKLED = ["s2ef_pyg1_y_force", "s2ef_pyg2_y_force", "s2ef_fairchem110", "s2ef_fairchem110_edges"]
ASE = ["s2ef.aselmdb", "s2ef_fairchem19.aselmdb"]
FLOAT32 = 4e-6  # A, eV/A: rounding of float32 at 25 A, after wrapping


def read_with_ids(folder, layout):
    """Yield (sid, fid), System for each system of a layout."""
    path = folder / layout
    files = sorted(path.glob("*.lmdb")) if path.is_dir() else [path]
    source = open_source(path)
    index = 0
    for file in files:
        reader = Oc20LmdbReader(file) if layout in PICKLED else AseLmdbReader(file)
        for k in range(len(reader)):
            numbers = reader.record(k).energies
            yield (int(numbers["sid"]), int(numbers["fid"])), source.read(index)
            index += 1
        reader.close()
    assert index == len(source)
    source.close()


@pytest.mark.parametrize("layout", PICKLED + ASE)
def test_layout_equals_truth(lmdb_folder, truth, layout):
    seen = set()
    for ids, system in read_with_ids(lmdb_folder, layout):
        seen.add(ids)
        true = truth[ids]
        np.testing.assert_array_equal(system.atomic_numbers, true["Z"])
        np.testing.assert_array_equal(system.tags, true["tags"])
        np.testing.assert_array_equal(system.fixed, true["fixed"] == 1)
        assert system.pbc.all()
        assert system.energy == pytest.approx(true["y"], abs=1e-9)
        np.testing.assert_allclose(system.cell, true["cell"], rtol=0, atol=FLOAT32)
        np.testing.assert_allclose(system.forces, true["force"], rtol=0, atol=FLOAT32)
        shifts = (system.positions - true["pos"]) @ np.linalg.inv(true["cell"])
        np.testing.assert_allclose(
            shifts, np.round(shifts), atol=1e-6
        )  # fairchem 1.10 wraps atoms into the cell
        if "fairchem110" not in layout:
            np.testing.assert_allclose(system.positions, true["pos"], rtol=0, atol=FLOAT32)
    assert seen == set(truth)


def test_folder_reads_shards_in_order_of_name_and_at_random(lmdb_folder):
    source = open_source(lmdb_folder / "s2ef_pyg1_y_force")
    order = np.random.default_rng(0).permutation(len(source))
    names = {int(i): source.read(int(i)).source for i in order}
    assert [names[i] for i in (0, 16, 17, 31)] == [
        "data.0000.lmdb#0", "data.0000.lmdb#16", "data.0001.lmdb#0", "data.0001.lmdb#14",
    ]  # fmt: skip
    with pytest.raises(IndexError):
        source.read(32)
    source.close()


def test_one_file_in_two_sources(lmdb_folder):
    path = lmdb_folder / "s2ef_pyg2_y_force" / "data.0000.lmdb"
    first, second = open_source(path), open_source(path.parent)
    first.close()
    assert second.read(3).n_atoms == 29
    second.close()
    lmdb.open(str(path), subdir=False, readonly=True, lock=False).close()  # the last user really closed it
    with pytest.raises(DataError, match="closed"):
        second.read(3)


@pytest.mark.parametrize("n_bytes", [0, 10, 4096, 8192, 81920, -1])
@pytest.mark.parametrize("layout", ["s2ef_pyg2_y_force/data.0000.lmdb", "s2ef.aselmdb"])
def test_truncated_file(lmdb_folder, tmp_path, layout, n_bytes):
    path = tmp_path / f"cut{Path(layout).suffix}"
    path.write_bytes((lmdb_folder / layout).read_bytes()[:n_bytes])
    with pytest.raises(DataError, match=r"cut.*(not an LMDB file|cannot be opened|cut off).*Copy it again"):
        open_source(path)


def test_not_lmdb(tmp_path):
    path = tmp_path / "data.lmdb"
    path.write_text("hello " * 10000)
    with pytest.raises(DataError, match="not an LMDB file"):
        open_source(path)


def test_folder_without_lmdb(tmp_path):
    with pytest.raises(DataError, match=r"without \.lmdb"):
        open_source(tmp_path)


def test_one_bad_shard_closes_the_others(lmdb_folder, tmp_path):
    good = tmp_path / "a.lmdb"
    good.write_bytes((lmdb_folder / "s2ef_pyg2_y_force/data.0000.lmdb").read_bytes())
    (tmp_path / "b.lmdb").write_bytes(b"no")
    with pytest.raises(DataError, match=r"b\.lmdb"):
        open_source(tmp_path)
    lmdb.open(str(good), subdir=False, readonly=True, lock=False).close()


def test_empty_lmdb(tmp_path, write_lmdb):
    with pytest.raises(DataError, match="no systems"):
        open_source(write_lmdb(tmp_path / "e.lmdb", {}))


def test_without_length_all_keys_count(lmdb_folder, tmp_path, write_lmdb):
    record = first_record(lmdb_folder)
    source = open_source(write_lmdb(tmp_path / "a.lmdb", {b"0": record, b"1": record}))
    assert len(source) == 2
    source.close()


def test_missing_key_and_damaged_record(lmdb_folder, tmp_path, write_lmdb):
    record = first_record(lmdb_folder)
    values = {b"0": record, b"1": record[: len(record) // 2], b"length": pickle.dumps(3)}
    source = open_source(write_lmdb(tmp_path / "a.lmdb", values))
    with pytest.raises(DataError, match=r"a\.lmdb, key 2: missing"):
        source.read(2)
    with pytest.raises(DataError, match=r"a\.lmdb, key 1: .*pickle"):
        source.read(1)
    assert source.read(0).n_atoms == 29
    source.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch_geometric's own
def test_labels_missing_in_test_set(tmp_path, write_lmdb, lmdb_folder):
    """OC20's test LMDBs have no labels: NaN, not zero."""
    from torch_geometric.data import Data

    record = Data(**plain_attributes(lmdb_folder, drop=("y", "force")))
    path = write_lmdb(tmp_path / "t.lmdb", {b"0": pickle.dumps(record)})
    source = open_source(path)
    system = source.read(0)
    assert system.pbc.all()
    assert np.isnan(system.energy)
    assert np.isnan(system.forces).all()
    assert system.forces.shape == (29, 3)
    source.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch_geometric's own
@pytest.mark.parametrize("keep_cell", [True, False])
def test_molecule_without_cell(tmp_path, write_lmdb, lmdb_folder, keep_cell):
    from torch_geometric.data import Data

    attributes = plain_attributes(lmdb_folder, drop=("tags", "fixed", *(() if keep_cell else ("cell",))))
    if keep_cell:
        attributes["cell"] *= 0
    source = open_source(write_lmdb(tmp_path / "m.lmdb", {b"0": pickle.dumps(Data(**attributes))}))
    system = source.read(0)
    assert not system.pbc.any()
    assert not system.cell.any()
    assert not system.tags.any()
    assert not system.fixed.any()
    source.close()


def test_not_an_s2ef_record(tmp_path, write_lmdb):
    for k, (value, message) in enumerate(
        [({"x": 1.0}, "no pos and no atomic_numbers"), ([1], "expected a torch_geo")]
    ):
        path = write_lmdb(tmp_path / f"{k}.lmdb", {b"0": pickle.dumps(value)})
        with pytest.raises(DataError, match=rf"{k}\.lmdb, key 0: {message}"):
            open_source(path)


def test_arrays_that_do_not_fit_together(tmp_path, write_lmdb):
    record = {"pos": np.zeros((3, 3)), "atomic_numbers": np.array([1.0, 2.5]), "tags": np.zeros(2)}
    path = write_lmdb(tmp_path / "a.lmdb", {b"0": pickle.dumps(record, protocol=4)})
    with pytest.raises(DataError, match=r"a\.lmdb#0: positions have shape \(3, 3\), expected \(2, 3\)"):
        read_first(path)
    record["pos"] = np.zeros((2, 3))
    path = write_lmdb(tmp_path / "b.lmdb", {b"0": pickle.dumps(record, protocol=4)})
    with pytest.raises(DataError, match=r"b\.lmdb#0: atomic numbers must be whole numbers"):
        read_first(path)


def read_first(path):
    source = open_source(path)
    try:
        return source.read(0)
    finally:
        source.close()


def test_named_labels(lmdb_folder):
    path = lmdb_folder / "s2ef_pyg2_y_force"
    with pytest.raises(DataError, match=r"no energy label 'E'.*keys that fit: fid, natoms, sid, y"):
        open_source(path, energy_key="E")
    with pytest.raises(DataError, match=r"no forces label 'F'.*keys that fit: force\."):
        open_source(path, forces_key="F")
    source = open_source(path, energy_key="natoms")
    assert source.read(0).energy == 29.0
    source.close()


def test_deleted_rows_are_skipped(lmdb_folder, tmp_path, write_lmdb):
    file = LmdbFile(lmdb_folder / "s2ef.aselmdb")
    values = {b"%d" % k: file.get(b"%d" % k) for k in (1, 3)}
    file.close()
    values |= {b"nextid": zlib.compress(b"4"), b"deleted_ids": zlib.compress(json.dumps([2]).encode())}
    source = open_source(write_lmdb(tmp_path / "d.aselmdb", values))
    assert len(source) == 2
    assert [source.read(i).energy for i in range(2)] == [pytest.approx(0.5910352), pytest.approx(-0.31898311)]
    source.close()


@pytest.mark.parametrize("row", [b"{}", b"[]", b"null", b'{"numbers": "x", "positions": 3}', b"{"])
def test_bad_ase_row(tmp_path, write_lmdb, row):
    path = write_lmdb(tmp_path / "b.aselmdb", {b"1": zlib.compress(row), b"nextid": zlib.compress(b"2")})
    with pytest.raises(DataError, match=r"b\.aselmdb, key 1"):
        open_source(path)


def first_record(folder):
    file = LmdbFile(folder / "s2ef_pyg2_y_force" / "data.0000.lmdb")
    record = file.get(b"0")
    file.close()
    return record


def plain_attributes(folder, drop=()):
    import torch

    from molkd.pipeline.data.restricted_unpickler import load_record

    attributes = load_record(first_record(folder), "test")
    return {
        k: torch.from_numpy(v.copy()) if isinstance(v, np.ndarray) else v
        for k, v in attributes.items()
        if k not in drop
    }
