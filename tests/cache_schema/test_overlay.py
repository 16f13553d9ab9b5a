"""A personal store over a shared one: both are read as one, only the personal one is written to."""

import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from cache_example import PROVENANCE, TEACHER, make_example, tree_digest, write_all

from molkd.cache_schema.errors import CacheError, IntegrityError
from molkd.cache_schema.fields import node_spec
from molkd.cache_schema.jsonfile import read_sealed, seal
from molkd.cache_schema.manifest import finalize_if_complete, info
from molkd.cache_schema.overlay import OVERLAY, create_overlay
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.verify import verify
from molkd.cache_schema.writer import Store
from molkd.pipeline.sharing.copying import copy_store, send_store
from molkd.pipeline.sharing.listing import list_stores

ATOMS_FILE = Path("data.zarr", "atoms", "positions", "c", "0", "0")
EVERYTHING = np.arange(12)
EXTRA = node_spec(4, "layer/X1")


@pytest.fixture
def shared(tmp_path, example):
    path = tmp_path / "shared.kdcache"
    write_all(path, example)
    return path


def add_own(path, example, teacher="mine", provenance=PROVENANCE):
    """Write one more signal, with the values of another."""
    store = Store.open(path, "a")
    store.add_teacher(teacher, provenance)
    group = store.add_signal(teacher, EXTRA, "fp32")
    with Cache.open(path) as cache:
        for shard in store.missing_shards(group):
            values = cache.read(store.systems_of_shard(shard), (), TEACHER, ("node",))["teacher/node"]
            with store.shard_writer(group, shard) as writer:
                writer.write({"values": values})
    assert finalize_if_complete(store)
    return store


def test_both_are_read_as_one(shared, example, tmp_path):
    before = tree_digest(shared)
    mine = create_overlay(shared, tmp_path / "mine.kdcache")
    add_own(mine, example)
    assert tree_digest(shared) == before
    with Cache.open(mine, complete=True) as ours, Cache.open(shared) as theirs:
        assert {t: set(e.signals) for t, e in ours.teachers.items()} == {
            TEACHER: set(theirs.teachers[TEACHER].signals),
            "mine": {"layer/X1"},
        }
        own = ours.read(EVERYTHING, ("positions", "energy"), "mine", ("layer/X1",))
        other = theirs.read(EVERYTHING, ("positions", "energy"), TEACHER, ("node", "edge"))
        np.testing.assert_array_equal(own["teacher/layer/X1"], other["teacher/node"])
        np.testing.assert_array_equal(own["positions"], other["positions"])
        edges = ours.read(EVERYTHING, (), TEACHER, ("edge",))
        np.testing.assert_array_equal(edges["teacher/edge/index"], other["teacher/edge/index"])
    # Its own files are few: no rows of atoms, none of the shared signals.
    assert not (mine / ATOMS_FILE).exists()
    assert not (mine / "data.zarr" / "teachers" / TEACHER).exists()
    report = verify(mine)
    assert report.ok
    assert [(n.kind, str(shared) in n.message) for n in report.notes] == [("base", True)]
    assert info(mine)["overlay_of"] == str(shared)
    assert info(mine)["finished"]


def test_no_store_is_made_in_a_store(shared, tmp_path):
    """Its files would belong to nothing there, and be named as such by verify."""
    (tmp_path / "link").symlink_to(shared)
    (tmp_path / "plan.json").touch()  # of some other program
    before = tree_digest(shared)
    for make in (lambda path: create_overlay(shared, path), lambda path: copy_store(shared, path)):
        for place in (shared / "inner.kdcache", tmp_path / "link" / "data.zarr" / "new" / "inner.kdcache"):
            with pytest.raises(
                CacheError, match=r"inner.kdcache: lies in the store \S+shared.kdcache; choose"
            ):
                make(place)
    assert tree_digest(shared) == before
    assert create_overlay(shared, tmp_path / "mine.kdcache").exists()


def test_more_signals_of_the_shared_teacher(shared, example, tmp_path):
    mine = create_overlay(shared, tmp_path / "mine.kdcache")
    with pytest.raises(CacheError, match=r"shared.kdcache: its teacher painn is another one"):
        add_own(mine, example, TEACHER, PROVENANCE | {"weights_sha256": "cd" * 32})
    assert not (mine / "data.zarr" / "teachers" / TEACHER).exists()
    add_own(mine, example, TEACHER)
    with Cache.open(mine, complete=True) as cache:
        assert {"node", "layer/U4", "layer/X1"} <= set(cache.teachers[TEACHER].signals)


def test_signals_that_the_shared_store_has(shared, example, tmp_path):
    store = Store.open(create_overlay(shared, tmp_path / "mine.kdcache"), "a")
    store.add_teacher(TEACHER, PROVENANCE)
    group = store.add_signal(TEACHER, node_spec(4), "fp16")
    assert store.missing_shards(group) == []
    assert store.missing_shards("atoms") == []
    for name in (group, "atoms"):
        with pytest.raises(CacheError, match="an overlay never writes to it"):
            store.shard_writer(name, 0)
    with pytest.raises(CacheError, match=r"as fp16 \(4,\), asked for fp32.*--name"):
        store.add_signal(TEACHER, node_spec(4), "fp32")
    (shared / "manifest.json").unlink()
    (shared / "log" / group / "000000.json").unlink()
    again = Store.open(store.path, "a")
    with pytest.raises(CacheError, match="unfinished; finish it there"):
        again.add_signal(TEACHER, node_spec(4), "fp16")


