"""Signals on edges: places, limits, what is refused, and what a careful reader finds."""

import json

import numpy as np
import pytest
import zarr
from cache_example import TEACHER, add_signals, create, make_example, shard_arrays, write_shard
from hypothesis import given
from hypothesis import strategies as st

from molkd.cache_schema import jsonfile
from molkd.cache_schema.crc import crc32c, crc_hex
from molkd.cache_schema.errors import CacheError, IntegrityError
from molkd.cache_schema.fields import edge_spec
from molkd.cache_schema.layout import edge_rows_per_shard
from molkd.cache_schema.manifest import finalize, info
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.summary import describe_info
from molkd.cache_schema.verify import verify

GROUP = f"teachers/{TEACHER}/edge"


@pytest.fixture
def store(tmp_path, example):
    store = create(tmp_path / "x.kdcache", example)
    add_signals(store)
    return store


def write_edges(store, arrays, shard=0, bad=()):
    with store.shard_writer(GROUP, shard) as writer:
        writer.write(arrays, bad)


@given(
    st.lists(st.tuples(st.integers(1, 60), st.booleans()), min_size=1, max_size=30),
    st.integers(1, 40),
    st.data(),
)
def test_room_for_the_most_edges_of_any_shard(systems, most, data):
    """An open system of n atoms has n (n - 1) edges at most, a periodic one as many as the signal says."""
    shard = np.sort(data.draw(st.lists(st.integers(0, 3), min_size=len(systems), max_size=len(systems))))
    shard = np.unique(shard, return_inverse=True)[1].astype(np.int32)
    n_atoms, is_periodic = (np.array(column) for column in zip(*systems, strict=True))
    needed = {}
    for k, (n, periodic) in enumerate(systems):
        edges = n * most if periodic else n * min(most, n - 1)
        needed[shard[k]] = needed.get(shard[k], 0) + edges
    rows = edge_rows_per_shard(shard, n_atoms.astype(np.int32), is_periodic, most)
    assert rows % 1024 == 0
    assert 0 <= rows - max(needed.values()) < 1024 or rows == 1024


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("shift"), "expected exactly values, index, shift, n_edges"),
        (lambda a: a.update(values=a["values"][:-1]), r"\d+ edges in n_edges, but .*'values': \d+"),
        (lambda a: a["n_edges"].__setitem__(0, a["n_edges"][0] + 1), r"edges in n_edges, but"),
        (
            lambda a: a["n_edges"].__setitem__(slice(0, 2), [-1, a["n_edges"][:2].sum() + 1]),
            "in n_edges, but",
        ),
        (lambda a: a["index"].__setitem__((0, 0), -1), "an edge between atoms that its system does not have"),
        (lambda a: a["index"].__setitem__((-1, 1), 5000), "an edge between atoms that its system"),
        (lambda a: a["shift"].__setitem__((2, 1), 40_000), "shift, shard 0: holds values that are not int16"),
        (lambda a: a["values"].__setitem__((2, 1), np.nan), "NaN in row 2, which is stored system"),
        (lambda a: a["values"].__setitem__((2, 1), 1e6), "too large for its encoding"),
        (lambda a: a.update(n_edges=np.append(a["n_edges"], 0)), r"\d systems given, the shard has \d"),
    ],
)
def test_rows_that_do_not_fit(store, example, change, message):
    arrays = {name: values.copy() for name, values in shard_arrays(store, example, GROUP, 0).items()}
    assert len(arrays["n_edges"]) > 1
    change(arrays)
    with pytest.raises(CacheError, match=message):
        write_edges(store, arrays)
    assert 0 in store.missing_shards(GROUP)
    assert verify(store.path).ok


def test_too_few_systems_are_not_committed(store, example):
    arrays = shard_arrays(store, example, GROUP, 0)
    n = int(arrays["n_edges"][-1])
    short = {name: values[: len(values) - n] for name, values in arrays.items() if name != "n_edges"}
    with pytest.raises(CacheError, match=r"\d of \d systems written; nothing is committed"):
        write_edges(store, short | {"n_edges": arrays["n_edges"][:-1]})


