"""A killed writer leaves a committed shard or nothing that counts; the same command finishes the work."""

import json
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cache_example import add_signals, create, make_example, shard_arrays, tree_digest, write_all, write_shard

from molkd.cache_schema import array_file, files, shard_writer
from molkd.cache_schema.errors import CacheError
from molkd.cache_schema.files import TMP_PREFIX, host_name, is_abandoned
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.verify import verify
from molkd.cache_schema.writer import Store

HERE = Path(__file__).parent


def test_killed_before_any_operation_and_resumed(run_script, tmp_path):
    """Every 23rd file operation of a run; `crash_points.py FOLDER 1` tries all of them."""
    outcome = json.loads(run_script("crash_points.py", tmp_path, 23))
    assert outcome["wrong"] == []
    assert outcome["kills"] >= 20
    assert outcome["partial"] >= 1  # some kills fell between two shards


def test_killed_at_any_time(tmp_path, example):
    """Kill -9 from outside, at moments nobody chose, again and again until the work is done."""
    code = (
        "import sys; from cache_example import *; "
        "write_all(Path(sys.argv[1]), make_example([400] * 60, seed=3), 1024)"
    )
    path = tmp_path / "x.kdcache"
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    kills, wait = 0, 0.5
    while True:
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], env=environment)
        try:
            process.wait(wait)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            wait *= 1.3
        if path.exists():
            assert verify(path).problems == []
    assert process.returncode == 0
    assert kills
    write_all(tmp_path / "reference.kdcache", make_example([400] * 60, seed=3), 1024)
    assert tree_digest(path / "data.zarr") == tree_digest(tmp_path / "reference.kdcache" / "data.zarr")
    report = verify(path)
    assert report.ok
    assert report.notes == []


@pytest.mark.parametrize("locks", ["locks", "no-locks"])
def test_two_writers_with_equal_values_agree(run_script, tmp_path, locks):
    for round_ in json.loads(run_script("writer_race.py", tmp_path, 15, "same", locks)):
        assert round_ == {"messages": ["", ""], "committed": True, "damage": [], "temporary": 0}


@pytest.mark.parametrize("locks", ["locks", "no-locks"])
def test_two_writers_with_different_values(run_script, tmp_path, locks):
    """One is told about the other; what is committed is one writer's work, never a mixture."""
    for round_ in json.loads(run_script("writer_race.py", tmp_path, 15, "different", locks)):
        assert round_["damage"] == []
        assert round_["temporary"] == 0
        told = [m for m in round_["messages"] if m]
        assert told
        for message in told:
            assert "shard 0 of atoms" in message
            assert "process" in message
            assert host_name() in message
        if locks == "locks":
            assert len(told) == 1
            assert round_["committed"]
            assert "already committed by" in told[0]


def test_a_committed_shard_is_never_overwritten(store_path, example):
    store = Store.open(store_path, "a")
    store.input_index = create(store_path, example).input_index
    before = tree_digest(store_path)
    write_shard(store, example, "atoms", 0)  # the same values: discarded
    arrays = shard_arrays(store, example, "atoms", 0)
    arrays["tags"] = arrays["tags"] ^ 1
    writer = store.shard_writer("atoms", 0)
    with (
        pytest.raises(
            CacheError, match=rf"shard 0 of atoms was already committed by process {os.getpid()} on"
        ),
        writer,
    ):
        writer.write(arrays)
    assert tree_digest(store_path) == before


def test_a_race_lost_between_files_and_record_leaves_no_record(tmp_path, example, monkeypatch):
    """Without locks: the other writer commits after our files took their places."""
    store = create(tmp_path / "x.kdcache", example)
    other = Store.open(store.path, "a")
    other.input_index = store.input_index
    write_file = shard_writer.write_file

    def late(target, data, replace):
        monkeypatch.setattr(shard_writer, "write_file", write_file)
        monkeypatch.setattr(shard_writer, "exclusive", lambda folder: files.contextlib.nullcontext())
        write_shard(other, example, "atoms", 0)
        return write_file(target, data, replace=replace)

    monkeypatch.setattr(shard_writer, "write_file", late)
    monkeypatch.setattr(shard_writer, "exclusive", lambda folder: files.contextlib.nullcontext())
    arrays = shard_arrays(store, example, "atoms", 0)
    arrays["tags"] = arrays["tags"] ^ 1
    with pytest.raises(CacheError, match="left uncommitted"), store.shard_writer("atoms", 0) as writer:
        writer.write(arrays)
    assert 0 in store.missing_shards("atoms")
    assert verify(store.path).ok


