"""Stage one killed at any moment, run twice at once, or out of space: what is committed stays."""

import errno
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from forked_commands import run, start
from stage_one_cases import assert_same_files, files, write_teacher

from molkd.cache_schema.errors import CacheError
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.verify import verify
from molkd.pipeline.caching import cache_teacher
from molkd.pipeline.config import CacheConfig
from molkd.pipeline.teachers.load import load_teacher

N_CRASHES = 10
N_EDGE_CRASHES = 6
SIGNALS = ("energy", "forces", "node", "v2v")
PAGE = os.sysconf("SC_PAGE_SIZE")
_SCRIPT = Path(sys.executable).with_name("kd")
KD = [str(_SCRIPT)] if _SCRIPT.exists() else [sys.executable, "-c", "from molkd.cli import main; main()"]


def command(store, teacher_file, data=None, signals=SIGNALS):
    data_and_store = [store] if data is None else [data, store]
    options = ["--teacher", teacher_file, "--signals", ",".join(signals), "--batch-atoms", 256]
    return ["cache-teacher", *data_and_store, *options]


@pytest.fixture(scope="module")
def uninterrupted(made, tmp_path_factory):
    """The store that nothing happened to, how many changes on disk made it, and how long that took."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    store = shutil.copytree(made / "train.kdcache", folder / "train.kdcache")
    assert run(["--version"], folder / "log").wait() == 0  # imports the packages, once for all runs
    began = time.monotonic()
    done = run(command(store, made / "teacher.safetensors"), folder / "log", watched=store)
    assert done.wait() == 0, done.text
    return store, int((folder / "log.count").read_text()), time.monotonic() - began


def assert_finished(store, expected):
    """Nothing tells this store from one that was never interrupted, but times and processes in the log."""
    report = verify(store)
    assert report.ok
    assert report.notes == []  # no temporary file left
    assert_same_files(store / "data.zarr", expected / "data.zarr")
    assert (store / "manifest.json").read_bytes() == (expected / "manifest.json").read_bytes()


def commits(store):
    return sorted(p.relative_to(store) for p in (store / "log" / "teachers").rglob("*.json"))


@pytest.mark.slow
def test_killed_before_any_change_on_disk(uninterrupted, made, teacher_file, tmp_path):
    expected, n_changes, _ = uninterrupted
    assert n_changes > 50  # groups, files, renames and records of two shards of four signals
    for point in np.linspace(1, n_changes, N_CRASHES).astype(int).tolist():
        store = shutil.copytree(made / "train.kdcache", tmp_path / f"{point}.kdcache")
        killed = run(command(store, teacher_file), tmp_path / "log", watched=store, kill_at=point)
        assert killed.wait() == -signal.SIGKILL, f"change {point}: {killed.text}"
        before = {p: (store / p).read_bytes() for p in commits(store)}
        assert verify(store).ok, f"change {point}"  # in between, too, what is committed is whole
        resumed = run(command(store, teacher_file), tmp_path / "log")
        assert resumed.wait() == 0, f"change {point}: {resumed.text}"
        assert_finished(store, expected)
        assert before.items() <= {p: (store / p).read_bytes() for p in commits(store)}.items()  # not redone


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["painn-direct", "gemnet"])
def test_edges_of_a_killed_run_are_those_of_a_run_that_was_not(made, tmp_path, kind):
    """How many rows of edges a shard has is known only when it is written."""
    teacher = write_teacher(tmp_path / "teacher", kind)
    bare = made / "train.kdcache"

    def arguments(store):
        return command(store, teacher, signals=("energy", "edge"))

    expected = shutil.copytree(bare, tmp_path / "expected.kdcache")
    done = run(arguments(expected), tmp_path / "log", watched=expected)
    assert done.wait() == 0, done.text
    n_changes = int((tmp_path / "log.count").read_text())
    with Cache.open(expected, complete=True) as cache:
        assert len(np.unique(cache.systems.shard)) == 2
        assert cache.teachers["teacher"].signals["edge"].n_rows > 5 * cache.n_atoms
    for point in np.linspace(1, n_changes, N_EDGE_CRASHES).astype(int).tolist():
        store = shutil.copytree(bare, tmp_path / f"{point}.kdcache")
        killed = run(arguments(store), tmp_path / "log", watched=store, kill_at=point)
        assert killed.wait() == -signal.SIGKILL, f"change {point}: {killed.text}"
        assert verify(store).ok, f"change {point}"
        resumed = run(arguments(store), tmp_path / "log")
        assert resumed.wait() == 0, f"change {point}: {resumed.text}"
        assert_finished(store, expected)


@pytest.mark.slow
def test_killed_again_and_again_at_random_times(uninterrupted, made, teacher_file, tmp_path):
    """Each run goes on where the one before was killed; after one that got through, a new store begins."""
    expected, _, seconds = uninterrupted
    rng = np.random.default_rng(0)
    n_killed, store = 0, tmp_path / "none"
    for attempt in range(30):
        if not store.exists():
            store = shutil.copytree(made / "train.kdcache", tmp_path / f"{attempt}.kdcache")
        started = start(command(store, teacher_file), tmp_path / "log")
        if n_killed < 4:
            time.sleep(rng.uniform(0, seconds))
            started.process.kill()
        code = started.wait()
        assert code in (0, -signal.SIGKILL), started.text
        assert verify(store).ok
        if code == 0:
            assert_finished(store, expected)
            if n_killed == 4:
                return
            store = tmp_path / "none"
        else:
            n_killed += 1
    raise AssertionError(f"only {n_killed} of 30 runs were killed in time")


@pytest.mark.slow
def test_installed_command_killed_after_its_first_shard(uninterrupted, teacher_file, store, tmp_path):
    arguments = [*KD, *(str(a) for a in command(store, teacher_file))]
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_for(lambda: commits(store), process.poll)
    process.kill()
    process.wait()
    assert len(commits(store)) < 2 * len(SIGNALS)
    done = subprocess.run([*arguments, "--json"], check=True, capture_output=True, text=True)
    assert '"n_computed"' in done.stdout
    assert_finished(store, uninterrupted[0])


@pytest.mark.slow
def test_ingest_killed_before_any_change_on_disk(made, tmp_path):
    def ingest(store):
        return ["ingest", made / "train.extxyz", store, "--shard-atoms", 1024]

    assert run(ingest(tmp_path / "n.kdcache"), tmp_path / "log", watched=tmp_path).wait() == 0
    n_changes = int((tmp_path / "log.count").read_text())
    for point in np.linspace(2, n_changes, 6).astype(int).tolist():
        store = tmp_path / f"{point}" / "train.kdcache"
        store.parent.mkdir()
        killed = run(ingest(store), tmp_path / "log", watched=tmp_path, kill_at=point)
        assert killed.wait() == -signal.SIGKILL, killed.text
        resumed = run(ingest(store), tmp_path / "log")
        assert resumed.wait() == 0, f"change {point}: {resumed.text}"
        assert_same_files(store / "data.zarr", made / "train.kdcache" / "data.zarr")
        assert (store / "plan.json").read_bytes() == (made / "train.kdcache" / "plan.json").read_bytes()
        assert [p.name for p in store.parent.iterdir()] == [store.name]  # no half-made folder beside it
        assert verify(store).notes == []


@pytest.mark.slow
@pytest.mark.parametrize("from_data", [False, True], ids=["one store", "ingesting, too"])
def test_two_processes_at_once(uninterrupted, made, teacher_file, tmp_path, from_data):
    for k in range(2):
        store = tmp_path / f"{k}.kdcache"
        data = made / "train.extxyz" if from_data else None
        if not from_data:
            shutil.copytree(made / "train.kdcache", store)
        pair = [start(command(store, teacher_file, data), tmp_path / f"log-{i}") for i in range(2)]
        codes = [started.wait() for started in pair]
        texts = [started.text for started in pair]
        assert 0 in codes, texts
        for code, text in zip(codes, texts, strict=True):
            assert code in (0, 1), text
            assert code == 0 or (text.count("error: ") == 1 and str(store) in text), text
        report = verify(store)
        assert report.ok
        assert report.notes == []
        if not from_data:  # ingested here, the shards are fewer and larger
            assert_finished(store, uninterrupted[0])


@pytest.mark.slow
def test_two_teachers_of_one_name_at_once(made, teacher_file, tmp_path):
    """One of them is in the store afterwards, whole; the other was told so."""
    other = write_teacher(tmp_path / "teacher", seed=4)
    store = shutil.copytree(made / "train.kdcache", tmp_path / "train.kdcache")
    pair = [start(command(store, t), tmp_path / f"log-{t.parent.name}") for t in (teacher_file, other)]
    codes = [started.wait() for started in pair]
    assert sorted(codes) == [0, 1]
    assert "teacher teacher is another one (weights_sha256" in pair[codes.index(1)].text
    winner = load_teacher(str((teacher_file, other)[codes.index(0)])).info.weights_sha256
    with Cache.open(store, complete=True) as cache:
        assert cache.teachers["teacher"].provenance["weights_sha256"] == winner
    report = verify(store)
    assert report.ok
    assert report.notes == []


def test_interrupted_from_the_keyboard(uninterrupted, teacher_file, store, tmp_path):
    started = start(command(store, teacher_file), tmp_path / "log")
    wait_for(lambda: commits(store), lambda: started.process.exitcode)
    os.kill(started.process.pid, signal.SIGINT)
    assert started.wait() == 130, started.text
    assert started.text.endswith("interrupted; the same command continues\n")
    assert "Traceback" not in started.text
    assert list(store.rglob(".tmp-*")) == []
    assert run(command(store, teacher_file), tmp_path / "log").wait() == 0
    assert_finished(store, uninterrupted[0])


def test_disk_full_in_the_second_shard(uninterrupted, teacher_file, store, monkeypatch):
    """The device refuses to make the files of the second shard durable."""
    config = CacheConfig(store=store, teacher=str(teacher_file), signals=SIGNALS, batch_atoms=256)
    real = os.fsync

    def fsync(fd):
        if len(commits(store)) == len(SIGNALS):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises(CacheError, match=r"disk full \([\d,]+ bytes needed, [\d,]+ bytes free\); free"):
            cache_teacher(config)
    assert len(commits(store)) == len(SIGNALS)
    assert verify(store).ok
    assert list(store.rglob(".tmp-*")) == []  # what was half written gives its space back
    assert cache_teacher(config).n_computed == len(Cache.open(store)) - first_shard(store)
    assert_finished(store, uninterrupted[0])


def first_shard(store):
    with Cache.open(store) as cache:
        return int((cache.systems.shard == 0).sum())


def test_files_may_not_grow(uninterrupted, teacher_file, store, tmp_path):
    """A quota on the size of files: v2v is cut, and the limit is no traceback."""
    limited = run(command(store, teacher_file), tmp_path / "log", file_bytes=30_000)
    assert limited.wait() == 1, limited.text
    assert "cannot write (File too large" in limited.text.splitlines()[-1]
    assert "Traceback" not in limited.text
    assert verify(store).ok
    assert run(command(store, teacher_file), tmp_path / "log").wait() == 0
    assert_finished(store, uninterrupted[0])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="no program unshare to mount a small disk with")
def test_a_disk_that_is_really_full(uninterrupted, made, teacher_file, tmp_path):
    """On a file system with room for the structures and half of the signals."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    size = (pages(made / "train.kdcache") + pages(uninterrupted[0])) // 2 * PAGE
    probe = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(disk)], capture_output=True)
    if probe.returncode:
        pytest.skip(f"no file system can be mounted here ({probe.stderr.decode().strip()})")
    arguments = [*KD, "--quiet", *(str(a) for a in command(disk / "s.kdcache", teacher_file))]
    script = (
        f"mount -t tmpfs -o size={size} none {disk} && "
        f"cp -r {made / 'train.kdcache'} {disk / 's.kdcache'} && "
        f"{shlex.join(arguments)}; code=$?; cp -r {disk / 's.kdcache'} {kept}; exit $code"
    )
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1
    assert "disk full" in done.stderr
    assert "finished shards are kept" in done.stderr
    report = verify(kept)
    assert report.ok
    assert [n for n in report.notes if n.kind == "temporary"] == []


def pages(folder):
    """Return how much a file system in memory needs for a folder."""
    return sum(-(-len(content) // PAGE) for content in files(folder).values())


def wait_for(condition, ended, seconds=60.0):
    """Wait until a condition holds; the process must not end before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert ended() is None, "ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.002)