def test_more_edges_than_announced_are_refused(tmp_path):
    example = make_example([600, 400], seed=1)
    store = create(tmp_path / "x.kdcache", example)
    store.add_teacher(TEACHER, {"weights_sha256": "ab" * 32})
    group = store.add_signal(TEACHER, edge_spec(1, max_per_atom=2), "fp32")
    room = 2048  # 2 edges for each of 1,000 atoms, in whole chunks
    for n_edges, fits in (([room, 0], True), ([room, 1], False)):
        E = sum(n_edges)
        arrays = {
            "values": np.ones((E, 1), np.float32),
            "index": np.zeros((E, 2), int),
            "shift": np.zeros((E, 3), int),
            "n_edges": np.array(n_edges),
        }
        writer = store.shard_writer(group, 0)
        if not fits:
            (store.path / f"log/{group}/000000.json").unlink()
            with (
                pytest.raises(CacheError, match="2049 edges, but the signal announced at most 2 an atom"),
                writer,
            ):
                writer.write(arrays)
            continue
        with writer:
            writer.write(arrays)
        assert Cache.open(store.path).teachers[TEACHER].signals["edge"].n_rows == room


def test_no_edges_at_all(tmp_path):
    """Single atoms: files hold nothing but an index, and every reader takes them."""
    example = make_example([1, 1, 1], seed=2)
    store = create(tmp_path / "x.kdcache", example)
    for group in ["atoms", *add_signals(store)]:
        write_shard(store, example, group, 0)
    finalize(store)
    assert verify(store.path).ok
    with Cache.open(store.path, complete=True) as cache:
        arrays = cache.read([2, 0], (), TEACHER, ("edge",))
        assert arrays["teacher/edge"].shape == (0, 2)
        assert arrays["teacher/edge/index"].shape == (2, 0)
        assert arrays["teacher/edge/shift"].shape == (0, 3)
        assert arrays["teacher/edge/n_edges"].tolist() == [0, 0]
    values = zarr.open_group(store.path / "data.zarr", mode="r")[f"{GROUP}/values"]
    assert np.isnan(values[:]).all()
    json.dumps(info(store.path), allow_nan=False)


