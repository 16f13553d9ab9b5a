"""Each wrong use has one clear error, and nothing is committed."""

import json
import os
import shutil

import numpy as np
import pytest
from cache_example import (
    PROVENANCE,
    TEACHER,
    add_signals,
    create,
    make_example,
    shard_arrays,
    tree_digest,
    write_shard,
)

from molkd.cache_schema import declaration
from molkd.cache_schema import writer as writer_module
from molkd.cache_schema.encoding import ENCODINGS, encode
from molkd.cache_schema.errors import CacheError
from molkd.cache_schema.fields import FieldSpec, edge_spec, node_spec
from molkd.cache_schema.files import TMP_PREFIX
from molkd.cache_schema.manifest import finalize
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.verify import verify
from molkd.cache_schema.writer import Store, create_store


@pytest.fixture
def store(tmp_path, example):
    return create(tmp_path / "x.kdcache", example)


def temporaries(store):
    return [p for p in store.path.rglob("*") if p.name.startswith(TMP_PREFIX)]


# ------------------------------------------------------------------------------------------------- creating


def test_a_store_of_other_systems_is_not_continued(store, example):
    other = make_example([5, 300, 17], seed=8)
    with pytest.raises(
        CacheError, match=r"3 given systems are not in it \(a.extxyz#0.*12 of its systems are not given"
    ):
        create(store.path, other)


def test_a_store_with_other_labels_is_not_continued(store, example):
    changed = make_example([5, 300, 17, 1, 1024, 80, 700, 33, 512, 2, 90, 400], seed=7)
    changed.system["energy"][3] += 1e-9
    with pytest.raises(CacheError, match="1 of its systems have other energy labels"):
        create(store.path, changed)


def test_continuing_gives_the_mapping_for_the_new_input_order(store, example):
    order = np.arange(len(example.n_atoms))[::-1]
    reversed_ = example.reordered(order)
    again = create(store.path, reversed_)
    np.testing.assert_array_equal(again.input_index, len(order) - 1 - store.input_index)
    np.testing.assert_array_equal(again.systems.id, reversed_.ids[again.input_index])


def test_duplicates_are_named(tmp_path, example):
    twice = example.ids.copy()
    twice[4] = twice[1]
    with pytest.raises(CacheError, match=r"1 systems are given twice \(a.extxyz#2\)"):
        create(tmp_path / "x.kdcache", type(example)(example.n_atoms, example.system, {}, {}, twice))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("energy", np.inf, "infinite energy"),
        ("cell", np.nan, "cell that is not finite"),
    ],
)
def test_senseless_numbers_are_named(tmp_path, example, name, value, message):
    system = {k: v.copy() for k, v in example.system.items()}
    system[name][6] = value
    with pytest.raises(CacheError, match=f"a.extxyz#3.*{message}"):
        create(tmp_path / "x.kdcache", type(example)(example.n_atoms, system, {}, {}, example.ids))
    assert not list(tmp_path.iterdir())


def test_no_systems(tmp_path):
    with pytest.raises(CacheError, match="0 systems; a store needs at least one"):
        create(tmp_path / "x.kdcache", make_example_of_nothing())


def make_example_of_nothing():
    example = make_example([1])
    empty = {k: v[:0] for k, v in example.system.items()}
    return type(example)(example.n_atoms[:0], empty, {}, {}, example.ids[:0])


def test_a_folder_that_is_no_store_is_left_alone(tmp_path, example):
    (tmp_path / "x.kdcache").mkdir()
    (tmp_path / "x.kdcache" / "notes.txt").write_text("mine")
    with pytest.raises(CacheError, match="exists and is not a store"):
        create(tmp_path / "x.kdcache", example)
    with pytest.raises(CacheError, match=r"not a store \(no plan.json"):
        Cache.open(tmp_path / "x.kdcache")
    with pytest.raises(CacheError, match="no such folder"):
        Cache.open(tmp_path / "y.kdcache")
    assert [p.name for p in tmp_path.rglob("*")] == ["x.kdcache", "notes.txt"]


def test_provenance_must_be_json(tmp_path, example):
    with pytest.raises(CacheError, match="plain JSON"):
        create_store(
            tmp_path / "x.kdcache",
            ids=example.ids,
            n_atoms=example.n_atoms,
            **example.system,
            source=np.zeros(12),
            source_row=np.arange(12),
            source_names=["a"],
            dataset={"mean": float("nan")},
        )
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------ teachers, signals


