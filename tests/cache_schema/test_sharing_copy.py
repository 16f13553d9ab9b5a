"""Stores copied whole, in part and in a narrower encoding: what goes over is what was there."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from cache_example import PROVENANCE, TEACHER, make_example, tree_digest, write_all, write_shard

from molkd.cache_schema.codebook import decode_rows, encode_rows
from molkd.cache_schema.errors import CacheError, IntegrityError
from molkd.cache_schema.fields import node_spec
from molkd.cache_schema.fitting import fit_codebook
from molkd.cache_schema.manifest import finalize
from molkd.cache_schema.overlay import create_overlay
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.verify import verify
from molkd.cache_schema.writer import Store
from molkd.pipeline.errors import ConfigError
from molkd.pipeline.sharing.copying import copy_store, send_store
from molkd.pipeline.sharing.selection import Selection

NODE = f"teachers/{TEACHER}/node"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, example):
    path = tmp_path_factory.mktemp("whole") / "a.kdcache"
    write_all(path, example)
    return path


@pytest.fixture(scope="module")
def coded(tmp_path_factory, example):
    """The same data with node in int8 and v2v in pca, fitted to its first systems; system 3 given up."""
    path = tmp_path_factory.mktemp("coded") / "c.kdcache"
    store = write_all(path, example, finish=False)
    store.add_teacher("coded", PROVENANCE)
    n_fitted = 5
    inputs = store.input_index[:n_fitted]
    rows = example.atom_rows(inputs)
    for spec, encoding in ((node_spec(4), "int8"), (store.signal(f"teachers/{TEACHER}/v2v").spec, "pca:2")):
        book = fit_codebook(example.signals[spec.name][rows], spec, encoding, n_fitted)
        group = store.add_signal("coded", spec, encoding, book)
        for shard in range(store.plan.n_shards):
            write_shard(store, example, group, shard, bad=[3] if 3 in store.systems_of_shard(shard) else ())
    return path


def assert_same_systems(copy, original, signals=None):
    """Every array of every system of the copy is the original's, bit for bit; return the places there."""
    with Cache.open(copy, complete=True) as ours, Cache.open(original) as theirs:
        place = {row.tobytes(): i for i, row in enumerate(theirs.ids)}
        places = [place[row.tobytes()] for row in ours.ids]
        for i, j in enumerate(places):
            own, other = ours[i], theirs[j]
            if signals is None:
                assert own.keys() == other.keys()
            for name, values in own.items():
                assert values.dtype == other[name].dtype
                assert values.tobytes() == other[name].tobytes(), (name, i)
            assert theirs.source_names[theirs.source[j]] == ours.source_names[ours.source[i]]
        assert theirs.source_row[places].tolist() == ours.source_row.tolist()
        for teacher, entry in ours.teachers.items():
            assert entry.provenance == theirs.teachers[teacher].provenance
            bad = {places[i] for i in ours.bad_systems(teacher)}
            assert bad == set(theirs.bad_systems(teacher)) & set(places)
    return places


def test_whole_copy_is_the_same_store(whole, tmp_path):
    summary = copy_store(whole, tmp_path / "b.kdcache")
    assert tree_digest(tmp_path / "b.kdcache" / "data.zarr") == tree_digest(whole / "data.zarr")
    for name in ("plan.json", "manifest.json"):
        assert (tmp_path / "b.kdcache" / name).read_bytes() == (whole / name).read_bytes()
    report = verify(tmp_path / "b.kdcache")
    assert report.ok
    assert not report.notes
    assert summary.encoded_anew == []
    again = copy_store(whole, tmp_path / "b.kdcache")
    assert again.bytes_written == 0


@pytest.fixture(scope="module")
def rounded(tmp_path_factory, example):
    """The same data from float64, as most files give it: float32 in the store loses something."""
    atoms = {
        name: values.astype(np.float64) * (1 + 2e-8) if values.dtype.kind == "f" else values
        for name, values in example.atoms.items()
    }
    path = tmp_path_factory.mktemp("rounded") / "r.kdcache"
    write_all(path, dataclasses.replace(example, atoms=atoms))
    return path


