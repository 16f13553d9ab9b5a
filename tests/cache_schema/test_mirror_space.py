"""The limit of mirrors: what was used longest ago goes, what is in use stays."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from cache_example import TEACHER

from molkd.cache_schema.errors import CacheError
from molkd.cache_schema.mirror_space import MirrorSpace, mirrors_limit
from molkd.cache_schema.reader import FIELDS, Cache


def put(folder: Path, name: str, n_bytes: int, seconds_ago: float) -> Path:
    path = folder / "host" / "x.kdcache" / "data.zarr" / "atoms" / "positions" / "c" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(n_bytes))
    used = time.time() - seconds_ago
    os.utime(path, (used, used))
    return path


def bytes_in_chunks(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and "c" in p.parts)


def test_files_used_longest_ago_make_room(tmp_path):
    files = [put(tmp_path, str(k), 100, seconds_ago=1000 - k) for k in range(10)]
    metadata = files[0].parents[1] / "zarr.json"
    metadata.write_bytes(bytes(500))  # small files are not counted, and stay
    space = MirrorSpace(tmp_path, limit=1000)
    space.reserve(50)  # 1,050 would be too much: down to 900, then 50 more
    assert [f.exists() for f in files] == [False] + 9 * [True]
    assert metadata.exists()
    space.reserve(50)  # fits
    assert files[1].exists()
    space.reserve(400)
    assert [f.exists() for f in files] == 4 * [False] + 6 * [True]


def test_open_files_and_files_just_used_stay(tmp_path):
    old, older, new = (put(tmp_path, name, 100, ago) for name, ago in (("a", 900), ("b", 1000), ("c", 0)))
    with older.open("rb"):
        MirrorSpace(tmp_path, limit=200).reserve(100)
        assert (old.exists(), older.exists(), new.exists()) == (False, True, True)
    MirrorSpace(tmp_path, limit=200).reserve(100)
    assert (older.exists(), new.exists()) == (False, True)


def test_what_other_processes_fetch_is_counted(tmp_path):
    old = put(tmp_path, "old", 100, 1000)
    space = MirrorSpace(tmp_path, limit=3200)
    space.reserve(100)
    put(tmp_path, "of another process", 3100, 500)
    for _ in range(3):
        space.reserve(100)
    assert not old.exists()


def test_remains_of_dead_downloads_go(tmp_path):
    dead = put(tmp_path, f".tmp-{os.uname().nodename.replace('-', '_')}-999999999-0011aabb", 100, 100)
    MirrorSpace(tmp_path, limit=1000).reserve(1)
    assert not dead.exists()


def test_a_file_that_can_never_fit_is_refused(tmp_path):
    with pytest.raises(CacheError, match="MOLKD_CACHE_BYTES"):
        MirrorSpace(tmp_path, limit=1000).reserve(1001)


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    old = put(tmp_path, "old", 100, 1000)
    usage = shutil.disk_usage(tmp_path)._replace(free=30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CacheError, match=r"disk full \(50 bytes needed, 30 free\)"):
        MirrorSpace(tmp_path, limit=10_000).reserve(50)
    assert not old.exists()  # it was tried


@pytest.mark.parametrize(("text", "limit"), [("", 50_000_000_000), ("1e9", 10**9), ("123", 123)])
def test_the_limit_comes_from_the_environment(monkeypatch, text, limit):
    monkeypatch.setenv("MOLKD_CACHE_BYTES", text)
    assert mirrors_limit() == limit


@pytest.mark.parametrize("text", ["50GB", "-1", "0", "nan", "inf"])
def test_a_limit_that_is_no_number_is_refused(monkeypatch, text):
    monkeypatch.setenv("MOLKD_CACHE_BYTES", text)
    with pytest.raises(CacheError, match=f"MOLKD_CACHE_BYTES={text}: no number of bytes"):
        mirrors_limit()


def test_a_store_larger_than_the_limit_reads_right(web, store_path, mirrors, monkeypatch):
    """Files come, make room and come again; what is read is always what was written."""
    shutil.copytree(store_path, web.folder / "x.kdcache")
    monkeypatch.setattr("molkd.cache_schema.mirror_space._KEEP_SECONDS", 0.0)
    limit = bytes_in_chunks(store_path) // 3
    monkeypatch.setenv("MOLKD_CACHE_BYTES", str(limit))
    with Cache.open(store_path) as cache:
        systems = np.arange(cache.n_systems)
        expected = [cache.read([k], FIELDS, TEACHER, ("node", "v2v", "edge")) for k in systems]
    n_fetched = len(web.asked)
    with Cache.open(web.url("x.kdcache")) as cache:
        for _ in range(2):
            for k in systems:
                found = cache.read([k], FIELDS, TEACHER, ("node", "v2v", "edge"))
                cache.close()
                for name, values in expected[k].items():
                    np.testing.assert_array_equal(found[name], values)
        held = bytes_in_chunks(mirrors)
    fetched = [p for p in web.asked[n_fetched:] if "/c/" in p and "/systems/" not in p]
    assert len(fetched) > len(set(fetched))
    assert 0 < held <= limit
