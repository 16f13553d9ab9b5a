"""Signals in fitted encodings in a store: written, read, recorded, damaged, read by zarr-python alone."""

import json
import shutil

import numpy as np
import pytest
import zarr
from cache_example import PROVENANCE, TEACHER, create, make_example, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st

from molkd.cache_schema.commit import read_commit
from molkd.cache_schema.errors import CacheError, IntegrityError
from molkd.cache_schema.fields import edge_spec, node_spec, v2v_spec
from molkd.cache_schema.fitting import fit_codebook
from molkd.cache_schema.manifest import finalize
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.verify import verify
from molkd.cache_schema.writer import Store

N_FITTED = 9  # systems
CASES = [(node_spec(4), "int8"), (v2v_spec(3), "pca:2"), (node_spec(2, "layer/U4"), "pca:2"),
         (edge_spec(2, max_per_atom=3), "int8")]  # fmt: skip


def stored(example, store, spec):
    """Rows of a signal in stored order, one system after the other."""
    inputs = store.input_index
    if spec.axis == "edge":
        return example.edges_of(inputs)["values"]
    return example.signals[spec.name][example.atom_rows(inputs)]


def rows_of_systems(example, store, spec, n_systems):
    n = example.edges["n_edges"] if spec.axis == "edge" else example.n_atoms
    return int(n[store.input_index[:n_systems]].sum())


@pytest.fixture(scope="module")
def example():
    return make_example(np.random.default_rng(5).integers(1, 60, 90), seed=6)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, example):
    return fill(tmp_path_factory.mktemp("fitted") / "x.kdcache", example)


def fill(path, example, pieces=3):
    store = create(path, example)
    for shard in store.missing_shards("atoms"):
        write_shard(store, example, "atoms", shard)
    store.add_teacher(TEACHER, PROVENANCE)
    for spec, encoding in CASES:
        rows = stored(example, store, spec)[: rows_of_systems(example, store, spec, N_FITTED)]
        group = store.add_signal(TEACHER, spec, encoding, fit_codebook(rows, spec, encoding, N_FITTED))
        for shard in store.missing_shards(group):
            write_shard(store, example, group, shard, pieces=pieces)
    finalize(store)
    return store


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished.path, tmp_path / "x.kdcache")
    return tmp_path / "x.kdcache"


@pytest.mark.parametrize(("spec", "encoding"), CASES)
def test_what_is_read_is_what_was_given_within_the_recorded_error(finished, example, spec, encoding):
    with Cache.open(finished.path) as cache:
        order = np.random.default_rng(0).permutation(cache.n_systems)
        read = cache.read(order, (), TEACHER, (spec.name,))[f"teacher/{spec.name}"]
        entry = cache.teachers[TEACHER].signals[spec.name]
    back = create(finished.path, example)  # the same store, opened: it knows where each system came from
    inputs = back.input_index[order]
    given_rows = (
        example.edges_of(inputs)["values"]
        if spec.axis == "edge"
        else example.signals[spec.name][example.atom_rows(inputs)]
    )
    error = read.astype(np.float64) - given_rows
    assert entry.encoding == encoding
    assert np.abs(error).max() == pytest.approx(entry.error_max_abs, rel=1e-5)
    assert np.sqrt((error**2).mean()) == pytest.approx(entry.error_rms, rel=1e-5)
    bound = 0.05 if encoding == "int8" else 1.0
    assert 0 < entry.error_rms < bound * given_rows.std()


@pytest.mark.parametrize(("spec", "encoding"), CASES)
def test_the_error_on_other_systems_than_the_fitted_ones_is_recorded_apart(finished, example, spec, encoding):
    with Cache.open(finished.path) as cache:
        everything = np.arange(cache.n_systems)
        read = cache.read(everything, (), TEACHER, (spec.name,))[f"teacher/{spec.name}"]
        entry = cache.teachers[TEACHER].signals[spec.name]
    store = create(finished.path, example)
    n = rows_of_systems(example, store, spec, N_FITTED)
    error = (read.astype(np.float64) - stored(example, store, spec))[n:]
    assert entry.held_out_error_max_abs == pytest.approx(np.abs(error).max(), rel=1e-5)
    assert entry.held_out_error_rms == pytest.approx(np.sqrt((error**2).mean()), rel=1e-5)