def test_another_teacher_of_the_same_name(store):
    store.add_teacher(TEACHER, PROVENANCE)
    store.add_teacher(TEACHER, {**PROVENANCE, "date": "2031-01-01"})  # the same teacher on another day
    with pytest.raises(CacheError, match=r"is another one .weights_sha256 abab.*give this one another name"):
        store.add_teacher(TEACHER, {**PROVENANCE, "weights_sha256": "cd" * 32})
    with pytest.raises(CacheError, match="config"):
        store.add_teacher(TEACHER, {**PROVENANCE, "config": {"channels": 5}})
    assert Cache.open(store.path).teachers[TEACHER].provenance == PROVENANCE


def test_a_signal_stored_otherwise(store, example):
    groups = add_signals(store)
    assert add_signals(store) == groups
    write_shard(store, example, f"teachers/{TEACHER}/node", 1)
    before = tree_digest(store.path)
    with pytest.raises(CacheError, match=r"stored as fp16 float32 atom \(4,\).*asked for fp32.*1 of its \d"):
        store.add_signal(TEACHER, node_spec(4), "fp32")
    with pytest.raises(CacheError, match=r"asked for fp16 float32 atom \(5,\).*another name"):
        store.add_signal(TEACHER, node_spec(5), "fp16")
    with pytest.raises(CacheError, match="no teacher schnet; it has painn"):
        store.add_signal("schnet", node_spec(4), "fp16")
    with pytest.raises(CacheError, match="cannot lie inside"):
        store.add_signal(TEACHER, node_spec(4, "layer"), "fp16")
    assert tree_digest(store.path) == before


def test_a_finished_signal_stays_though_its_records_are_lost(store_path):
    """The manifest still describes its values."""
    shutil.rmtree(store_path / "log" / "teachers" / TEACHER / "node")
    before = tree_digest(store_path)
    with pytest.raises(CacheError, match="shards are finished"):
        Store.open(store_path, "a").add_signal(TEACHER, node_spec(4), "fp32")
    assert tree_digest(store_path) == before


@pytest.mark.parametrize("n_left", [0, 1, 2])
def test_a_signal_without_values_may_be_declared_anew(store, example, n_left):
    """After no crash, or one that left the array's metadata or a published file without a record."""
    group = f"teachers/{TEACHER}/node"
    add_signals(store)
    folder = store.path / "data.zarr" / group
    write_shard(store, example, group, 1)
    (store.path / "log" / group / "000001.json").unlink()
    if n_left == 1:  # a process died while it declared the signal anew
        (folder / "zarr.json").unlink()
    elif n_left == 0:
        shutil.rmtree(folder / "values" / "c")
    again = Store.open(store.path, "a")
    again.input_index = store.input_index
    assert again.add_signal(TEACHER, node_spec(4), "fp32") == group
    assert again.add_signal(TEACHER, node_spec(4), "fp32") == group
    for name in again.groups:
        for shard in again.missing_shards(name):
            write_shard(again, example, name, shard)
    finalize(again)
    report = verify(store.path)
    assert report.ok
    assert report.notes == []
    with Cache.open(store.path, complete=True) as cache:
        node = cache.teachers[TEACHER].signals["node"]
        assert (node.encoding, node.error_max_abs) == ("fp32", 0.0)


def test_a_signal_that_is_being_written_is_not_declared_anew(store, example):
    group = f"teachers/{TEACHER}/node"
    add_signals(store)
    other = Store.open(store.path, "a")
    with store.shard_writer(group, 0) as writer:
        writer.write(shard_arrays(store, example, group, 0))
        with pytest.raises(CacheError, match="another process is writing it"):
            other.add_signal(TEACHER, node_spec(4), "fp32")
    assert 0 not in store.missing_shards(group)
    assert Cache.open(store.path).teachers[TEACHER].signals["node"].encoding == "fp16"