def figures(path):
    """Mean and errors of every array of atoms and signal."""
    with Cache.open(path) as cache:
        entries = {**cache.fields, **cache.teachers[TEACHER].signals}
    found = {
        n: [e.error_rms, e.error_max_abs, *e.statistics.mean] for n, e in entries.items() if e.statistics
    }
    assert found["positions"][0] > 0
    return found


def test_whole_copy_keeps_every_figure(rounded, tmp_path):
    copy_store(rounded, tmp_path / "b.kdcache")
    assert (tmp_path / "b.kdcache" / "manifest.json").read_bytes() == (rounded / "manifest.json").read_bytes()


@pytest.mark.parametrize("through", ["folder", "bucket"])
def test_a_copy_goes_back_to_where_the_store_is_published(rounded, s3, tmp_path, through):
    """Somebody copies a published store, adds a signal, and publishes it in the same place."""
    url = s3.url(f"{through}.kdcache")
    send_store(rounded, url)
    copy = tmp_path / "b.kdcache"
    copy_store(url if through == "bucket" else rounded, copy)
    for name, values in figures(rounded).items():
        assert figures(copy)[name] == pytest.approx(values, rel=1e-12), name
    assert send_store(copy, url).files_sent <= len(list((copy / "log").rglob("*.json")))  # no values
    store = Store.open(copy, "a")
    group = store.add_signal(TEACHER, node_spec(2, "layer/U5"), "fp32")
    for shard in range(store.plan.n_shards):
        with Cache.open(copy) as cache, store.shard_writer(group, shard) as writer:
            rows = cache.read(store.systems_of_shard(shard), (), TEACHER, ("layer/U4",))["teacher/layer/U4"]
            writer.write({"values": rows})
    finalize(store)
    send_store(copy, url)
    with Cache.open(url, complete=True) as cache:
        assert "layer/U5" in cache.teachers[TEACHER].signals
    assert verify(url).ok


def test_errors_of_a_part_are_those_measured_before(rounded, tmp_path):
    copy_store(rounded, tmp_path / "b.kdcache", selection=Selection(max_atoms=90))
    with Cache.open(tmp_path / "b.kdcache") as ours, Cache.open(rounded) as theirs:
        for name in ("positions", "forces"):
            assert ours.fields[name].error_rms == pytest.approx(theirs.fields[name].error_rms)


def test_coded_rows_go_over_without_decoding(coded, tmp_path):
    copy_store(coded, tmp_path / "b.kdcache", teacher="coded")
    ours, theirs = tree_digest(tmp_path / "b.kdcache" / "data.zarr"), tree_digest(coded / "data.zarr")
    assert ours.items() <= theirs.items()
    assert not [name for name in ours if name.startswith(f"teachers/{TEACHER}/")]
    assert_same_systems(tmp_path / "b.kdcache", coded, signals="coded")


@pytest.mark.parametrize(
    "selection",
    [Selection(max_atoms=90), Selection(random=5, seed=1), Selection(min_atoms=500)],
    ids=["small", "random", "large"],
)
def test_part_of_the_systems(coded, tmp_path, selection):
    copy = tmp_path / "b.kdcache"
    summary = copy_store(coded, copy, selection=selection)
    places = assert_same_systems(copy, coded)
    assert places == sorted(places)  # the same seed keeps the order
    assert 0 < summary.n_systems == len(places) < 12
    assert verify(copy).ok
    with Cache.open(copy) as ours, Cache.open(coded) as theirs:
        # The rows that codebooks were fitted to are still the first ones; errors are those measured before.
        assert ours.signal("coded", "node").codebook.n_systems == sum(i < 5 for i in places)
        own, other = (c.teachers["coded"].signals["node"] for c in (ours, theirs))
        assert own.error_rms == pytest.approx(other.error_rms)
        kept = np.concatenate(
            [theirs.read([i], (), "coded", ("node",))["teacher/node"] for i in places if i != 3] or [[]]
        )
        assert own.statistics.count == len(kept)
        np.testing.assert_allclose(own.statistics.mean, kept.mean(axis=0, dtype=np.float64), rtol=1e-9)
        assert ours.dataset["chosen_from"] == theirs.fingerprint
        assert ours.dataset["n_with_energy"] == np.isfinite(theirs.energy[places]).sum()