def test_pieces_and_processes_do_not_change_the_bytes(finished, example, tmp_path):
    other = fill(tmp_path / "y.kdcache", example, pieces=7)
    for path in sorted((finished.path / "data.zarr").rglob("*")):
        if path.is_file():
            twin = other.path / "data.zarr" / path.relative_to(finished.path / "data.zarr")
            assert path.read_bytes() == twin.read_bytes(), path


def test_stored_rows_are_what_the_formula_says(finished):
    """With zarr-python and the formula in the attributes alone."""
    group = zarr.open_group(finished.path / "data.zarr", mode="r")[f"teachers/{TEACHER}/node"]
    assert group.attrs["molkd"]["formula"] == "value = mean + scale * step * values"
    codes, scale = group["values"][:40].astype(np.float32), group["scale"][:40].astype(np.float32)
    values = group["mean"][:] + scale[:, None] * group["step"][:] * codes
    with Cache.open(finished.path) as cache:
        read = cache.read(np.arange(5), (), TEACHER, ("node",))["teacher/node"]
    n = min(len(read), 40)
    np.testing.assert_allclose(values[:n], read[:n], rtol=1e-6, atol=1e-6)


def test_undecoded_rows_come_with_their_scale(finished):
    with Cache.open(finished.path) as cache:
        arrays = cache.read([3, 1], (), TEACHER, ("node", "v2v"), decode=False)
        assert arrays["teacher/node"].dtype == np.int8
        assert arrays["teacher/v2v"].shape[1:] == (3, 2)
        assert arrays["teacher/v2v/scale"].dtype == np.float16
        decoded = cache.signal(TEACHER, "node").decode(
            {"values": arrays["teacher/node"], "scale": arrays["teacher/node/scale"]}
        )
        np.testing.assert_array_equal(decoded, cache.read([3, 1], (), TEACHER, ("node",))["teacher/node"])


def test_verify_knows_every_file(finished):
    report = verify(finished.path)
    assert report.ok
    assert not report.notes


@pytest.mark.parametrize("name", ["step/c/0", "mean/c/0", "step/zarr.json", "scale/c/0", "values/c/0/0"])
def test_a_flipped_bit_is_found(copied, name):
    path = copied / "data.zarr/teachers" / TEACHER / "node" / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 4
    path.write_bytes(raw)
    assert any(name.split("/")[0] in str(p) for p in verify(copied).problems)
    with pytest.raises(IntegrityError, match=r"node.*(damaged|differ|changed)"), Cache.open(copied) as cache:
        cache.read(np.arange(cache.n_systems), (), TEACHER, ("node",))


@pytest.mark.parametrize("name", ["step", "mean"])
def test_a_missing_codebook_is_found(copied, name):
    shutil.rmtree(copied / "data.zarr/teachers" / TEACHER / "node" / name / "c")
    with pytest.raises(IntegrityError, match=f"{name}/c/0: missing"):
        Cache.open(copied)
    assert not verify(copied).ok


@pytest.mark.parametrize(
    "change",
    [
        {"arrays": {}},
        {"arrays": {"step": {"shape": [1 << 40], "sha256": "0" * 64}}},
        {"arrays": {"../../x": {"shape": [4], "sha256": "0" * 64}}},
        {"arrays": None},
        {"systems": "many"},
    ],
)
def test_a_crafted_description_is_refused(copied, change):
    path = copied / "data.zarr/teachers" / TEACHER / "node/zarr.json"
    document = json.loads(path.read_text())
    document["attributes"]["molkd"]["codebook"] |= change
    path.write_text(json.dumps(document))
    with pytest.raises(IntegrityError, match=r"node/zarr\.json: damaged"):
        Cache.open(copied)