def test_unused_room_costs_nothing_but_its_place_in_the_index(store_path):
    with Cache.open(store_path) as cache:
        state = cache._states[GROUP]
        layout = state.group.layouts["values"]
        for shard, files in state.files.items():
            n_chunks = -(-files["values"].rows // 1024)
            assert n_chunks < layout.n_chunks or files["values"].rows > layout.rows_per_file - 1024
            size = (store_path / layout.file(shard)).stat().st_size
            assert size == n_chunks * 1024 * 2 * 2 + 16 * layout.n_chunks + 4


def test_statistics_and_description(store_path, example):
    entry = Cache.open(store_path).teachers[TEACHER].signals["edge"]
    decoded = example.edges["values"].astype(np.float16).astype(np.float64)
    assert entry.n_rows == entry.statistics.count == len(decoded)
    np.testing.assert_allclose(entry.statistics.mean, decoded.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(entry.statistics.variance, decoded.var(axis=0), rtol=1e-12)
    found = info(store_path)
    described = found["teachers"][TEACHER]["signals"]["edge"]
    on_disk = sum(p.stat().st_size for p in (store_path / "data.zarr" / GROUP).rglob("c/**/*") if p.is_file())
    assert described["bytes"] == on_disk
    assert f"{len(decoded):,} edges" in describe_info(found)


def test_inspecting_one_system_shows_its_edges(store_path, example):
    cache = Cache.open(store_path)
    one = cache[3]
    assert one[f"{TEACHER}/edge/index"].shape == (2, one[f"{TEACHER}/edge/n_edges"][0])
    assert one[f"{TEACHER}/edge"].shape == (one[f"{TEACHER}/edge/n_edges"][0], 2)


def test_bad_systems_keep_their_edges_and_lose_the_values(store, example):
    arrays = shard_arrays(store, example, GROUP, 0)
    bad = store.systems_of_shard(0)[1]
    n_edges = arrays["n_edges"]
    rows = slice(n_edges[0], n_edges[:2].sum())
    arrays["values"][rows] = np.inf
    assert n_edges[1] > 0
    with pytest.raises(CacheError, match="infinite value"):
        write_edges(store, arrays)
    write_edges(store, arrays, bad=[bad])
    cache = Cache.open(store.path)
    assert cache.bad_systems(TEACHER).tolist() == [bad]
    read = cache.read([bad], (), TEACHER, ("edge",))
    assert np.isnan(read["teacher/edge"]).all()
    np.testing.assert_array_equal(read["teacher/edge/index"].T, arrays["index"][rows])
    assert cache.teachers[TEACHER].signals["edge"].statistics.count == n_edges.sum() - n_edges[1]


def reseal(store_path, shard, change):
    """Change a record and seal it again; the manifest would say otherwise and goes."""
    (store_path / "manifest.json").unlink(missing_ok=True)
    path = store_path / "log" / GROUP / f"{shard:06d}.json"
    document, _ = jsonfile.read_sealed(path, max_bytes=1 << 24, remedy="")
    change(document["arrays"])
    path.write_bytes(jsonfile.seal(document))


def forge(store_path, name, edit):
    """Edit a file of shard 0 and bring its checksums in line."""
    path = next(p for p in sorted((store_path / f"data.zarr/{GROUP}/{name}/c").rglob("0*")) if p.is_file())
    raw = bytearray(path.read_bytes())
    edit(np.frombuffer(raw, dtype="<i4", count=len(raw) // 4))
    path.write_bytes(raw)

    def fix(arrays):
        entry = arrays[name]
        entry["crc32c"] = crc_hex(crc32c(bytes(raw)))
        size = 1024 * 8 if name == "index" else len(raw)
        entry["chunk_crc32c"] = [
            crc_hex(crc32c(bytes(raw[k * size : (k + 1) * size]))) for k in range(len(entry["chunk_crc32c"]))
        ]

    reseal(store_path, 0, fix)


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("n_edges", lambda n: n.__setitem__(1, n[1] + 1), "does not add up to the"),
        ("n_edges", lambda n: n.__setitem__(slice(0, 2), [-1, n[0] + n[1] + 1]), "does not add up to the"),
        ("index", lambda n: n.__setitem__(0, 1 << 30), "between atoms that their system does not have"),
        ("index", lambda n: n.__setitem__(1, -1), "between atoms that their system does not have"),
    ],
)
def test_edges_that_make_no_sense_are_never_handed_out(store_path, name, edit, message):
    """Checksums are right: a faulty or hostile writer."""
    forge(store_path, name, edit)
    problems = verify(store_path).problems
    assert [(p.kind, p.array, p.shard) for p in problems] == [("edges", GROUP, 0)]
    cache = Cache.open(store_path)
    with pytest.raises(IntegrityError, match=message):
        cache.read(np.flatnonzero(cache.systems.shard == 0), (), TEACHER, ("edge",))


@pytest.mark.parametrize("rows", [-1, 1 << 40, "7"])
def test_rows_of_a_record_are_bounded(store_path, rows):
    reseal(store_path, 0, lambda arrays: arrays["values"].update(rows=rows))
    with pytest.raises(IntegrityError, match=r"arrays\.values\.rows"):
        Cache.open(store_path)


def test_arrays_of_edges_must_have_equal_rows(store_path):
    def change(arrays):
        arrays["shift"].update(rows=arrays["shift"]["rows"] - 1)

    reseal(store_path, 0, change)
    with pytest.raises(IntegrityError, match="differ in their rows of edges"):
        Cache.open(store_path)