def test_signals_may_come_later(whole, tmp_path):
    copy = tmp_path / "b.kdcache"
    assert copy_store(whole, copy, signals=("node",)).signals == {"painn/node": "fp16"}
    with Cache.open(copy) as cache:
        assert list(cache.teachers[TEACHER].signals) == ["node"]
    copy_store(whole, copy)
    assert tree_digest(copy / "data.zarr") == tree_digest(whole / "data.zarr")
    assert (copy / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()


def test_structures_only(whole, tmp_path):
    copy_store(whole, tmp_path / "b.kdcache", signals=("none",))
    with Cache.open(tmp_path / "b.kdcache", complete=True) as cache:
        assert cache.teachers == {}
        assert cache.n_systems == 12


def test_narrower_encoding_says_where_it_comes_from(whole, tmp_path):
    copy = tmp_path / "b.kdcache"
    summary = copy_store(whole, copy, signals=("node", "energy"), encoding=("int8",))
    assert summary.signals == {"painn/energy": "fp64", "painn/node": "int8"}
    assert summary.encoded_anew == ["painn/node"]
    with Cache.open(copy) as ours, Cache.open(whole) as theirs:
        (before,) = ours.signal(TEACHER, "node").recoded_from
        entry = theirs.teachers[TEACHER].signals["node"]
        assert before == {"encoding": "fp16", "error_rms": pytest.approx(entry.error_rms)}
        everything = np.arange(12)
        given = theirs.read(everything, (), TEACHER, ("node",))["teacher/node"]
        found = ours.read(everything, (), TEACHER, ("node",))["teacher/node"]
        book = ours.signal(TEACHER, "node").codebook
        np.testing.assert_array_equal(found, decode_rows(*encode_rows(given, book), book))
        measured = np.sqrt(np.mean((found.astype(np.float64) - given) ** 2))
        assert ours.teachers[TEACHER].signals["node"].error_rms == pytest.approx(measured, rel=1e-5)
    # Copied once more, in part, the history stays.
    copy_store(copy, tmp_path / "c.kdcache", selection=Selection(random=4))
    with Cache.open(tmp_path / "c.kdcache") as cache:
        assert cache.signal(TEACHER, "node").recoded_from == (before,)


def test_wider_encoding_is_refused(coded, tmp_path):
    with pytest.raises(CacheError, match="larger and no more exact"):
        copy_store(coded, tmp_path / "b.kdcache", teacher="coded", encoding=("node=fp16",))
    # For all signals at once it means: where it is narrower.
    summary = copy_store(coded, tmp_path / "b.kdcache", encoding=("fp16",))
    assert summary.signals["coded/node"] == "int8"
    assert summary.signals["painn/v2v"] == "fp16"


def test_damaged_source_stops_with_its_name(whole, tmp_path):
    bad = shutil.copytree(whole, tmp_path / "bad.kdcache")
    file = bad / "data.zarr" / NODE / "values" / "c" / "1" / "0"
    raw = bytearray(file.read_bytes())
    raw[7] ^= 1
    file.write_bytes(raw)
    with pytest.raises(IntegrityError, match=rf"{NODE}/values/c/1/0.*is damaged in chunk 0"):
        copy_store(bad, tmp_path / "b.kdcache")
    assert verify(tmp_path / "b.kdcache").ok  # what is committed is sound, the shard is missing
    assert 1 in Store.open(tmp_path / "b.kdcache").missing_shards(NODE)
    raw[7] ^= 1
    file.write_bytes(raw)
    copy_store(bad, tmp_path / "b.kdcache")
    assert tree_digest(tmp_path / "b.kdcache" / "data.zarr") == tree_digest(whole / "data.zarr")


def test_index_of_a_shard_is_checked_too(whole, tmp_path):
    bad = shutil.copytree(whole, tmp_path / "bad.kdcache")
    file = bad / "data.zarr" / "atoms" / "tags" / "c" / "0"
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)
    with pytest.raises(IntegrityError, match=r"atoms/tags/c/0.*damaged index"):
        copy_store(bad, tmp_path / "b.kdcache")


