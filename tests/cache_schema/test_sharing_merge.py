"""Stores merged: parts of one data set, several data sets, and what must not be mixed."""

import numpy as np
import pytest
from cache_example import PROVENANCE, TEACHER, create, make_example, tree_digest, write_all, write_shard

from molkd.cache_schema.errors import CacheError
from molkd.cache_schema.fields import node_spec
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.verify import verify
from molkd.pipeline.errors import DataError
from molkd.pipeline.sharing.copying import copy_store
from molkd.pipeline.sharing.merging import merge_stores
from molkd.pipeline.sharing.selection import Selection


@pytest.fixture(scope="module")
def whole(tmp_path_factory, example):
    path = tmp_path_factory.mktemp("whole") / "a.kdcache"
    write_all(path, example)
    return path


@pytest.fixture(scope="module")
def halves(whole, tmp_path_factory):
    """Two overlapping parts of the data set: at most 90 atoms, at least 17."""
    folder = tmp_path_factory.mktemp("halves")
    copy_store(whole, folder / "small.kdcache", selection=Selection(max_atoms=90))
    copy_store(whole, folder / "large.kdcache", selection=Selection(min_atoms=17))
    return folder / "small.kdcache", folder / "large.kdcache"


def values(path, signal):
    """Values by id."""
    with Cache.open(path, complete=True) as cache:
        return {
            row.tobytes(): cache.read([i], (), TEACHER, (signal,))[f"teacher/{signal}"]
            for i, row in enumerate(cache.ids)
        }


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for key in found:
        np.testing.assert_array_equal(found[key], expected[key])


def test_signals_that_several_people_made(whole, tmp_path):
    """The same plan, other signals: the result is the store that one person would have made."""
    copy_store(whole, tmp_path / "anna.kdcache", signals=("node", "energy"))
    copy_store(whole, tmp_path / "ben.kdcache", signals=("v2v", "layer/U4", "edge"))
    merge_stores([tmp_path / "anna.kdcache", tmp_path / "ben.kdcache"], tmp_path / "both.kdcache")
    assert tree_digest(tmp_path / "both.kdcache" / "data.zarr") == tree_digest(whole / "data.zarr")
    for name in ("plan.json", "manifest.json"):
        assert (tmp_path / "both.kdcache" / name).read_bytes() == (whole / name).read_bytes()


def test_shards_that_several_people_made(whole, example, tmp_path):
    paths = []
    for part in range(2):
        store = create(tmp_path / f"{part}.kdcache", example)
        for shard in range(store.plan.n_shards):
            write_shard(store, example, "atoms", shard)
        store.add_teacher(TEACHER, PROVENANCE)
        group = store.add_signal(TEACHER, node_spec(4), "fp16")
        for shard in range(part, store.plan.n_shards, 2):
            write_shard(store, example, group, shard)
        paths.append(store.path)
    merge_stores(paths, tmp_path / "both.kdcache")
    assert_equal(values(tmp_path / "both.kdcache", "node"), values(whole, "node"))
    with pytest.raises(CacheError, match=r"painn/node: missing for \d+ of the systems of .*0.kdcache"):
        merge_stores([paths[0], paths[0]], tmp_path / "one.kdcache", signals=("node",))
    summary = merge_stores([paths[0], paths[0]], tmp_path / "one.kdcache")
    assert summary.signals == {}
    assert "painn/node: missing for" in summary.left_out[0]


def test_overlapping_parts(whole, halves, tmp_path):
    summary = merge_stores(halves, tmp_path / "m.kdcache")
    assert (summary.n_systems, summary.n_duplicates) == (12, 4)
    assert verify(tmp_path / "m.kdcache").ok
    for signal in ("node", "v2v", "energy", "layer/U4", "edge"):
        assert_equal(values(tmp_path / "m.kdcache", signal), values(whole, signal))
    with Cache.open(tmp_path / "m.kdcache") as ours, Cache.open(whole) as theirs:
        assert ours.fingerprint == theirs.fingerprint
        assert ours.dataset["licence"] == "CC0-1.0"
        own, other = (c.teachers[TEACHER].signals["node"] for c in (ours, theirs))
        np.testing.assert_allclose(own.statistics.mean, other.statistics.mean)