def test_values_for_a_signal_declared_anew_meanwhile_are_not_committed(store, example, monkeypatch):
    """Where file systems have no locks a live writer may be overlooked."""
    group = f"teachers/{TEACHER}/node"
    add_signals(store)
    monkeypatch.setattr(declaration, "is_abandoned", lambda path: True)

    def write_late():
        with store.shard_writer(group, 0) as writer:
            writer.write(shard_arrays(store, example, group, 0))
            Store.open(store.path, "a").add_signal(TEACHER, node_spec(4), "fp32")

    with pytest.raises(CacheError, match=r"changed while .*node was being written.*nothing is committed"):
        write_late()
    assert 0 in Store.open(store.path).missing_shards(group)
    assert verify(store.path).ok


@pytest.mark.parametrize(
    ("spec", "encoding", "message"),
    [
        (FieldSpec("x", "bond", (4,), "float32", "1"), "fp16", "axis 'bond' is not part of format 1"),
        (edge_spec(4, max_per_atom=0), "fp16", "at most 0 edges an atom; .* a number from 1 to 65536"),
        (edge_spec(4, max_per_atom=65537), "fp16", "at most 65537 edges an atom"),
        (node_spec(4), "int8", "encoding 'int8'; choose fp32 or fp16"),
        (node_spec(0), "fp16", "at least 1"),
        (node_spec(4, "../../x"), "fp16", "names are letters"),
        (FieldSpec("node", "atom", (4,), "int64", "1"), "fp16", "expected float32 or float64"),
    ],
)
def test_signals_the_format_cannot_hold(store, spec, encoding, message):
    store.add_teacher(TEACHER, PROVENANCE)
    before = tree_digest(store.path)
    with pytest.raises(CacheError, match=message):
        store.add_signal(TEACHER, spec, encoding)
    assert tree_digest(store.path) == before


def test_unknown_names_say_what_there_is(store_path):
    cache = Cache.open(store_path)
    with pytest.raises(CacheError, match="no teacher gemnet; it has painn"):
        cache.read([0], (), "gemnet", ("node",))
    with pytest.raises(CacheError, match="no signal e2n here; it has edge, energy, layer/U4, node, v2v"):
        cache.read([0], (), TEACHER, ("e2n",))
    with pytest.raises(CacheError, match="no field charges"):
        cache.read([0], ("charges",))
    with pytest.raises(CacheError, match="index out of range"):
        cache.read([12])


# ------------------------------------------------------------------------------------------------------ rows


def test_too_few_rows_are_not_committed(store, example):
    arrays = shard_arrays(store, example, "atoms", 0)
    with (
        pytest.raises(CacheError, match="rows written; nothing is committed"),
        store.shard_writer("atoms", 0) as writer,
    ):
        writer.write({k: v[:-1] for k, v in arrays.items()})
    assert 0 in store.missing_shards("atoms")
    assert not temporaries(store)


def test_an_error_of_the_caller_commits_nothing(store, example):
    def stop_midway():
        with store.shard_writer("atoms", 0) as writer:
            writer.write(shard_arrays(store, example, "atoms", 0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_midway()
    assert 0 in store.missing_shards("atoms")
    assert not temporaries(store)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("tags"), "expected exactly atomic_numbers, positions, forces, tags, fixed"),
        (lambda a: a.update(tags=a["tags"][1:]), "arrays of unequal length"),
        (
            lambda a: a.update(positions=a["positions"][:, :2]),
            r"positions has rows of \(2,\), expected \(3,\)",
        ),
        (
            lambda a: a["positions"].__setitem__((3, 1), np.nan),
            "positions, shard 0: NaN in row 3, which is stored system",
        ),
        (
            lambda a: a["forces"].__setitem__((3, 1), -np.inf),
            "forces, shard 0: infinite value in row 3, channel 1",
        ),
        (
            lambda a: a.update(atomic_numbers=a["atomic_numbers"].astype(int) + 200),
            "values that are not uint8",
        ),
        (lambda a: a.update({k: np.concatenate([v, v]) for k, v in a.items()}), "rows given, the shard has"),
    ],
)
def test_rows_that_do_not_fit(store, example, change, message):
    arrays = {k: v.copy() for k, v in shard_arrays(store, example, "atoms", 0).items()}
    change(arrays)
    with pytest.raises(CacheError, match=message), store.shard_writer("atoms", 0) as writer:
        writer.write(arrays)
    assert not temporaries(store)


