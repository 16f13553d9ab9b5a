"""What goes in comes out: through our reader, and through stock zarr-python."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zarr
from cache_example import (
    PROVENANCE,
    SIGNALS,
    TEACHER,
    add_signals,
    create,
    make_example,
    shard_arrays,
    tree_digest,
    write_all,
    write_shard,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from molkd.cache_schema.encoding import encoding_for
from molkd.cache_schema.fields import energy_spec, forces_spec, node_spec
from molkd.cache_schema.manifest import finalize, info
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.summary import describe_info
from molkd.cache_schema.verify import verify
from molkd.cache_schema.writer import Store

# Sizes around the borders of chunks (1,024 rows) and shards (1,024 or 2,048 rows).
SIZES = st.lists(
    st.one_of(st.integers(1, 40), st.sampled_from([1, 1023, 1024, 511, 512, 513])), min_size=1, max_size=14
)


def expected_field(example, name, inputs):
    if name in example.system:
        return example.system[name][inputs]
    return example.atoms[name][example.atom_rows(inputs)]


def expected_signal(example, name, inputs):
    spec, encoding = next((s, e) for s, e in SIGNALS if s.name == name)
    if spec.axis == "edge":
        values = example.edges_of(inputs)["values"]
    else:
        values = example.signals[name][inputs if spec.axis == "system" else example.atom_rows(inputs)]
    return values.astype(np.float16).astype(np.float32) if encoding == "fp16" else values


def check_edges(arrays, example, inputs):
    """Compare the edges of systems that were read with a plain loop over them."""
    expected = example.edges_of(inputs)
    assert arrays["teacher/edge/n_edges"].tolist() == expected["n_edges"].tolist()
    np.testing.assert_array_equal(arrays["teacher/edge/shift"], expected["shift"])
    columns, first_edge, first_atom = [], 0, 0
    for k, n in zip(inputs, expected["n_edges"], strict=True):
        columns += [
            [i + first_atom, j + first_atom] for i, j in expected["index"][first_edge : first_edge + n]
        ]
        first_edge, first_atom = first_edge + n, first_atom + example.n_atoms[k]
    found = arrays["teacher/edge/index"]
    assert (found.shape, found.dtype) == ((2, len(columns)), np.int64)
    assert found.T.tolist() == [[int(i), int(j)] for i, j in columns]


@settings(max_examples=20, deadline=None)
@given(
    n_atoms=SIZES,
    rows_per_shard=st.sampled_from([1024, 2048]),
    finish=st.booleans(),
    data=st.data(),
)
def test_any_sizes_any_order(tmp_path_factory, n_atoms, rows_per_shard, finish, data):
    path = tmp_path_factory.mktemp("store") / "x.kdcache"
    example = make_example(n_atoms, seed=len(n_atoms))
    store = write_all(path, example, rows_per_shard, finish)
    with Cache.open(path, complete=True) as cache:
        indices = data.draw(st.lists(st.integers(0, len(n_atoms) - 1), min_size=1, max_size=20))
        names = [spec.name for spec, _ in SIGNALS]
        arrays = cache.read(indices, teacher=TEACHER, signals=names)
        inputs = store.input_index[indices]
        assert arrays["n_atoms"].tolist() == example.n_atoms[inputs].tolist()
        for name in (*example.atoms, "energy", "pbc"):
            np.testing.assert_array_equal(arrays[name], expected_field(example, name, inputs), err_msg=name)
        np.testing.assert_array_equal(arrays["cell"], example.system["cell"][inputs].astype(np.float32))
        for name in names:
            values = arrays[f"teacher/{name}"]
            np.testing.assert_array_equal(values, expected_signal(example, name, inputs), err_msg=name)
            assert values.dtype == next(spec.dtype for spec, _ in SIGNALS if spec.name == name)
        check_edges(arrays, example, inputs)
    assert verify(path).ok
    assert not verify(path).notes


def test_stock_zarr_reads_the_same(store_path, example):
    group = zarr.open_group(store_path / "data.zarr", mode="r")
    cache = Cache.open(store_path)
    assert cache.plan.n_shards > 2
    np.testing.assert_array_equal(group["systems/id"][:], cache.ids)
    np.testing.assert_array_equal(group["systems/pbc"][:], cache.pbc)
    assert group["systems"].attrs["source_names"] == ["a.extxyz", "b.extxyz"]
    row, slot, n = group["systems/row"][:], group["systems/slot"][:], group["systems/n_atoms"][:]
    names = [spec.name for spec, _ in SIGNALS]
    for i in range(cache.n_systems):
        one = cache.read([i], teacher=TEACHER, signals=names)
        for name in example.atoms:
            np.testing.assert_array_equal(group[f"atoms/{name}"][row[i] : row[i] + n[i]], one[name])
        for spec, _ in SIGNALS:
            if spec.axis == "edge":
                continue
            array = group[f"teachers/{TEACHER}/{spec.name}/values"]
            rows = slice(slot[i], slot[i] + 1) if spec.axis == "system" else slice(row[i], row[i] + n[i])
            np.testing.assert_array_equal(array[rows].astype(spec.dtype), one[f"teacher/{spec.name}"])
    edge = group[f"teachers/{TEACHER}/edge"]
    room = edge["values"].shape[0] // cache.plan.n_shards
    begin = {}  # shard -> where the edges of its next system begin
    for i in range(cache.n_systems):
        shard = int(cache.systems.shard[i])
        n_edges, first = int(edge["n_edges"][slot[i]]), begin.get(shard, shard * room)
        rows = slice(first, first + n_edges)
        begin[shard] = first + n_edges
        one = cache.read([i], (), TEACHER, ("edge",))
        np.testing.assert_array_equal(edge["values"][rows].astype(np.float32), one["teacher/edge"])
        np.testing.assert_array_equal(edge["index"][rows].T, one["teacher/edge/index"])
        np.testing.assert_array_equal(edge["shift"][rows], one["teacher/edge/shift"])
    assert np.isnan(edge["values"][begin[0] : room]).all()  # room that nobody needed
    assert edge["values"].metadata.dimension_names == ("edge_row", "channel")
    assert edge["index"].metadata.dimension_names == ("edge_row", "end")
    node = group[f"teachers/{TEACHER}/node"]
    assert node.attrs["molkd"]["unit"] == "1"
    assert node["values"].metadata.dimension_names == ("atom_row", "channel")
    assert group[f"teachers/{TEACHER}/v2v/values"].metadata.dimension_names == ("atom_row", "xyz", "channel")
    assert group[f"teachers/{TEACHER}"].attrs["molkd"]["provenance"] == PROVENANCE


def test_rows_nobody_wrote_are_nan_for_other_clients(tmp_path, example):
    store = create(tmp_path / "x.kdcache", example)
    write_shard(store, example, "atoms", 0)
    positions = zarr.open_group(tmp_path / "x.kdcache" / "data.zarr", mode="r")["atoms/positions"][:]
    used = store.systems.rows_in_shard(0)
    assert np.isfinite(positions[:used]).all()
    assert np.isnan(positions[used:]).all()


def test_bytes_do_not_depend_on_input_order_or_on_how_rows_arrive(tmp_path, example):
    write_all(tmp_path / "a.kdcache", example)
    order = np.random.default_rng(0).permutation(len(example.n_atoms))
    shuffled = example.reordered(order)
    store = create(tmp_path / "b.kdcache", shuffled)
    for group in ["atoms", *add_signals(store)]:
        for shard in reversed(range(store.plan.n_shards)):
            write_shard(store, shuffled, group, shard, pieces=1 + shard)
    a, b = (tree_digest(tmp_path / f"{x}.kdcache" / "data.zarr") for x in "ab")
    differing = {name for name in a if a[name] != b.get(name)}
    # Where a system came from is the only thing that differs.
    assert differing == {"systems/source/c/0", "systems/source_row/c/0"}
    assert a.keys() == b.keys()


def test_statistics_are_those_of_the_decoded_values(store_path, example):
    entry = Cache.open(store_path).teachers[TEACHER].signals["node"]
    values = example.signals["node"]
    decoded = values.astype(np.float16).astype(np.float64)
    np.testing.assert_allclose(entry.statistics.mean, decoded.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(entry.statistics.variance, decoded.var(axis=0), rtol=1e-12)
    np.testing.assert_allclose(entry.statistics.rms, np.sqrt((decoded**2).mean(axis=0)), rtol=1e-12)
    assert entry.max_abs == np.abs(decoded).max()
    error = decoded - values
    assert entry.error_max_abs == pytest.approx(np.abs(error).max(), rel=1e-6)
    assert entry.error_rms == pytest.approx(np.sqrt((error**2).mean()), rel=1e-5)  # summed in float32


def test_statistics_of_vectors_and_labels(store_path, example):
    cache = Cache.open(store_path)
    v2v = cache.teachers[TEACHER].signals["v2v"]
    flat = example.signals["v2v"].astype(np.float64).reshape(-1, 3)  # over atoms and x, y, z
    np.testing.assert_allclose(v2v.statistics.mean, flat.mean(axis=0), atol=1e-12)
    assert v2v.error_rms == 0.0
    forces = example.atoms["forces"].astype(np.float64)
    known = forces[np.isfinite(forces).all(axis=1)]  # missing labels are left out
    assert cache.fields["forces"].statistics.count == known.size
    np.testing.assert_allclose(cache.fields["forces"].statistics.mean, [known.mean()], atol=1e-12)
    assert cache.fields["tags"].statistics is None


def test_the_same_from_manifest_and_from_records(store_path):
    with_manifest = info(store_path)
    (store_path / "manifest.json").unlink()
    without = info(store_path)
    assert with_manifest["finished"]
    for one in (with_manifest, without):
        del one["bytes"], one["bytes_per_atom"]
    assert with_manifest == without
    json.dumps(without)


def test_signals_added_later_are_read_beside_the_manifest(store_path, example):
    store = Store.open(store_path, "a")
    store.input_index = create(store_path, example).input_index
    group = store.add_signal(TEACHER, node_spec(4, "again"), "fp32")
    example.signals["again"] = example.signals["node"]
    write_shard(store, example, group, 1)
    found = info(store_path)
    assert (store_path / "manifest.json").exists()  # of what was finished before
    assert not found["finished"]
    assert "UNFINISHED" in describe_info(found)
    with Cache.open(store_path) as cache:
        entry = cache.teachers[TEACHER].signals["again"]
        assert not entry.complete
        assert entry.missing_shards == tuple(k for k in range(cache.plan.n_shards) if k != 1)
        inside = list(store.systems_of_shard(1))
        values = cache.read(inside, (), TEACHER, ("again",))["teacher/again"]
        np.testing.assert_array_equal(values, shard_arrays(store, example, group, 1)["values"])
        assert cache[inside[0]]["painn/again"].shape == (cache.system_n_atoms[inside[0]], 4)
        assert "painn/again" not in cache[0]
    for shard in store.missing_shards(group):
        write_shard(store, example, group, shard)
    assert info(store_path)["finished"]


def test_bad_systems_are_nan_and_listed(tmp_path, example):
    store = create(tmp_path / "x.kdcache", example)
    groups = add_signals(store)
    bad = {1: next(iter(store.systems_of_shard(1)))}
    for group in ["atoms", *groups]:
        for shard in range(store.plan.n_shards):
            given_up = [bad[shard]] if shard in bad and group.endswith("node") else []
            if given_up:
                # The teacher gave infinity for that system, and for it only.
                arrays = shard_arrays(store, example, group, shard)
                rows = store.systems.n_atoms[bad[shard]]
                arrays["values"][:rows] = np.inf
                with store.shard_writer(group, shard) as writer:
                    writer.write(arrays, bad_systems=given_up)
            else:
                write_shard(store, example, group, shard)
    finalize(store)
    cache = Cache.open(store.path)
    assert cache.bad_systems(TEACHER).tolist() == [bad[1]]
    values = cache.read([bad[1], bad[1] + 1], (), TEACHER, ("node",))["teacher/node"]
    n = cache.system_n_atoms[bad[1]]
    assert np.isnan(values[:n]).all()
    assert np.isfinite(values[n:]).all()
    entry = cache.teachers[TEACHER].signals["node"]
    assert entry.statistics.count == cache.n_atoms - n
    assert np.isfinite(entry.statistics.mean).all()
    assert verify(store.path).ok


def test_energies_and_forces_keep_their_precision():
    assert encoding_for(energy_spec(), "fp16") == "fp64"
    assert encoding_for(forces_spec(), "fp16") == "fp32"
    assert encoding_for(node_spec(8), "fp16") == "fp16"


def test_many_files_need_few_handles(store_path, example, monkeypatch):
    from molkd.cache_schema import shard_reader

    monkeypatch.setattr(shard_reader, "_OPEN_FILES", 2)
    with Cache.open(store_path) as cache:
        order = np.random.default_rng(1).permutation(cache.n_systems)
        for i in order:
            one = cache[int(i)]
            assert len(one["positions"]) == cache.system_n_atoms[i]
        cache.close()
        assert len(cache.read(order)["forces"]) == cache.n_atoms


def test_threads_may_share_a_cache(store_path, monkeypatch):
    from molkd.cache_schema import shard_reader

    monkeypatch.setattr(shard_reader, "_OPEN_FILES", 2)  # files close while other threads read them
    with Cache.open(store_path) as cache:
        reference = [cache[i] for i in range(cache.n_systems)]
        cache.close()

        def read(seed):
            for i in np.random.default_rng(seed).integers(0, cache.n_systems, 60):
                np.testing.assert_equal(cache[int(i)], reference[i])

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(read, range(4)))
