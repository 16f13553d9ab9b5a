"""Repair of signals that are described, but without any value: no record vouches for their files."""

import shutil

import pytest
from cache_example import PROVENANCE, TEACHER, create, make_example, tree_digest, write_shard

from molkd.cache_schema.fields import node_spec
from molkd.cache_schema.fitting import fit_codebook
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.repair import repair
from molkd.cache_schema.verify import verify

NODE = f"data.zarr/teachers/{TEACHER}/node"
FILES = [
    f"{NODE}/{name}" for name in ("zarr.json", "values/zarr.json", "mean/zarr.json", "mean/c/0", "step/c/0")
]


@pytest.fixture
def stores(tmp_path):
    """A store of structures with a signal that is only described, and a copy of it."""
    example = make_example([5, 40, 17])
    store = create(tmp_path / "x.kdcache", example)
    write_shard(store, example, "atoms", 0)
    store.add_teacher(TEACHER, PROVENANCE)
    book = fit_codebook(example.signals["node"][:20], node_spec(4), "int8", 1)
    store.add_signal(TEACHER, node_spec(4), "int8", book)
    return store.path, shutil.copytree(store.path, tmp_path / "copy.kdcache")


@pytest.mark.parametrize("how", ["cut", "removed"])
@pytest.mark.parametrize("name", [*FILES, f"data.zarr/teachers/{TEACHER}/zarr.json"])
def test_its_description_comes_from_a_copy(stores, name, how):
    path, copy = stores
    raw = (path / name).read_bytes()
    (path / name).unlink() if how == "removed" else (path / name).write_bytes(raw[: len(raw) // 2])
    before = tree_digest(path)
    repair(path, copy, dry_run=True)
    assert tree_digest(path) == before
    repair(path, copy)
    assert verify(path).ok
    assert tree_digest(path / "data.zarr") == tree_digest(copy / "data.zarr")


@pytest.mark.parametrize("name", FILES)
def test_without_a_copy_it_is_named_and_nothing_else_is_lost(stores, name):
    path, _ = stores
    (path / name).write_bytes(b"{")
    before = tree_digest(path)
    assert any("/node" in one for one in repair(path).needed)
    assert tree_digest(path) == before


def test_an_intact_description_stays_whatever_the_copy_says(stores):
    path, copy = stores
    example = make_example([5, 40, 17])
    store = create(path, example)
    group = store.add_signal(TEACHER, node_spec(4), "fp16")
    before = tree_digest(path)
    repair(path, copy)
    assert tree_digest(path) == before
    write_shard(store, example, group, 0)
    with Cache.open(path) as cache:
        assert cache.teachers[TEACHER].signals["node"].encoding == "fp16"