def test_unfinished_source_is_refused(whole, tmp_path):
    part = shutil.copytree(whole, tmp_path / "part.kdcache")
    (part / "manifest.json").unlink()
    (part / "log" / NODE / "000001.json").unlink()
    with pytest.raises(CacheError, match=r"node is not finished, 1 of \d shards are missing"):
        copy_store(part, tmp_path / "b.kdcache")
    assert not (tmp_path / "b.kdcache").exists()
    copy_store(part, tmp_path / "b.kdcache", signals=("energy",))


def test_target_with_other_data_is_refused(whole, tmp_path):
    write_all(tmp_path / "other.kdcache", make_example([5, 6], seed=2))
    before = tree_digest(tmp_path / "other.kdcache")
    with pytest.raises(CacheError, match="holds other systems"):
        copy_store(whole, tmp_path / "other.kdcache")
    assert tree_digest(tmp_path / "other.kdcache") == before
    with pytest.raises(CacheError, match="is the store to be copied"):
        copy_store(whole, whole.parent / "." / whole.name)


def test_unfinished_target_with_another_codebook_is_refused(whole, coded, tmp_path):
    """Codes are only worth something with the codebook they were made with."""
    target = tmp_path / "b.kdcache"
    copy_store(whole, target, signals=("none",))
    with Cache.open(whole) as cache:
        values = cache.read(np.arange(12), (), TEACHER, ("node",))["teacher/node"]
    store = Store.open(target, "a")
    store.add_teacher("coded", PROVENANCE)
    store.add_signal("coded", node_spec(4), "int8", fit_codebook(values, node_spec(4), "int8", 12))
    with pytest.raises(CacheError, match="unfinished, with values from elsewhere"):
        copy_store(coded, target, teacher="coded", signals=("node",))


def test_what_does_not_exist(whole, tmp_path):
    for choice, says in (
        ({"teacher": "mace"}, "no teacher mace; it has painn"),
        ({"signals": ("e2n",)}, "no signal e2n; it has edge, energy, layer/U4, node, v2v"),
    ):
        with pytest.raises(CacheError, match=says):
            copy_store(whole, tmp_path / "b.kdcache", **choice)
    with pytest.raises(ConfigError, match="e2n is not among the signals"):
        copy_store(whole, tmp_path / "b.kdcache", encoding=("e2n=int8",))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("with_log", [True, False], ids=["log", "manifest-only"])
def test_copy_from_a_web_server_is_the_store(whole, web, tmp_path, with_log):
    served = shutil.copytree(whole, web.folder / "a.kdcache")
    if not with_log:
        shutil.rmtree(served / "log")
    copy = tmp_path / "b.kdcache"
    copy_store(web.url("a.kdcache"), copy)
    assert tree_digest(copy / "data.zarr") == tree_digest(whole / "data.zarr")
    assert (copy / "plan.json").read_bytes() == (whole / "plan.json").read_bytes()
    with Cache.open(copy) as ours, Cache.open(whole) as theirs:
        for name, entry in theirs.teachers[TEACHER].signals.items():
            own = ours.teachers[TEACHER].signals[name]
            assert own.error_rms == pytest.approx(entry.error_rms)
            np.testing.assert_allclose(own.statistics.mean, entry.statistics.mean)


def test_overlay_of_a_store_in_a_bucket(whole, s3, tmp_path):
    """What a colleague publishes, with a teacher of one's own beside it."""
    send_store(whole, s3.url("shared.kdcache"))
    mine = create_overlay(s3.url("shared.kdcache"), tmp_path / "mine.kdcache")
    store = Store.open(mine, "a")
    store.add_teacher("mine", PROVENANCE)
    group = store.add_signal("mine", node_spec(4), "fp32")
    for shard in range(store.plan.n_shards):
        with Cache.open(mine) as cache, store.shard_writer(group, shard) as writer:
            rows = cache.read(store.systems_of_shard(shard), (), TEACHER, ("node",))["teacher/node"]
            writer.write({"values": rows})
    with Cache.open(mine, complete=True) as ours, Cache.open(whole) as theirs:
        everything = np.arange(12)
        np.testing.assert_array_equal(
            ours.read(everything, (), "mine", ("node",))["teacher/node"],
            theirs.read(everything, (), TEACHER, ("node",))["teacher/node"],
        )
    assert json.loads((mine / "overlay.json").read_text())["store"] == s3.url("shared.kdcache")
