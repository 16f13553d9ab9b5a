"""Reading stores from servers: what arrives is what was written, and only what is needed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cache_example import PROVENANCE, TEACHER, create, tree_digest, write_all, write_shard
from remote_example import NAMES, NODE, assert_same, read_all

from molkd.cache_schema.errors import CacheError, IntegrityError
from molkd.cache_schema.fields import node_spec
from molkd.cache_schema.fitting import fit_codebook
from molkd.cache_schema.manifest import finalize, info
from molkd.cache_schema.overlay import create_overlay
from molkd.cache_schema.reader import FIELDS, Cache
from molkd.cache_schema.remote import find_stores, is_url, open_mirror
from molkd.cache_schema.verify import verify
from molkd.cache_schema.writer import Store


def test_what_is_a_url():
    assert all(map(is_url, ("s3://b/x", "gs://b/x", "az://b/x", "http://h/x", "https://h/x", "ftp://h/x")))
    assert not any(map(is_url, ("x.kdcache", "/data/x", "C:/x", "s3:/b/x", Path("x"))))


def test_a_store_behind_a_web_server_reads_as_the_local_one(web, published, local):
    assert_same(web.url("x.kdcache"), local)
    assert_same(web.url("x.kdcache/"), local)


def test_a_store_in_a_bucket_reads_as_the_local_one(s3, local):
    s3.upload(local, "pre fix/copied.kdcache")
    assert_same(s3.url("pre fix/copied.kdcache"), local)


def test_opening_fetches_no_shard_and_reading_only_what_it_needs(web, published):
    with Cache.open(web.url("x.kdcache")) as cache:
        assert not [path for path in web.asked if "/atoms/" in path and "/c/" in path]
        before = len(web.asked)
        cache.read([0], ("positions",))
        cache.read([0], ("positions",), TEACHER, ("node",))
    shards = [path.removeprefix("/x.kdcache/data.zarr/") for path in web.asked[before:]]
    assert shards == ["atoms/positions/c/0/0", f"{NODE}/c/0/0"]


def test_a_second_opening_fetches_plan_and_manifest_only(web, published, local):
    assert_same(web.url("x.kdcache"), local)
    before = len(web.asked)
    assert_same(web.url("x.kdcache"), local)
    assert sorted(web.asked[before:]) == ["/x.kdcache/manifest.json", "/x.kdcache/plan.json"]


def test_the_mirror_holds_the_same_files(web, published, local, mirrors):
    read_all(web.url("x.kdcache"))
    (folder,) = mirrors.iterdir()
    mirrored = tree_digest(folder / "x.kdcache")
    assert mirrored == {name: sha for name, sha in tree_digest(local).items() if not name.startswith("log/")}


def test_info_and_verify_take_urls(web, published, local):
    url = web.url("x.kdcache")
    described = info(url)
    assert described["path"] == url
    assert described["finished"]
    assert described["teachers"] == info(local)["teachers"]
    quick = verify(url, quick=True)
    assert quick.ok, quick.problems
    full = verify(url)
    assert full.ok, full.problems
    assert not full.notes


def test_signals_published_later_appear_and_other_values_replace_old_ones(
    web, published, local, example, tmp_path
):
    url = web.url("x.kdcache")
    assert_same(url, local)
    changed = tmp_path / "changed.kdcache"
    example.signals["node"] = example.signals["node"] + 1
    try:
        write_all(changed, example)
    finally:
        example.signals["node"] = example.signals["node"] - 1
    shutil.rmtree(published)
    shutil.copytree(changed, published)
    before = len(web.asked)
    assert_same(url, changed)
    fetched = [path for path in web.asked[before:] if "/c/" in path]
    assert fetched
    assert all(f"{TEACHER}/node/" in path for path in fetched)  # the rest is what it was


def test_several_processes_share_a_mirror(web, published, local, mirrors):
    code = (
        "import sys, numpy as np; from molkd.cache_schema.reader import FIELDS, Cache\n"
        "with Cache.open(sys.argv[1]) as c:\n"
        "    a = c.read(np.arange(len(c)), FIELDS, sys.argv[2], sys.argv[3].split(','))\n"
        "np.savez(sys.argv[4], **a)"
    )
    outs = [mirrors.parent / f"{k}.npz" for k in range(3)]
    commands = [
        [sys.executable, "-c", code, web.url("x.kdcache"), TEACHER, ",".join(NAMES), str(out)] for out in outs
    ]
    for process in [subprocess.Popen(command) for command in commands]:
        assert process.wait() == 0
    expected = read_all(local)
    for out in outs:
        with np.load(out) as found:
            for name, values in expected.items():
                np.testing.assert_array_equal(found[name], values)
    assert not list(mirrors.rglob(".tmp-*"))


@pytest.mark.parametrize("damage", [False, True])
def test_fitted_encodings_bring_their_codebooks(web, example, tmp_path, damage):
    store = create(tmp_path / "fitted.kdcache", example)
    store.add_teacher(TEACHER, PROVENANCE)
    values = example.signals["node"]
    spec = node_spec(values.shape[1])
    codebook = fit_codebook(values, spec, "int8", len(example.n_atoms))
    group = store.add_signal(TEACHER, spec, "int8", codebook)
    for name in ("atoms", group):
        for shard in store.missing_shards(name):
            write_shard(store, example, name, shard)
    finalize(store)
    served = shutil.copytree(store.path, web.folder / "fitted.kdcache")
    with Cache.open(store.path) as cache:
        expected = cache.read(range(len(cache)), (), TEACHER, ("node",))
    if damage:
        path = served / f"data.zarr/{group}/step/c/0"
        raw = bytearray(path.read_bytes())
        raw[2] ^= 1
        path.write_bytes(raw)
        with pytest.raises(IntegrityError, match=f"{group}/step/c/0: has sha256"):
            Cache.open(web.url("fitted.kdcache"))
        return
    with Cache.open(web.url("fitted.kdcache")) as cache:
        found = cache.read(range(len(cache)), (), TEACHER, ("node",))
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    assert verify(web.url("fitted.kdcache")).ok


def test_an_overlay_lies_over_a_store_on_a_server(web, published, local, example, tmp_path):
    mine = create_overlay(web.url("x.kdcache"), tmp_path / "mine.kdcache")
    store = Store.open(mine, "a")
    store.add_teacher("own", PROVENANCE)
    group = store.add_signal("own", node_spec(4), "fp32")
    stored = read_all(local)
    for shard in store.missing_shards(group):
        systems = store.systems_of_shard(shard)
        with store.shard_writer(group, shard) as writer, Cache.open(local) as cache:
            writer.write({"values": cache.read(list(systems), (), TEACHER, ("node",))["teacher/node"]})
    with Cache.open(mine) as cache:
        both = cache.read(range(len(cache)), FIELDS, "own", ("node",))
        np.testing.assert_array_equal(both["teacher/node"], stored["teacher/node"])
        np.testing.assert_array_equal(both["positions"], stored["positions"])
        np.testing.assert_array_equal(
            cache.read([3], (), TEACHER, ("v2v",))["teacher/v2v"],
            read_all(web.url("x.kdcache"))["teacher/v2v"][_rows(cache, 3)],
        )


def _rows(cache: Cache, system: int) -> slice:
    begin = int(cache.system_n_atoms[:system].sum())
    return slice(begin, begin + int(cache.system_n_atoms[system]))


def test_stores_in_a_bucket_are_listed(s3, local):
    for name in ("caches/a.kdcache", "caches/deep/er/b.kdcache"):
        s3.upload(local, name)
    s3.put("caches/notes.txt", b"no store")
    assert sorted(find_stores(s3.url("caches"))) == [
        s3.url("caches/a.kdcache"),
        s3.url("caches/deep/er/b.kdcache"),
    ]
    report = verify(s3.url("caches/a.kdcache"), quick=True)
    assert report.ok, report.problems
    s3.put(f"caches/a.kdcache/data.zarr/{NODE}/c/0/0", b"short")
    s3.delete(f"caches/a.kdcache/data.zarr/{NODE}/c/1/0")
    report = verify(s3.url("caches/a.kdcache"), quick=True)
    assert [(p.kind, p.path) for p in report.problems] == [
        ("size", f"data.zarr/{NODE}/c/0/0"),
        ("missing", f"data.zarr/{NODE}/c/1/0"),
    ]


def test_web_servers_have_no_listings(web):
    with pytest.raises(CacheError, match="has no listings"):
        list(find_stores(web.url("")))


def test_nothing_is_written_to_a_store_on_a_server(web, published, example):
    with pytest.raises(CacheError, match="copy it to a local folder first"):
        Store.open(web.url("x.kdcache"), "a")
    with pytest.raises(CacheError, match="copy it to a local folder first"):
        write_all(web.url("x.kdcache"), example)


def test_without_the_extra_the_error_names_it(monkeypatch, mirrors):
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(CacheError, match=r"needs the extra s3; install it with pip install 'molkd\[s3\]'"):
        open_mirror("s3://lab/x.kdcache")


def test_opening_local_stores_does_not_import_the_library(local):
    code = (
        "import sys; from molkd.cache_schema.reader import Cache\n"
        f"Cache.open({str(local)!r}); print('obstore' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_forked_child_gets_an_error_instead_of_hanging(web, published):
    with Cache.open(web.url("x.kdcache")) as cache:
        cache.read([0], ("positions",))
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                cache.read([0], ("positions",))  # is there
                cache.read([0], ("forces",))
            except CacheError as error:
                code = 0 if "forked" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