def test_half_precision_overflow_names_channel_value_and_remedy(store, example):
    group = add_signals(store)[0]
    arrays = shard_arrays(store, example, group, 0)
    arrays["values"][2, 3] = -70000.0
    with (
        pytest.raises(CacheError, match=r"-70000 in row 2, channel 3 is too large for fp16.*--encoding fp32"),
        store.shard_writer(group, 0) as writer,
    ):
        writer.write(arrays)
    assert 0 in store.missing_shards(group)


def test_half_precision_rounds_to_nearest():
    given = np.array([0.1, -65519.0, 1e-8, 5e-8, np.nan], dtype=np.float32)
    stored = encode(given, ENCODINGS["fp16"], "here")
    expected = [0.0999755859375, -65504.0, 0.0, 2**-24, np.nan]  # worked out by hand from binary16
    np.testing.assert_array_equal(stored.astype(np.float64), expected)


def test_non_finite_signals_are_refused_with_their_system(store, example):
    group = next(g for g in add_signals(store) if g.endswith("energy"))
    arrays = shard_arrays(store, example, group, 1)
    arrays["values"][-1] = np.nan
    system = store.systems_of_shard(1)[-1]
    message = f"NaN in row {len(arrays['values']) - 1}, which is stored system {system}"
    with pytest.raises(CacheError, match=message), store.shard_writer(group, 1) as writer:
        writer.write(arrays)


def test_no_such_shard_or_group(store):
    with pytest.raises(CacheError, match="no shard 99"):
        store.shard_writer("atoms", 99)
    with pytest.raises(CacheError, match="no group forces; it has atoms"):
        store.shard_writer("forces", 0)
    with pytest.raises(CacheError, match="opened for reading"):
        Store.open(store.path).shard_writer("atoms", 0)


# ------------------------------------------------------------------------------------------------ unfinished


def test_unwritten_systems_are_an_error_never_zeros(store, example):
    write_shard(store, example, "atoms", 1)
    cache = Cache.open(store.path)
    inside, outside = store.systems_of_shard(1)[0], store.systems_of_shard(0)[0]
    assert len(cache.read([inside])["positions"])
    with pytest.raises(CacheError, match="shard 0 of atoms is not written yet"):
        cache.read([inside, outside])
    with pytest.raises(CacheError, match=r"atoms is not finished, .* shards are missing"):
        Cache.open(store.path, complete=True)
    with pytest.raises(CacheError, match="atoms is not finished"):
        cache.require()
    with pytest.raises(CacheError, match="atoms is not finished"):
        finalize(store)
    assert not (store.path / "manifest.json").exists()


def test_reading_nothing(store_path):
    arrays = Cache.open(store_path).read([], teacher=TEACHER, signals=("v2v", "energy"))
    assert arrays["teacher/v2v"].shape == (0, 3, 3)
    assert arrays["positions"].shape == (0, 3)
    assert arrays["teacher/energy"].shape == (0,)


def test_two_creators_at_once_share_one_store(tmp_path, example, monkeypatch):
    """The other process finishes its store while ours is being built."""
    path = tmp_path / "x.kdcache"
    build = writer_module.build

    def slow(*arguments):
        monkeypatch.setattr(writer_module, "build", build)
        create(path, example)
        return build(*arguments)

    monkeypatch.setattr(writer_module, "build", slow)
    store = create(path, example)
    assert [p.name for p in tmp_path.iterdir()] == ["x.kdcache"]
    np.testing.assert_array_equal(store.systems.id, example.ids[store.input_index])


def test_no_right_to_write(store, example, monkeypatch):
    def deny(*arguments):
        raise PermissionError(13, "Permission denied", str(store.path))

    monkeypatch.setattr(os, "open", deny)
    with pytest.raises(CacheError, match=r"cannot write .Permission denied.*check the folder's rights"):
        store.shard_writer("atoms", 0).__enter__()


def test_describing_a_store_gives_plain_json(store_path):
    from molkd.cache_schema.manifest import info

    described = json.loads(json.dumps(info(store_path)))
    assert described["systems"] == 12
    assert described["atoms"] == 3164
    assert described["teachers"][TEACHER]["signals"]["node"]["encoding"] == "fp16"
    assert described["fields"]["positions"]["unit"] == "A"
