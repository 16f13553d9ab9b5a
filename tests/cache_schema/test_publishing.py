"""Publishing stores: readers see nothing or a whole store, nothing is sent twice, nothing is overwritten."""

import dataclasses
import signal
import subprocess
import sys

import numpy as np
import pytest
from cache_example import TEACHER, create, make_example, write_all, write_shard
from servers import BUCKET

from molkd.cache_schema.errors import CacheError, IntegrityError
from molkd.cache_schema.fields import node_spec
from molkd.cache_schema.manifest import finalize
from molkd.cache_schema.objects import Remote
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.remote import publish


@pytest.fixture
def url(s3, request):
    """A URL of its own in the bucket."""
    return s3.url(request.node.name.replace("[", "-").replace("]", "") + "/x.kdcache")


def prefix(url: str) -> str:
    return url.removeprefix(f"s3://{BUCKET}/")


def files(folder) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_published_is_the_store_file_by_file(s3, url, store_path):
    steps = []
    summary = publish(store_path, url, lambda done, total: steps.append((done, total)))
    local = files(store_path)
    assert s3.objects(prefix(url)) == local
    assert (summary.url, summary.files, summary.files_sent) == (url, len(local), len(local) - 2)
    assert steps[-1] == (summary.bytes, summary.bytes)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)


@pytest.mark.parametrize("end", ["", "/"])
def test_a_bucket_is_not_made_a_store(s3, store_path, end):
    """Nobody would find the others in it any more."""
    before = s3.objects("plan.json")
    with pytest.raises(CacheError, match=rf"{BUCKET}/?: is the bucket itself; .*{BUCKET}/NAME.kdcache"):
        publish(store_path, f"s3://{BUCKET}{end}")
    assert s3.objects("plan.json") == before


def test_publishing_again_sends_nothing(s3, url, store_path):
    publish(store_path, url)
    before = s3.objects(prefix(url))
    again = publish(store_path, url)
    assert (again.files_sent, again.bytes_sent) == (0, 0)
    assert s3.objects(prefix(url)) == before


def test_an_interrupted_publication_is_invisible_and_continues(s3, url, store_path, monkeypatch):
    real, sent = Remote.send, []

    def send(self, relative, data, crc, **options):
        if len(sent) == 20:
            raise KeyboardInterrupt
        sent.append(relative)
        return real(self, relative, data, crc, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Remote, "send", send)
        with pytest.raises(KeyboardInterrupt):
            publish(store_path, url)
    there = s3.objects(prefix(url))
    assert "manifest.json" not in there
    with pytest.raises(CacheError, match="is not finished"):
        Cache.open(url)
    summary = publish(store_path, url)
    assert summary.files_sent == len(files(store_path)) - 1 - len(there)  # plan and manifest are not counted
    assert s3.objects(prefix(url)) == files(store_path)


def test_a_killed_publication_continues(s3, url, store_path):
    code = (
        "import sys, time; from molkd.cache_schema import objects, remote\n"
        "real = objects.Remote.send\n"
        "def send(*arguments, **options):\n"
        "    done = real(*arguments, **options); print('sent', flush=True); time.sleep(0.2); return done\n"
        "objects.Remote.send = send; remote.publish(*sys.argv[1:])"
    )
    with subprocess.Popen([sys.executable, "-c", code, store_path, url], stdout=subprocess.PIPE) as process:
        for _ in range(15):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    there = s3.objects(prefix(url))
    assert 15 <= len(there) < len(files(store_path))
    assert "manifest.json" not in there
    assert publish(store_path, url).files_sent <= len(files(store_path)) - len(there)
    assert s3.objects(prefix(url)) == files(store_path)


def test_another_store_is_never_overwritten(s3, url, store_path, tmp_path):
    publish(store_path, url)
    before = s3.objects(prefix(url))
    other = tmp_path / "other.kdcache"
    write_all(other, make_example([3, 4, 5], seed=1))
    with pytest.raises(CacheError, match="holds another store"):
        publish(other, url)
    assert s3.objects(prefix(url)) == before


