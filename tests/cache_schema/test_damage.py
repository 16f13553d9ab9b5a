"""Damage of every kind of file is found, named, and never read as values."""

import random
import re
import shutil

import numpy as np
import pytest
from cache_example import TEACHER, add_signals, create, write_shard

from molkd.cache_schema import jsonfile
from molkd.cache_schema.errors import CacheError, IntegrityError
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.verify import verify
from molkd.cache_schema.writer import Store

ALL = ("energy", "node", "v2v", "layer/U4", "edge")


def flip(path, bit):
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


def test_a_flipped_bit_in_any_file_is_found_and_named(store_path):
    files = sorted(p for p in store_path.rglob("*") if p.is_file())
    assert len(files) > 80
    random_ = random.Random(0)
    for path in files:
        bit = random_.randrange(path.stat().st_size * 8)
        flip(path, bit)
        report = verify(store_path)
        relative = path.relative_to(store_path).as_posix()
        assert not report.ok, f"{relative}, bit {bit}"
        place = re.fullmatch(r"data.zarr/((?:atoms|teachers)/.+)/c/(\d+)(/0)*", relative)
        if place:
            (problem,) = report.problems
            assert (problem.kind, problem.array, problem.shard) == ("checksum", place[1], int(place[2]))
            assert f"delete log/{place[1].split('/')[0]}" in problem.remedy
        else:
            named = {p.path for p in report.problems}
            assert any(relative.startswith(n) for n in named) or "zarr.json" in relative, (relative, named)
        flip(path, bit)
    assert verify(store_path).ok


def test_every_bit_of_the_small_files_is_covered(store_path):
    path = store_path / "log/atoms/000001.json"
    size = path.stat().st_size * 8
    (store_path / "manifest.json").unlink()  # it holds the same and would be read instead
    for bit in random.Random(1).sample(range(size), 150):
        flip(path, bit)
        with pytest.raises(IntegrityError, match=r"000001\.json"):
            Cache.open(store_path)
        flip(path, bit)


def test_the_chunk_is_named(store_path):
    cache = Cache.open(store_path)
    shard = 0
    path = store_path / "data.zarr/atoms/positions/c/0/0"
    flip(path, 8 * 12 * 100 + 5)
    (problem,) = verify(store_path).problems
    assert (problem.array, problem.shard, problem.chunk) == ("atoms/positions", shard, 0)
    with pytest.raises(
        IntegrityError, match=r"shard 0 of array atoms/positions is damaged in chunk 0.*delete log/atoms"
    ):
        cache.read([0], ("positions",))
    assert len(cache.read([0], ("forces",))["forces"])  # other arrays are sound


@pytest.mark.parametrize("signal", ALL)
def test_the_reader_refuses_any_damaged_data_byte(store_path, signal):
    folder = store_path / f"data.zarr/teachers/{TEACHER}/{signal}/values/c"
    path = next(p for p in sorted(folder.rglob("*")) if p.is_file())
    for bit in random.Random(2).sample(range(path.stat().st_size * 8), 40):
        flip(path, bit)
        cache = Cache.open(store_path)
        with pytest.raises(IntegrityError, match=rf"shard 0 of array teachers/{TEACHER}/{signal}/values"):
            cache.read(np.flatnonzero(cache.systems.shard == 0), (), TEACHER, (signal,))
        flip(path, bit)


@pytest.mark.parametrize("name", ["id", "shard", "row", "slot", "n_atoms", "energy", "cell", "pbc", "source"])
def test_a_damaged_systems_table_is_not_opened(store_path, name):
    path = next(p for p in (store_path / "data.zarr/systems" / name / "c").rglob("*") if p.is_file())
    flip(path, 9)
    with pytest.raises(IntegrityError, match=f"systems/{name} is damaged"):
        Cache.open(store_path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("data.zarr/atoms/forces/c/1/0", "missing"),
        ("log/atoms/000001.json", "record"),
        ("data.zarr/systems/energy/c/0", "systems"),
        ("data.zarr/teachers/painn/v2v/values/zarr.json", "metadata"),
        ("data.zarr/teachers/painn/zarr.json", "metadata"),
        ("data.zarr/atoms/zarr.json", "metadata"),
    ],
)
def test_missing_files_are_found(store_path, name, kind):
    (store_path / name).unlink()
    for quick in (True, False):
        report = verify(store_path, quick=quick)
        assert kind in {p.kind for p in report.problems}, report


def test_cut_off_files_are_found_without_reading_them(store_path):
    path = store_path / "data.zarr/teachers/painn/node/values/c/1/0"
    path.write_bytes(path.read_bytes()[:-1])
    (problem,) = verify(store_path, quick=True).problems
    assert (problem.kind, problem.array, problem.shard) == ("size", "teachers/painn/node/values", 1)
    cache = Cache.open(store_path)
    with pytest.raises(IntegrityError, match="bytes, expected"):
        cache.read(np.flatnonzero(cache.systems.shard == 1), (), TEACHER, ("node",))
    (store_path / "plan.json").write_bytes((store_path / "plan.json").read_bytes()[:-10])
    with pytest.raises(IntegrityError, match="cut off"):
        Cache.open(store_path)


def test_a_repaired_shard_is_sound_again(store_path, example):
    """What the remedy says: delete the record, run the command again."""
    path = store_path / "data.zarr/atoms/positions/c/1/0"
    before = path.read_bytes()
    flip(path, 77)
    (problem,) = verify(store_path).problems
    record = re.search(r"delete (\S+) and", problem.remedy)[1]
    (store_path / record).unlink()
    store = create(store_path, example)
    assert store.missing_shards("atoms") == [1]
    write_shard(store, example, "atoms", 1)
    assert path.read_bytes() == before
    assert verify(store_path).ok
    assert not (store_path / "manifest.json").exists()  # it named the shard's old record
    Cache.open(store_path, complete=True)


