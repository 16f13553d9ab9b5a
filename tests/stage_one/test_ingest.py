"""Structures and labels into a store: what is kept, what is refused, and that order does not matter."""

import shutil
import tarfile
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase.constraints import FixAtoms
from stage_one_cases import assert_same_files, files, label, make_store, structures, write_extxyz

from molkd.cache_schema.identity import system_id
from molkd.cache_schema.jsonfile import read_sealed, seal
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.verify import verify
from molkd.pipeline.config import IngestConfig
from molkd.pipeline.data.sources import open_source
from molkd.pipeline.errors import CacheError, DataError
from molkd.pipeline.ingest import ingest

LMDB = Path(__file__).parents[1] / "data" / "lmdb" / "lmdb.tar.xz"


def id_of(atoms):
    return system_id(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc)


def by_id(store):
    """Return everything a store holds, a dictionary of arrays per content id."""
    with Cache.open(store) as cache:
        return {cache.ids[i].tobytes(): cache[i] for i in range(len(cache))}


@pytest.fixture(scope="module")
def lmdb_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lmdb")
    with tarfile.open(LMDB) as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_all_that_a_file_holds(tmp_path):
    systems = structures(40)
    systems[7].calc = None  # no labels at all
    systems[8].calc.results.pop("forces")
    systems[9].calc.results.pop("energy")
    summary = ingest(IngestConfig(data=(write_extxyz(tmp_path / "a.xyz", systems),), store=tmp_path / "s"))
    assert (summary.n_systems, summary.n_with_energy, summary.n_with_forces) == (40, 38, 38)
    assert summary.n_atoms == sum(map(len, systems))
    stored = by_id(tmp_path / "s")
    for k, atoms in enumerate(systems):
        one = stored[id_of(atoms)]
        np.testing.assert_array_equal(one["atomic_numbers"], atoms.numbers)
        np.testing.assert_allclose(
            one["positions"], atoms.positions, rtol=0, atol=1e-6
        )  # float32, file digits
        np.testing.assert_array_equal(one["pbc"][0], atoms.pbc)
        np.testing.assert_allclose(one["cell"][0], atoms.cell.array, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(one["tags"], atoms.get_tags())
        fixed = np.isin(np.arange(len(atoms)), atoms.constraints[0].index if atoms.constraints else [])
        np.testing.assert_array_equal(one["fixed"], fixed)
        if k in (7, 9):
            assert np.isnan(one["energy"]).all()
        else:
            assert one["energy"] == pytest.approx(atoms.calc.results["energy"], abs=1e-7)
        if k in (7, 8):
            assert np.isnan(one["forces"]).all()
        else:
            np.testing.assert_allclose(one["forces"], atoms.calc.results["forces"], rtol=0, atol=1e-6)


def test_order_of_files_and_systems_does_not_matter(tmp_path):
    systems = structures(90)
    a = write_extxyz(tmp_path / "a.xyz", systems[:50])
    b = write_extxyz(tmp_path / "b.xyz", systems[50:])
    reverse = write_extxyz(tmp_path / "reverse.xyz", systems[::-1])
    stores = [
        make_store(tmp_path / "ab", a, b),
        make_store(tmp_path / "ba", b, a),
        make_store(tmp_path / "reversed", reverse),
    ]
    contents = [files(store / "data.zarr") for store in stores]
    provenance = {"systems/zarr.json", "systems/source/c/0", "systems/source_row/c/0"}  # differ by right
    for content in contents[1:]:
        assert content.keys() == contents[0].keys()
        differs = {name for name in content if content[name] != contents[0][name]}
        assert differs <= provenance
    seeded = make_store(tmp_path / "seeded", a, b, seed=1)
    assert files(seeded / "data.zarr")["systems/id/c/0/0"] != contents[0]["systems/id/c/0/0"]
    assert by_id(seeded).keys() == by_id(stores[0]).keys()


def test_same_call_again_does_nothing(tmp_path):
    data = write_extxyz(tmp_path / "a.xyz", structures(30))
    store = make_store(tmp_path / "s", data)
    before = {p: p.stat().st_mtime_ns for p in store.rglob("*") if p.is_file()}
    content = files(store)
    make_store(store, data)
    assert files(store) == content
    assert {p: p.stat().st_mtime_ns for p in store.rglob("*") if p.is_file()} == before


def test_duplicates_keep_the_labelled_one(tmp_path):
    systems = structures(20)
    bare = [atoms.copy() for atoms in systems[:5]]  # copies lose their labels
    a = write_extxyz(tmp_path / "bare.xyz", bare)
    b = write_extxyz(tmp_path / "all.xyz", [*systems, systems[3]])
    summary = ingest(IngestConfig(data=(a, b), store=tmp_path / "s"))
    assert (summary.n_systems, summary.n_duplicates, summary.n_with_energy) == (20, 6, 20)
    assert summary.n_with_forces == 20


def test_conflicting_labels(tmp_path):
    systems = structures(6)
    other = systems[2].copy()
    label(other, -1.5, np.zeros((len(other), 3)))
    a = write_extxyz(tmp_path / "a.xyz", systems)
    b = write_extxyz(tmp_path / "b.xyz", [other])
    with pytest.raises(DataError, match=r"a\.xyz#2 .* and b\.xyz#0 \(-1\.500000 eV"):
        ingest(IngestConfig(data=(a, b), store=tmp_path / "s"))
    assert not (tmp_path / "s").exists()
    ingest(IngestConfig(data=(b, a), store=tmp_path / "s", on_conflict="first"))
    assert by_id(tmp_path / "s")[id_of(systems[2])]["energy"] == -1.5


def test_dropped_labels(tmp_path):
    systems = structures(30)
    labelled = write_extxyz(tmp_path / "labelled.xyz", systems[:10])
    pool = write_extxyz(tmp_path / "pool.xyz", systems[8:])  # two of them are labelled elsewhere
    summary = ingest(IngestConfig(data=(labelled,), drop_labels=(pool,), store=tmp_path / "s"))
    assert (summary.n_systems, summary.n_with_energy, summary.n_with_forces) == (30, 10, 10)
    stored = by_id(tmp_path / "s")
    for k, atoms in enumerate(systems):
        one = stored[id_of(atoms)]
        assert np.isnan(one["energy"]).all() == np.isnan(one["forces"]).all() == (k >= 10)
        np.testing.assert_array_equal(one["tags"], atoms.get_tags())


def test_required_labels(tmp_path):
    systems = structures(5)
    systems[3].calc = None
    data = write_extxyz(tmp_path / "a.xyz", systems)
    with pytest.raises(DataError, match=r"a\.xyz#3: no energy.*--energy-key.*--drop-labels"):
        ingest(IngestConfig(data=(data,), store=tmp_path / "s", require_labels=True))
    assert not (tmp_path / "s").exists()
    pool = write_extxyz(tmp_path / "pool.xyz", systems[3:4])
    given = write_extxyz(tmp_path / "given.xyz", systems[:3])
    config = IngestConfig(data=(given,), drop_labels=(pool,), store=tmp_path / "s", require_labels=True)
    assert ingest(config).n_with_energy == 3


def test_several_formats_in_one_store(tmp_path, lmdb_folder):
    extxyz = write_extxyz(tmp_path / "a.xyz", structures(10))
    database = tmp_path / "b.db"
    with ase.io.formats.open_with_compression(extxyz) as file:
        frames = ase.io.read(file, index=":4", format="extxyz")
    ase.io.write(database, structures(6, seed=9), format="db")
    lmdb = lmdb_folder / "s2ef_pyg2_y_force"
    summary = ingest(IngestConfig(data=(extxyz, database, lmdb), store=tmp_path / "s"))
    assert summary.n_systems == 10 + 6 + 32
    stored = by_id(tmp_path / "s")
    assert {id_of(atoms) for atoms in frames} <= stored.keys()
    with np.load(lmdb_folder / "labels.npz") as truth:
        energies = sorted(one["energy"].item() for key, one in stored.items() if len(one["tags"]) > 9)
        np.testing.assert_allclose(energies, np.sort(truth["y"]), rtol=0, atol=1e-9)
        n_fixed = sum(int(one["fixed"].sum()) for one in stored.values() if len(one["tags"]) > 9)
        assert n_fixed == int(truth["fixed"].sum()) > 0
        tags = np.bincount(np.concatenate([o["tags"] for o in stored.values() if len(o["tags"]) > 9]))
        np.testing.assert_array_equal(tags, np.bincount(truth["tags"]))


def test_store_as_data(tmp_path):
    systems = structures(60)
    systems[5].calc = None
    data = write_extxyz(tmp_path / "a.xyz", systems)
    first = make_store(tmp_path / "first", data)
    second = make_store(tmp_path / "second", first)
    for group in ("atoms", "systems/id", "systems/energy", "systems/cell", "systems/pbc"):
        assert_same_files(second / "data.zarr" / group, first / "data.zarr" / group)
    source = open_source(first)
    assert len(source) == 60
    source.close()


def test_another_set_of_systems_is_refused(tmp_path):
    systems = structures(12)
    store = make_store(tmp_path / "s", write_extxyz(tmp_path / "a.xyz", systems))
    content = files(store)
    more = write_extxyz(tmp_path / "more.xyz", structures(13))
    with pytest.raises(CacheError, match=r"holds other systems: 1 given .*more\.xyz#12.*choose another name"):
        make_store(store, more)
    label(systems[4], -3.0, np.zeros((len(systems[4]), 3)))
    with pytest.raises(CacheError, match="1 of its systems have other energy labels"):
        make_store(store, write_extxyz(tmp_path / "relabelled.xyz", systems))
    assert files(store) == content


def change_force(atoms):
    atoms.calc.results["forces"][1, 2] += 1e-3


def drop_forces(atoms):
    atoms.calc.results.pop("forces")


def change_tag(atoms):
    atoms.set_tags((atoms.get_tags() + 1) % 3)


def change_fixed(atoms):
    fixed = atoms.constraints[0].index if atoms.constraints else []
    atoms.set_constraint(FixAtoms(np.setdiff1d(np.arange(len(atoms)), fixed)))


@pytest.mark.parametrize("change", [change_force, drop_forces, change_tag, change_fixed])
@pytest.mark.parametrize("interrupted", [False, True])
def test_other_forces_tags_or_fixed_atoms_are_refused(tmp_path, change, interrupted):
    """Same structures and energies: what is stored stays, and nobody is told that the new labels are."""
    systems = structures(240)
    data = write_extxyz(tmp_path / "a.xyz", systems)
    store = make_store(tmp_path / "s", data)
    if interrupted:  # as after a kill behind the first shard
        (store / "manifest.json").unlink()
        (store / "log" / "atoms" / "000001.json").unlink()
    content = files(store)
    change(systems[100])
    other = write_extxyz(tmp_path / "other.xyz", systems)
    with pytest.raises(CacheError, match=r"other forces, tags or fixed atoms .*choose another name"):
        make_store(store, other)
    assert files(store) == content
    make_store(store, data)
    assert verify(store).ok
    assert by_id(store)[id_of(systems[100])]["tags"].shape == (len(systems[100]),)


def test_the_hash_of_labels_ignores_order_and_signs_of_zero(tmp_path):
    systems = structures(20)
    systems[3].calc.results["forces"][:] = 0.0
    forwards = write_extxyz(tmp_path / "a.xyz", systems)
    systems[3].calc.results["forces"][:] = -0.0
    backwards = write_extxyz(tmp_path / "b.xyz", systems[::-1])
    store = make_store(tmp_path / "s", forwards)
    content = files(store)
    make_store(store, backwards)
    assert files(store) == content


def test_an_interrupted_call_continues_with_files_in_another_order(tmp_path):
    systems = structures(240)
    a, b = (
        write_extxyz(tmp_path / f"{n}.xyz", part) for n, part in (("a", systems[:90]), ("b", systems[90:]))
    )
    store = make_store(tmp_path / "s", a, b)
    content = files(store / "data.zarr")
    (store / "manifest.json").unlink()
    (store / "log" / "atoms" / "000001.json").unlink()
    make_store(store, b, a)
    assert files(store / "data.zarr") == content
    assert verify(store).ok


def test_the_summary_is_the_stores(tmp_path):
    """A store that was not made by ingest has no hash of its labels; its own numbers are reported."""
    systems = structures(12)
    drop_forces(systems[2])
    data = write_extxyz(tmp_path / "a.xyz", systems)
    store = make_store(tmp_path / "s", data)
    plan, _ = read_sealed(store / "plan.json", max_bytes=1 << 20, remedy="")
    assert plan["dataset"].pop("labels_sha256")
    plan["dataset"]["n_with_forces"] = 999
    shutil.rmtree(store / "log")
    (store / "manifest.json").unlink()
    (store / "log").mkdir()
    (store / "plan.json").write_bytes(seal(plan))
    summary = ingest(IngestConfig(data=(data,), store=store))
    assert (summary.n_systems, summary.n_with_energy, summary.n_with_forces) == (12, 12, 11)
    assert summary.n_atoms == sum(map(len, systems))


@pytest.mark.parametrize("what", ["positions", "forces"])
def test_file_that_changes_while_it_is_read(tmp_path, monkeypatch, what):
    """Structures are looked at twice; what was checked and what is written has to be the same."""
    data = write_extxyz(tmp_path / "a.xyz", structures(12))
    source = open_source(data)
    original = type(source).read
    source.close()
    n_read = 0

    def read(self, index):
        nonlocal n_read
        n_read += 1
        system = original(self, index)
        if n_read > 12:
            getattr(system, what)[0] += 1.0
        return system

    monkeypatch.setattr(type(source), "read", read)
    with pytest.raises(DataError, match=r"a\.xyz#\d+: changed while it was being read"):
        make_store(tmp_path / "s", data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": (0, 0, np.nan)}, r"#2: positions of atoms 0 are NaN or infinite"),
        ({"positions": (0, 1, np.inf)}, r"#2: positions of atoms 0 are NaN or infinite"),
        ({"cell": 0.0}, r"#2: it is periodic along abc, but these lattice vectors are zero"),
        ({"coincide": True}, r"#2: atoms 0 and 1 are closer than 0\.01 A"),
    ],
    ids=["NaN", "infinite", "zero cell", "coinciding atoms"],
)
def test_system_without_sense(tmp_path, change, message):
    systems = structures(4, labelled=False)
    atoms = systems[2]
    if "positions" in change:
        row, column, value = change["positions"]
        atoms.positions[row, column] = value
    elif "cell" in change:
        atoms.pbc = True
    else:
        atoms.positions[1] = atoms.positions[0]
    data = tmp_path / "a.traj"  # extxyz drops a cell of zeros
    ase.io.write(data, systems)
    with pytest.raises(DataError, match=message):
        make_store(tmp_path / "s", data)
    assert not (tmp_path / "s").exists()