def test_same_codebook_means_the_same_codes(whole, tmp_path):
    copy_store(whole, tmp_path / "i.kdcache", signals=("node", "v2v"), encoding=("node=int8", "v2v=pca:2"))
    for name, choice in (("s", Selection(max_atoms=90)), ("l", Selection(min_atoms=17))):
        copy_store(tmp_path / "i.kdcache", tmp_path / f"{name}.kdcache", selection=choice)
    summary = merge_stores([tmp_path / "s.kdcache", tmp_path / "l.kdcache"], tmp_path / "m.kdcache")
    assert summary.encoded_anew == []
    for signal in ("node", "v2v"):
        assert_equal(values(tmp_path / "m.kdcache", signal), values(tmp_path / "i.kdcache", signal))


def test_other_codebooks_are_fitted_anew(whole, halves, tmp_path):
    parts = []
    for k, half in enumerate(halves):
        parts.append(tmp_path / f"{k}.kdcache")
        copy_store(half, parts[-1], signals=("node",), encoding=("int8",))
    summary = merge_stores(parts, tmp_path / "m.kdcache")
    assert summary.encoded_anew == ["painn/node"]
    exact = values(whole, "node")
    for key, found in values(tmp_path / "m.kdcache", "node").items():
        assert np.sqrt(np.mean((found - exact[key]) ** 2)) < 0.02
    with Cache.open(tmp_path / "m.kdcache") as cache:
        assert [one["encoding"] for one in cache.signal(TEACHER, "node").recoded_from] == ["fp16", "int8"]


def test_other_encodings_need_a_choice(halves, tmp_path):
    copy_store(halves[0], tmp_path / "i.kdcache", signals=("node",), encoding=("int8",))
    parts = [tmp_path / "i.kdcache", halves[1]]
    with pytest.raises(CacheError, match="hold node as int8 and fp16; choose one: --encoding node=int8"):
        merge_stores(parts, tmp_path / "m.kdcache", signals=("node",))
    summary = merge_stores(parts, tmp_path / "m.kdcache", signals=("node",), encoding=("int8",))
    assert summary.signals == {"painn/node": "int8"}


def test_a_system_that_one_teacher_run_gave_up(example, tmp_path):
    paths = []
    for part in range(2):
        store = create(tmp_path / f"{part}.kdcache", example)
        for shard in range(store.plan.n_shards):
            write_shard(store, example, "atoms", shard)
        store.add_teacher(TEACHER, PROVENANCE)
        group = store.add_signal(TEACHER, node_spec(4), "fp16")
        bad = [4, 7] if part == 0 else [7]
        for shard in range(store.plan.n_shards):
            write_shard(
                store, example, group, shard, bad=[i for i in bad if i in store.systems_of_shard(shard)]
            )
        paths.append(store.path)
    merge_stores(paths, tmp_path / "both.kdcache")
    with Cache.open(tmp_path / "both.kdcache") as cache:
        assert cache.bad_systems(TEACHER).tolist() == [7]
        assert np.isfinite(cache.read([4], (), TEACHER, ("node",))["teacher/node"]).all()


def test_teachers_of_one_name_with_other_weights(example, tmp_path):
    for k in range(2):
        store = write_all(tmp_path / f"{k}.kdcache", make_example([5, 6 + k], seed=k), finish=False)
        store.add_teacher("same", PROVENANCE | {"weights_sha256": f"{k}{k}" * 32})
    parts = [tmp_path / "0.kdcache", tmp_path / "1.kdcache"]
    with pytest.raises(CacheError, match=r"1.kdcache: its teacher same is another one.*--name"):
        merge_stores(parts, tmp_path / "m.kdcache")
    assert not (tmp_path / "m.kdcache").exists()
    merge_stores(parts, tmp_path / "m.kdcache", teacher=TEACHER)  # the one that both have
    assert merge_stores(parts, tmp_path / "bare.kdcache", signals=("none",)).signals == {}