def test_shards_of_another_store_do_not_mix(store_path, tmp_path, example):
    other = create(tmp_path / "other.kdcache", example, seed=4)
    (other.path / "log/atoms").mkdir(parents=True)
    shutil.copy(store_path / "log/atoms/000000.json", other.path / "log/atoms/000000.json")
    with pytest.raises(IntegrityError, match="belongs to another plan"):
        Cache.open(other.path)


def test_atoms_that_are_not_the_systems_are_found(tmp_path, example):
    store = create(tmp_path / "x.kdcache", example)
    wrong = type(example)(
        example.n_atoms,
        example.system,
        {**example.atoms, "positions": example.atoms["positions"] + 1},
        {},
        example.ids,
    )
    for shard in range(store.plan.n_shards):
        write_shard(store, wrong, "atoms", shard)
    assert {p.kind for p in verify(store.path).problems} == {"identity"}


def test_left_overs_and_strangers_are_noted_not_damage(store_path):
    (store_path / "data.zarr/atoms/positions/c/0/.tmp-gone-1-ab").write_bytes(b"x")
    (store_path / "notes.txt").write_text("mine")
    (store_path / "manifest.json").unlink()
    (store_path / "log/atoms/000002.json").unlink()
    report = verify(store_path)
    assert report.ok
    kinds = [n.kind for n in report.notes]
    assert sorted(set(kinds)) == ["orphan", "temporary", "uncommitted", "unfinished"]
    assert kinds.count("uncommitted") == 5


def test_what_is_unfinished_is_one_note_per_group(tmp_path, example):
    """However many shards an interrupted command left to be written."""
    store = create(tmp_path / "x.kdcache", example)
    atoms, *signals = [*store.groups, *add_signals(store)]
    write_shard(store, example, atoms, 1)
    notes = verify(store.path).notes
    assert {n.kind for n in notes} == {"unfinished"}
    assert sorted(n.array for n in notes) == sorted([atoms, *signals])
    n_shards = store.plan.n_shards
    assert n_shards > 2
    said = next(str(n) for n in notes if n.array == atoms)
    expected = f"{n_shards - 1} of {n_shards} shards of atoms are not written yet"
    assert said == f"log/atoms: {expected}; run the command that writes them again"


def test_progress_reaches_the_end(store_path):
    calls = []
    verify(store_path, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1]
    assert calls == sorted(calls)


# ------------------------------------------------------------------------------ other formats, hostile stores


def reseal(path, change):
    document, _ = jsonfile.read_sealed(path, max_bytes=1 << 30, remedy="")
    change(document)
    path.write_bytes(jsonfile.seal(document))


def test_a_newer_format_is_refused(store_path):
    reseal(store_path / "plan.json", lambda d: d.update(format=2))
    for action in (Cache.open, Store.open, verify):
        with pytest.raises(CacheError, match="format 2, this molkd reads up to 1; update molkd"):
            action(store_path)


def test_an_unknown_encoding_is_refused(store_path):
    path = store_path / "data.zarr/teachers/painn/node/zarr.json"
    path.write_text(path.read_text().replace('"fp16"', '"lz4:64"'))
    with pytest.raises(CacheError, match="encoding 'lz4:64' is unknown, it was written by a newer version"):
        Cache.open(store_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_systems", 1 << 60),
        ("n_systems", -1),
        ("n_systems", 13),
        ("n_atoms", True),
        ("rows_per_shard", 1 << 40),
        ("rows_per_shard", 1025),
        ("systems_per_shard", 0),
        ("chunk_rows", 1),
        ("n_shards", "3"),
    ],
)
def test_absurd_sizes_allocate_nothing(store_path, key, value):
    reseal(store_path / "plan.json", lambda d: d["packing"].update({key: value}))
    with pytest.raises(IntegrityError, match=key if key != "n_systems" or value != 13 else "bytes, expected"):
        Cache.open(store_path)


def test_all_problems_of_a_record_at_once(store_path):
    (store_path / "manifest.json").unlink()

    def change(document):
        document["arrays"]["positions"]["bytes"] = 1 << 62
        document["arrays"]["forces"]["crc32c"] = "xyz"
        document["arrays"]["forces"]["sums"]["sum"] = [1e300, 2]
        document["writer"] = None

    reseal(store_path / "log/atoms/000000.json", change)
    with pytest.raises(IntegrityError) as caught:
        Cache.open(store_path)
    for place in ("arrays.positions.bytes", "arrays.forces.crc32c", "arrays.forces.sums.sum", "writer"):
        assert place in str(caught.value)


def test_links_out_of_the_store_are_not_followed(store_path, tmp_path):
    path = store_path / "data.zarr/atoms/positions/c/0/0"
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match="leads out of the store"):
        Cache.open(store_path).read([0], ("positions",))
    assert not verify(store_path).ok


def test_a_shard_rewritten_by_another_program_is_named(store_path):
    import zarr

    array = zarr.open_group(store_path / "data.zarr", mode="a")["teachers/painn/layer/U4/values"]
    array[:] = np.arange(array.size, dtype=np.float32).reshape(array.shape)
    with pytest.raises(IntegrityError, match="shard 0 of array teachers/painn/layer/U4/values"):
        Cache.open(store_path).read([0], (), TEACHER, ("layer/U4",))
    assert {p.array for p in verify(store_path).problems} == {"teachers/painn/layer/U4/values"}