def test_signals_added_later_are_published_and_none_are_lost(s3, url, store_path, example, tmp_path):
    publish(store_path, url)
    mirrored = Cache.open(url)
    store = create(store_path, example)
    group = store.add_signal(TEACHER, node_spec(4, "layer/U5"), "fp16")
    more = dataclasses.replace(example, signals=example.signals | {"layer/U5": example.signals["node"]})
    for shard in store.missing_shards(group):
        write_shard(store, more, group, shard)
    with pytest.raises(CacheError, match=f"{group} not finished"):
        publish(store_path, url)  # the manifest does not know it yet
    finalize(store)
    assert 0 < publish(store_path, url).files_sent <= 2 * store.plan.n_shards + 2
    with Cache.open(url) as cache:
        np.testing.assert_array_equal(
            cache.read(range(len(cache)), (), TEACHER, ("layer/U5",))["teacher/layer/U5"],
            cache.read(range(len(cache)), (), TEACHER, ("node",))["teacher/node"],
        )
    mirrored.read([0], ("positions",), TEACHER, ("node",))  # opened before

    less = tmp_path / "less.kdcache"
    write_all(less, example)
    with pytest.raises(CacheError, match=f"holds {group}, which .* lacks"):
        publish(less, url)


def test_what_is_not_finished_is_not_published(s3, url, store_path, example, tmp_path):
    path = tmp_path / "begun.kdcache"
    write_all(path, example, finish=False)
    with pytest.raises(CacheError, match=r"atoms, .* not finished"):
        publish(path, url)
    assert s3.objects(prefix(url)) == {}


@pytest.mark.parametrize("name", [f"teachers/{TEACHER}/node/values/c/1/0", "systems/id/c/0/0"])
@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_a_damaged_store_is_not_published(s3, url, store_path, name, damage):
    path = store_path / "data.zarr" / name
    if damage == "flip":
        raw = bytearray(path.read_bytes())
        raw[3] ^= 1
        path.write_bytes(raw)
    else:
        path.unlink()
    with pytest.raises(IntegrityError, match=name):
        publish(store_path, url)
    assert "manifest.json" not in s3.objects(prefix(url))


def test_objects_that_others_put_there_are_sent_again(s3, url, store_path):
    """Only what was sent from here says its checksum: equal sizes prove nothing."""
    publish(store_path, url)
    key = f"{prefix(url)}/data.zarr/teachers/{TEACHER}/node/values/c/1/0"
    s3.put(key, bytes(len(s3.get(key))))
    assert publish(store_path, url).files_sent == 1
    assert s3.objects(prefix(url)) == files(store_path)


def test_large_files_go_in_parts(s3, url, tmp_path):
    path = tmp_path / "large"
    path.write_bytes(np.random.default_rng(0).bytes((9 << 20) + 1))
    remote = Remote(url)
    remote.send("data", path, "0123abcd")
    assert remote.holds("data", (9 << 20) + 1, "0123abcd")
    assert not remote.holds("data", (9 << 20) + 1, "0123abce")
    assert s3.get(f"{prefix(url)}/data") == path.read_bytes()


def test_what_cannot_be_published_to_is_refused(s3, store_path, web):
    with pytest.raises(CacheError, match="nothing can be written over http"):
        publish(store_path, web.url("x.kdcache"))
    with pytest.raises(
        CacheError, match=r"s3://nobody-has-this/x.kdcache/plan.json: .*NoSuchBucket: .*; check the URL.*AWS_"
    ) as caught:
        publish(store_path, "s3://nobody-has-this/x.kdcache")
    assert "xml" not in str(caught.value)


def test_stock_zarr_reads_what_is_published(s3, url, store_path):
    import zarr
    from obstore.store import from_url
    from zarr.storage import ObjectStore

    publish(store_path, url)
    bucket = from_url(f"{url}/data.zarr", client_options={"allow_http": True})
    group = zarr.open_group(ObjectStore(bucket, read_only=True), mode="r")
    local = zarr.open_group(store_path / "data.zarr", mode="r")
    for name in ("atoms/positions", f"teachers/{TEACHER}/node/values", "systems/energy"):
        np.testing.assert_array_equal(group[name][:], local[name][:])
        assert dict(group[name].attrs) == dict(local[name].attrs)
