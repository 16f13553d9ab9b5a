"""Servers that damage, lose, or lie: what is wrong is refused by name, and nothing of it stays."""

import contextlib
import http.server
import threading
from pathlib import Path

import numpy as np
import pytest
from cache_example import TEACHER
from remote_example import NODE, assert_same, read_all

from molkd.cache_schema.errors import CacheError, IntegrityError
from molkd.cache_schema.jsonfile import read_sealed, seal
from molkd.cache_schema.layout import MAX_MANIFEST_BYTES
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.remote import open_mirror
from molkd.cache_schema.verify import verify


def rewrite_manifest(path: Path, change) -> None:
    """Change a manifest and seal it again, as a hostile server can."""
    document, _ = read_sealed(path, max_bytes=MAX_MANIFEST_BYTES, remedy="")
    change(document)
    path.write_bytes(seal(document))


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


@pytest.mark.parametrize("group", ["evil", "teachers/painn", "teachers/painn/a/b/c/d/e"])
def test_a_group_that_no_store_has_is_refused(web, published, group):
    def add(document):
        document["groups"][group] = document["groups"]["atoms"]

    rewrite_manifest(published / "manifest.json", add)
    with pytest.raises(IntegrityError, match=r"manifest\.json: names the group"):
        open_mirror(web.url("x.kdcache"))


def test_endless_metadata_are_refused(web, published):
    def add(document):
        names = {f"atoms/x{k}/zarr.json": "ab" * 32 for k in range(20_001)}
        document["groups"]["atoms"]["metadata"] |= names

    rewrite_manifest(published / "manifest.json", add)
    with pytest.raises(IntegrityError, match=r"names 200\d\d files of metadata"):
        open_mirror(web.url("x.kdcache"))
    assert len(web.asked) == 2


def test_a_plan_too_large_is_not_read(web, published, monkeypatch):
    monkeypatch.setattr("molkd.cache_schema.mirror.MAX_JSON_BYTES", 100)
    with pytest.raises(IntegrityError, match=r"x.kdcache/plan.json: [\d,]+ bytes, at most 100 expected"):
        open_mirror(web.url("x.kdcache"))


def test_an_answer_without_end_is_cut(mirrors, published):
    """A server that states no length, or a wrong one, cannot fill the disk."""

    class Endless(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            if self.path.endswith(".json") and "zarr" not in self.path:
                raw = (published / self.path.rsplit("/", 1)[-1]).read_bytes()
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)
                return
            self.send_header("Content-Length", str(1 << 50))
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(bytes(1 << 16))

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(IntegrityError, match=r"has 1,125,899,906,842,624 bytes, (expected|at most)"):
            open_mirror(f"http://127.0.0.1:{server.server_address[1]}/x.kdcache")
        server.shutdown()
    assert not list(mirrors.rglob("*zarr.json"))


def test_absurd_sizes_are_refused_before_anything_is_written(web, published, mirrors):
    def grow(document):
        document["groups"][f"teachers/{TEACHER}/node"]["arrays"]["values"]["shards"][1]["bytes"] = 1 << 60

    rewrite_manifest(published / "manifest.json", grow)
    with pytest.raises(IntegrityError, match="bytes"):
        Cache.open(web.url("x.kdcache"))
