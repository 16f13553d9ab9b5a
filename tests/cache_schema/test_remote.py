"""Reading stores from servers: what arrives is what was written, and what does not is refused by name."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cache_example import SIGNALS, TEACHER, tree_digest, write_all

from molkd.cache_schema.errors import CacheError, IntegrityError
from molkd.cache_schema.jsonfile import read_sealed, seal
from molkd.cache_schema.layout import MAX_MANIFEST_BYTES
from molkd.cache_schema.manifest import info
from molkd.cache_schema.reader import FIELDS, Cache
from molkd.cache_schema.remote import is_url, open_mirror
from molkd.cache_schema.verify import verify
from molkd.cache_schema.writer import Store

NAMES = tuple(spec.name for spec, _ in SIGNALS)
NODE = f"teachers/{TEACHER}/node/values"


@pytest.fixture(scope="module")
def local(tmp_path_factory, example):
    path = tmp_path_factory.mktemp("local") / "x.kdcache"
    write_all(path, example)
    return path


@pytest.fixture
def published(web, local):
    """The store behind a web server; returns the folder served, which tests may damage."""
    return shutil.copytree(local, web.folder / "x.kdcache")


def read_all(store) -> dict[str, np.ndarray]:
    with Cache.open(store) as cache:
        return cache.read(np.arange(cache.n_systems), FIELDS, TEACHER, NAMES)


def assert_same(store, local) -> None:
    found, expected = read_all(store), read_all(local)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def rewrite_manifest(path: Path, change) -> None:
    """Change a manifest and seal it again, as a hostile server can."""
    document, _ = read_sealed(path, max_bytes=MAX_MANIFEST_BYTES, remedy="")
    change(document)
    path.write_bytes(seal(document))


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


def test_what_decays_in_the_mirror_is_found_and_comes_anew(web, published, local, mirrors):
    url = web.url("x.kdcache")
    assert_same(url, local)
    (path,) = mirrors.rglob(f"{NODE}/c/1/0")
    raw = bytearray(path.read_bytes())
    raw[7] ^= 1
    path.write_bytes(raw)
    with pytest.raises(IntegrityError, match="run the same command again to fetch it anew"):
        read_all(url)
    assert_same(url, local)
    path.write_bytes(raw[:-1])  # a crash of the machine
    (mirrors.rglob("systems/id/c/0/0").__next__()).write_bytes(b"")
    assert_same(url, local)


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


@pytest.mark.parametrize("quick", [True, False])
def test_verify_names_a_file_that_the_server_lost(web, published, quick):
    (published / f"data.zarr/{NODE}/c/1/0").unlink()
    report = verify(web.url("x.kdcache"), quick=quick)
    assert [p.path for p in report.problems] == [f"data.zarr/{NODE}/c/1/0"]


def test_verify_names_a_damaged_file(web, published):
    path = published / f"data.zarr/{NODE}/c/1/0"
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes(raw)
    (problem,) = verify(web.url("x.kdcache")).problems
    assert (problem.kind, problem.path) == ("checksum", f"data.zarr/{NODE}/c/1/0")


@pytest.mark.parametrize("damage", ["flip", "truncate", "lengthen", "remove"])
def test_a_damaged_shard_is_found_and_named_and_leaves_nothing(web, published, mirrors, damage):
    path = published / f"data.zarr/{NODE}/c/1/0"
    raw = bytearray(path.read_bytes())
    if damage == "flip":
        raw[len(raw) // 2] ^= 16
        path.write_bytes(raw)
    elif damage == "truncate":
        path.write_bytes(raw[:-1])
    elif damage == "lengthen":
        path.write_bytes(raw + b"x")
    else:
        path.unlink()
    with Cache.open(web.url("x.kdcache")) as cache:
        shard = np.flatnonzero(cache.systems.shard == 1)
        with pytest.raises(IntegrityError, match=rf"{web.url('x.kdcache')}/data.zarr/{NODE}/c/1/0: "):
            cache.read(shard, (), TEACHER, ("node",))
        cache.read(shard, (), TEACHER, ("v2v",))  # the rest of the store is used on
    assert not list(mirrors.rglob("node/values/c/1/*"))


def test_a_damaged_download_is_fetched_again(web, published, local, monkeypatch):
    import obstore

    real, damaged = obstore.get, []

    class Flipped:
        def __init__(self, answer):
            self.meta, self._answer = answer.meta, answer

        def stream(self, **options):
            return iter([bytes(b ^ 1 for b in bytes(piece)) for piece in self._answer.stream(**options)])

    def get(store, path, **options):
        answer = real(store, path, **options)
        if "/c/" not in path or path in damaged:
            return answer
        damaged.append(path)
        return Flipped(answer)

    monkeypatch.setattr(obstore, "get", get)
    assert_same(web.url("x.kdcache"), local)
    assert any(NODE in path for path in damaged)


@pytest.mark.parametrize(
    "name", ["plan.json", "manifest.json", "data.zarr/systems/id/c/0/0", "data.zarr/atoms/tags/zarr.json"]
)
def test_a_flipped_byte_in_what_opening_needs_is_found(web, published, name):
    path = published / name
    raw = bytearray(path.read_bytes())
    raw[10] ^= 1
    path.write_bytes(raw)
    with pytest.raises(IntegrityError, match=f"{web.url('x.kdcache')}/{name}: "):
        Cache.open(web.url("x.kdcache"))


def test_what_is_no_store_is_refused(web, s3):
    (web.folder / "empty").mkdir()
    with pytest.raises(CacheError, match=r"empty: not a store \(no plan.json there\)"):
        Cache.open(web.url("empty"))
    with pytest.raises(CacheError, match="not a store"):
        Cache.open(s3.url("nothing.kdcache"))


def test_an_unfinished_store_is_refused(web, published):
    (published / "manifest.json").unlink()
    with pytest.raises(CacheError, match=r"is not finished \(no manifest.json there\)"):
        Cache.open(web.url("x.kdcache"))


@pytest.mark.parametrize(
    "url", ["ftp://host/x.kdcache", "https://me:secret@host/x", "https://host/x?token=1"]
)
def test_urls_that_cannot_be_meant_are_refused(url, mirrors):
    with pytest.raises(CacheError) as error:
        open_mirror(url)
    assert "secret" not in str(error.value)
    assert "token" not in str(error.value)


def test_a_server_that_is_not_there_is_named(mirrors):
    with pytest.raises(CacheError, match=r"http://127.0.0.1:9/x.kdcache/plan.json: .*check the URL"):
        open_mirror("http://127.0.0.1:9/x.kdcache")


@pytest.mark.parametrize(
    "name", ["../evil/zarr.json", "/etc/zarr.json", "a/../../b/zarr.json", "a//zarr.json", ".x"]
)
def test_a_manifest_that_names_files_outside_is_refused(web, published, mirrors, name):
    def add(document):
        document["groups"]["atoms"]["metadata"][name] = "ab" * 32

    rewrite_manifest(published / "manifest.json", add)
    with pytest.raises(IntegrityError, match=r"manifest\.json: names the file .* leads out of the store"):
        open_mirror(web.url("x.kdcache"))
    assert not (mirrors.parent / "evil").exists()


def test_a_group_outside_is_refused(web, published, mirrors):
    def add(document):
        document["groups"]["teachers/../../evil"] = document["groups"]["atoms"]

    rewrite_manifest(published / "manifest.json", add)
    with pytest.raises(IntegrityError, match=r"manifest\.json: names the file"):
        open_mirror(web.url("x.kdcache"))


def test_absurd_sizes_are_refused_before_anything_is_written(web, published, mirrors):
    def grow(document):
        document["groups"][f"teachers/{TEACHER}/node"]["arrays"]["values"]["shards"][1]["bytes"] = 1 << 60

    rewrite_manifest(published / "manifest.json", grow)
    with pytest.raises(IntegrityError, match="bytes"):
        Cache.open(web.url("x.kdcache"))


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