# ---------------------------------------------------------------------------------------------- full disk


def test_full_disk(tmp_path, example, monkeypatch):
    store = create(tmp_path / "x.kdcache", example)
    (group, *_) = add_signals(store)
    for shard in range(store.plan.n_shards):
        if shard != 1:
            write_shard(store, example, group, shard)
    before = tree_digest(store.path)

    def full(self, data):
        raise OSError(28, "No space left on device", str(self.temporary))

    with monkeypatch.context() as patch:
        patch.setattr(array_file.ArrayFile, "_write", full)
        with pytest.raises(
            CacheError, match=r"disk full \([\d,]+ bytes needed, [\d,]+ bytes free\); free some space"
        ):
            write_shard(store, example, group, 1)
    assert tree_digest(store.path) == before
    write_shard(store, example, group, 1)
    assert store.missing_shards(group) == []


def test_a_real_limit_on_file_size(tmp_path, example):
    """The kernel refuses to write on, in the middle of a buffered write."""
    store = create(tmp_path / "x.kdcache", example)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
    try:
        with pytest.raises(CacheError, match=r"cannot write \(File too large"):
            write_shard(store, example, "atoms", 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not [p for p in store.path.rglob("*") if p.name.startswith(TMP_PREFIX)]
    assert 0 in store.missing_shards("atoms")


def test_creating_on_a_full_disk_leaves_nothing(tmp_path, example, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CacheError, match="disk full"):
        create(tmp_path / "x.kdcache", example)
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------- rights, left-overs


def test_files_follow_umask_and_setgid(tmp_path, example):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o2775)
    before = os.umask(0o002)
    try:
        write_all(shared / "x.kdcache", example)
    finally:
        os.umask(before)
    for path in (shared / "x.kdcache").rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o2775 if path.is_dir() else 0o664), path


def test_an_empty_folder_made_beforehand_keeps_its_rights(tmp_path, example):
    (tmp_path / "x.kdcache").mkdir()
    (tmp_path / "x.kdcache").chmod(0o2750)
    create(tmp_path / "x.kdcache", example)
    assert stat.S_IMODE((tmp_path / "x.kdcache").stat().st_mode) == 0o2750
    assert Cache.open(tmp_path / "x.kdcache").n_systems == 12


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_only_dead_writers_left_overs_are_swept(tmp_path, example):
    store = create(tmp_path / "x.kdcache", example)
    folder = store.path / "data.zarr/atoms/positions/c/0"
    folder.mkdir(parents=True)
    dead = folder / f"{TMP_PREFIX}{host_name()}-{dead_pid()}-aaaa"
    living = folder / f"{TMP_PREFIX}{host_name()}-{os.getpid()}-bbbb"
    fresh_foreign = folder / f"{TMP_PREFIX}elsewhere-1-cccc"
    old_foreign = folder / f"{TMP_PREFIX}elsewhere-1-dddd"
    for path in (dead, living, fresh_foreign, old_foreign):
        path.write_bytes(b"x")
    os.utime(old_foreign, (time.time() - 2 * 86400,) * 2)
    Store.open(store.path, "r")
    assert dead.exists()
    Store.open(store.path, "a")
    assert sorted(p.name for p in folder.iterdir()) == sorted([living.name, fresh_foreign.name])


def test_a_locked_temporary_file_is_alive_whatever_its_name(tmp_path):
    path, fd = files.open_temporary(tmp_path / "0")
    renamed = path.rename(tmp_path / f"{TMP_PREFIX}{host_name()}-{dead_pid()}-eeee")
    try:
        assert not is_abandoned(renamed)  # a writer in another process namespace
    finally:
        os.close(fd)
    assert is_abandoned(renamed)


def test_file_systems_without_hard_links(tmp_path, example, monkeypatch):
    def refuse(self, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    write_all(tmp_path / "x.kdcache", example)
    assert verify(tmp_path / "x.kdcache").ok
    np.testing.assert_array_equal(Cache.open(tmp_path / "x.kdcache").system_n_atoms.sum(), 3164)