def named_store(path, seed, **encodings):
    """Two systems, and the same teacher's `node` under each of some names."""
    data = make_example([5 + seed, 30], seed=seed)
    store = create(path, data)
    write_shard(store, data, "atoms", 0)
    for name, encoding in encodings.items():
        store.add_teacher(name, PROVENANCE)
        write_shard(store, data, store.add_signal(name, node_spec(4), encoding), 0)
    return path


@pytest.mark.parametrize("teacher", [None, "painn", "again"])
def test_the_same_teacher_under_two_names(tmp_path, teacher):
    parts = [
        named_store(tmp_path / "0.kdcache", 0, painn="fp16"),
        named_store(tmp_path / "1.kdcache", 1, again="fp16"),
    ]
    summary = merge_stores(parts, tmp_path / "m.kdcache", teacher=teacher)
    assert summary.signals == {f"{teacher or 'painn'}/node": "fp16"}
    assert (summary.n_systems, summary.left_out) == (4, [])


def test_a_store_with_one_teacher_under_two_names(tmp_path):
    """What one store tells apart is not mixed, and nothing goes unsaid."""
    first = named_store(tmp_path / "0.kdcache", 0, one="fp32", two="fp16")
    alike = named_store(tmp_path / "1.kdcache", 1, one="fp32", two="fp16")
    other = named_store(tmp_path / "2.kdcache", 2, three="fp32")
    summary = merge_stores([first, alike], tmp_path / "a.kdcache")
    assert summary.signals == {"one/node": "fp32", "two/node": "fp16"}
    for parts in ([first, other], [other, first]):
        name = "three" if parts[0] == other else "one"
        target = tmp_path / f"{name}.kdcache"
        summary = merge_stores(parts, target)
        assert summary.signals == {f"{name}/node": "fp32"}
        (left_out,) = summary.left_out
        assert left_out == f"two/node: missing for 2 of the systems of {other}"
    # Named, it is the only one that counts in a store that has it.
    summary = merge_stores([other, first], tmp_path / "t.kdcache", teacher="two", encoding=("node=fp16",))
    assert (summary.signals, summary.left_out) == ({"two/node": "fp16"}, [])


@pytest.mark.parametrize("field", ["energy", "forces", "tags", "fixed"])
def test_contradicting_labels(field, tmp_path):
    """The same systems; of the second store one label is another."""
    data = make_example([5, 30, 8, 9], seed=3)
    write_all(tmp_path / "a.kdcache", data)
    other = make_example([5, 30, 8, 9], seed=3)
    if field == "energy":
        other.system["energy"][1] += 0.1
    elif field == "forces":
        other.atoms["forces"][20, 1] += 0.1
    else:
        other.atoms[field][20] = 1 - other.atoms[field][20]
    write_all(tmp_path / "b.kdcache", other)
    parts = [tmp_path / "a.kdcache", tmp_path / "b.kdcache"]
    with pytest.raises(DataError, match=r"b.kdcache: b.extxyz#0"):
        merge_stores(parts, tmp_path / "m.kdcache")
    assert not (tmp_path / "m.kdcache").exists()
    merge_stores(parts, tmp_path / "m.kdcache", on_conflict="first")
    with Cache.open(tmp_path / "m.kdcache") as ours, Cache.open(tmp_path / "a.kdcache") as theirs:
        for name in ("forces", "tags", "fixed", "energy"):
            everything = np.arange(4)
            np.testing.assert_array_equal(
                ours.read(everything, (name,))[name], theirs.read(everything, (name,))[name]
            )


def test_labels_win_over_their_absence(tmp_path):
    bare = make_example([5, 30, 8], seed=3)
    bare.system["energy"][:] = np.nan
    bare.atoms["forces"][:] = np.nan
    write_all(tmp_path / "bare.kdcache", bare)
    write_all(tmp_path / "full.kdcache", make_example([5, 30, 8], seed=3))
    merge_stores([tmp_path / "bare.kdcache", tmp_path / "full.kdcache"], tmp_path / "m.kdcache")
    with Cache.open(tmp_path / "m.kdcache") as ours, Cache.open(tmp_path / "full.kdcache") as theirs:
        np.testing.assert_array_equal(ours.energy, theirs.energy)
        assert ours.dataset["n_with_forces"] == 2  # the first system of every example has none
