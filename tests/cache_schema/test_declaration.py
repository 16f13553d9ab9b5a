"""Teachers and signals that do not fit what is in the store already, or the format."""

import shutil

import pytest
from cache_example import PROVENANCE, TEACHER, add_signals, shard_arrays, tree_digest, write_shard

from molkd.cache_schema import declaration
from molkd.cache_schema.errors import CacheError
from molkd.cache_schema.fields import FieldSpec, edge_spec, node_spec
from molkd.cache_schema.manifest import finalize
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.verify import verify
from molkd.cache_schema.writer import Store


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
        (node_spec(4), "int4", "encoding 'int4' is unknown"),
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