def test_a_codebook_that_is_there_stays(finished, copied, example):
    store = Store.open(copied, "a")
    spec = node_spec(4)
    other = fit_codebook(np.random.default_rng(1).normal(size=(50, 4)).astype(np.float32), spec, "int8", 2)
    group = store.add_signal(TEACHER, spec, "int8", other)
    first = Store.open(finished.path).signal(group).codebook
    np.testing.assert_array_equal(store.signal(group).codebook.step, first.step)
    assert store.add_signal(TEACHER, spec, "int8") == group  # nor does it have to be given again
    with pytest.raises(CacheError, match=r"is stored as int8.*asked for pca:2"):
        store.add_signal(TEACHER, spec, "pca:2", fit_codebook(np.eye(4, dtype=np.float32), spec, "pca:2", 1))


def test_a_fitted_encoding_needs_a_codebook(example, tmp_path):
    store = create(tmp_path / "z.kdcache", example)
    store.add_teacher(TEACHER, PROVENANCE)
    with pytest.raises(CacheError, match="node in int8: give the codebook fitted to it"):
        store.add_signal(TEACHER, node_spec(4), "int8")


def test_bad_systems_read_as_nan_and_do_not_count(example, tmp_path):
    store = create(tmp_path / "z.kdcache", example)
    for shard in store.missing_shards("atoms"):
        write_shard(store, example, "atoms", shard)
    store.add_teacher(TEACHER, PROVENANCE)
    spec = node_spec(4)
    rows = stored(example, store, spec)
    group = store.add_signal(TEACHER, spec, "int8", fit_codebook(rows[:200], spec, "int8", 4))
    system = store.systems_of_shard(0)[2]
    n_values = 0
    for shard in store.missing_shards(group):
        bad = [system] if shard == 0 else []
        write_shard(store, example, group, shard, bad=bad)
        layouts = store._load(group).layouts
        record = read_commit(store.path, store.plan, group, shard, layouts, store._load(group).rows_of(shard))
        n_values += record.moments["values"].count
    with Cache.open(store.path) as cache:
        read = cache.read(np.arange(cache.n_systems), (), TEACHER, ("node",))["teacher/node"]
        n_bad = int(cache.system_n_atoms[system])
        assert np.isnan(read).all(axis=1).sum() == n_bad
        assert n_values == len(read) - n_bad
        assert cache.bad_systems(TEACHER).tolist() == [system]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 4))
@settings(max_examples=10, deadline=None)
def test_any_sizes(tmp_path_factory, sizes, pieces):
    example = make_example(sizes)
    path = tmp_path_factory.mktemp("sizes") / "x.kdcache"
    store = create(path, example)
    for shard in store.missing_shards("atoms"):
        write_shard(store, example, "atoms", shard)
    store.add_teacher(TEACHER, PROVENANCE)
    spec = node_spec(4)
    rows = stored(example, store, spec)
    group = store.add_signal(TEACHER, spec, "pca:8", fit_codebook(rows, spec, "pca:8", len(sizes)))
    for shard in store.missing_shards(group):
        write_shard(store, example, group, shard, pieces=pieces)
    with Cache.open(path) as cache:
        read = cache.read(np.arange(len(sizes)), (), TEACHER, ("node",))["teacher/node"]
        assert np.isnan(cache.teachers[TEACHER].signals["node"].held_out_error_rms)  # all were fitted
    assert np.abs(read - rows).max() < 1e-3 * max(1.0, np.abs(rows).max())


def test_a_row_too_large_for_its_codebook_names_the_remedy(example, tmp_path):
    store = create(tmp_path / "x.kdcache", example)
    for shard in store.missing_shards("atoms"):
        write_shard(store, example, "atoms", shard)
    store.add_teacher(TEACHER, PROVENANCE)
    book = fit_codebook(1e-20 * np.eye(4, dtype=np.float32), node_spec(4), "int8", 1)
    group = store.add_signal(TEACHER, node_spec(4), "int8", book)
    message = r"node/scale, shard 0: row 0 is too large for int8, .* --encoding node=fp32, and with another"
    with pytest.raises(CacheError, match=message):
        write_shard(store, example, group, 0)
    group = store.add_signal(TEACHER, node_spec(4), "fp32")
    write_shard(store, example, group, 0)
    assert 0 not in store.missing_shards(group)