def test_made_self_contained(shared, example, tmp_path):
    mine = create_overlay(shared, tmp_path / "mine.kdcache")
    add_own(mine, example)
    full = tmp_path / "full.kdcache"
    expected = tree_digest(shared / "data.zarr") | tree_digest(mine / "data.zarr")
    copy_store(mine, full)
    shutil.rmtree(shared)
    shutil.rmtree(mine)
    assert tree_digest(full / "data.zarr") == expected
    assert not verify(full).notes
    with Cache.open(full, complete=True) as cache:
        assert set(cache.teachers) == {TEACHER, "mine"}


def test_a_shared_store_that_is_gone_or_another(shared, example, tmp_path):
    mine = create_overlay(shared, tmp_path / "mine.kdcache")
    add_own(mine, example)
    with Cache.open(mine) as cache:
        fingerprint = cache.fingerprint
    moved = shared.rename(tmp_path / "moved.kdcache")
    for act in (Cache.open, lambda path: Store.open(path, "a")):
        with pytest.raises(
            CacheError, match=rf"fingerprint {fingerprint}.*cannot be read.*kd cache overlay PLACE"
        ):
            act(mine)
    assert [p.kind for p in verify(mine).problems] == ["overlay"]
    other = make_example([3, 4], seed=9)
    write_all(shared, other)
    with Cache.open(shared) as cache:
        now = cache.fingerprint
    with pytest.raises(CacheError, match=rf"fingerprint is {now}.*expected {fingerprint}"):
        Cache.open(mine)
    with pytest.raises(CacheError, match=rf"is an overlay of other systems \(fingerprint {fingerprint}"):
        create_overlay(shared, mine)
    create_overlay(moved, mine)  # as the message says
    with Cache.open(mine, complete=True) as cache:
        assert "mine" in cache.teachers


def test_same_systems_with_other_labels_are_another_store(shared, example, tmp_path):
    mine = create_overlay(shared, tmp_path / "mine.kdcache")
    shutil.rmtree(shared)
    changed = make_example(example.n_atoms, seed=7)
    changed.system["energy"][1] += 1
    write_all(shared, changed)
    with pytest.raises(CacheError, match="which is another store now"):
        Cache.open(mine)


def test_what_an_overlay_cannot_be_over(shared, example, tmp_path):
    mine = create_overlay(shared, tmp_path / "mine.kdcache")
    with pytest.raises(CacheError, match="is an overlay itself"):
        create_overlay(mine, tmp_path / "second.kdcache")
    with pytest.raises(CacheError, match="is a store of its own"):
        create_overlay(shared, shared)
    with pytest.raises(CacheError, match="is an overlay; copy it to a folder"):
        send_store(mine, "s3://bucket/mine.kdcache")
    (shared / "manifest.json").unlink()
    (shared / "log" / "atoms" / "000001.json").unlink()
    with pytest.raises(CacheError, match="atoms is not finished"):
        create_overlay(shared, tmp_path / "third.kdcache")
    assert not (tmp_path / "third.kdcache").exists()


def test_looking_around_asks_no_server_that_an_overlay_names(shared, example, tmp_path):
    """Anybody may have made it, and who lists a folder has not chosen to open it."""
    mine = create_overlay(shared, tmp_path / "mine.kdcache")
    add_own(mine, example)
    document, _ = read_sealed(mine / OVERLAY, max_bytes=1 << 20, remedy="")
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/shared.kdcache"
        (mine / OVERLAY).write_bytes(seal(document | {"store": url}))
        report = verify(mine, quick=True)
        (listed,) = (one for one in list_stores(tmp_path).stores if one.store == str(mine))
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert report.ok
    assert [note.message for note in report.notes] == [f"structures and other signals lie in {url}"]
    assert listed.health == f"ok; an overlay of {url}, which was not asked (kd cache info does)"
    assert (listed.systems, listed.teachers) == (len(example.n_atoms), {"mine": {"layer/X1": "fp32"}})


def test_damaged_reference(shared, tmp_path):
    mine = create_overlay(shared, tmp_path / "mine.kdcache")
    raw = bytearray((mine / OVERLAY).read_bytes())
    raw[40] ^= 1
    (mine / OVERLAY).write_bytes(raw)
    with pytest.raises(IntegrityError, match=r"overlay.json: damaged.*kd cache overlay"):
        Cache.open(mine)


def test_nothing_is_written_to_a_shared_store_of_another_user(example, open_folder):
    """The user may read the shared store and nothing else; root could write anywhere."""
    shared = open_folder / "shared.kdcache"
    write_all(shared, example)
    for path in (shared, *shared.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    home = open_folder / "home"
    home.mkdir()
    os.chown(home, 4321, 4321)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_mode) for p in (shared, *shared.rglob("*"))}
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(4321)
            os.setuid(4321)
            mine = create_overlay(shared, home / "mine.kdcache")
            store = add_own(mine, example, TEACHER)
            assert store.groups == [f"teachers/{TEACHER}/layer/X1"]
            with pytest.raises((CacheError, PermissionError)):
                Store.open(shared, "a").add_teacher("other", PROVENANCE)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert {p: (p.stat().st_mtime_ns, p.stat().st_mode) for p in (shared, *shared.rglob("*"))} == before
    with Cache.open(home / "mine.kdcache", complete=True) as cache:
        assert "layer/X1" in cache.teachers[TEACHER].signals
