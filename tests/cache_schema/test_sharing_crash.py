"""Copies and merges that are killed, and stores that several users write: nothing is lost or left."""

import json
import os
import stat
import traceback

import pytest
from cache_example import make_example, tree_digest, write_all

from molkd.cache_schema.reader import Cache
from molkd.cache_schema.verify import verify
from molkd.pipeline.sharing.copying import copy_store

N_KILLS = 8
GROUP, ANNA, BEN = 4300, 4321, 4322


@pytest.mark.slow
def test_killed_and_run_again(run_script, tmp_path):
    results = json.loads(run_script("sharing_crashes.py", tmp_path, N_KILLS))
    for name, result in results.items():
        assert result["wrong"] == [], name
        assert result["kills"] == N_KILLS, (name, result)
        assert result["changes"] > 30, (name, result)


def as_user(uid, act):
    """Run it in a process of this user, who belongs to the shared group; umask 002 as labs set it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setgroups([GROUP])
            os.setgid(uid)
            os.setuid(uid)
            os.umask(0o002)
            act()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def test_two_users_of_one_group_write_one_store(open_folder, example):
    """Anna copies structures into a folder of the group, Ben adds signals; each may go on with it."""
    source = open_folder / "source.kdcache"
    write_all(source, example)
    lab = open_folder / "lab"
    lab.mkdir()
    os.chown(lab, 0, GROUP)
    lab.chmod(0o2775)  # setgid: what is made inside belongs to the group
    target = lab / "a.kdcache"
    assert as_user(ANNA, lambda: copy_store(source, target, signals=("none",))) == 0
    assert as_user(BEN, lambda: copy_store(source, target, signals=("node",))) == 0
    assert as_user(ANNA, lambda: copy_store(source, target)) == 0
    owners = set()
    for path in (target, *target.rglob("*")):
        found = path.stat()
        owners.add(found.st_uid)
        assert found.st_gid == GROUP, path
        mode = stat.S_IMODE(found.st_mode)
        if path.is_dir():
            assert mode == 0o2775, (path, oct(mode))
        else:
            assert mode == 0o664, (path, oct(mode))
    assert owners == {ANNA, BEN}
    assert tree_digest(target / "data.zarr") == tree_digest(source / "data.zarr")
    report = verify(target)
    assert report.ok
    assert report.notes == []
    assert [p for p in lab.rglob("*") if "lock" in p.name.lower()] == []


def test_a_private_umask_stays_private(open_folder):
    source = open_folder / "source.kdcache"
    write_all(source, make_example([5, 6]))
    home = open_folder / "home"
    home.mkdir()
    os.chown(home, ANNA, ANNA)

    def private():
        os.umask(0o077)
        copy_store(source, home / "a.kdcache")

    assert as_user(ANNA, private) == 0
    for path in (home / "a.kdcache", *(home / "a.kdcache").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    with Cache.open(home / "a.kdcache", complete=True) as cache:
        assert cache.n_systems == 2
