"""What is read of an unfinished store, of none of its systems, and as its description."""

import json

import pytest
from cache_example import TEACHER, write_shard

from molkd.cache_schema.errors import CacheError
from molkd.cache_schema.manifest import finalize, info
from molkd.cache_schema.reader import Cache


def test_unwritten_systems_are_an_error_never_zeros(store, example):
    write_shard(store, example, "atoms", 1)
    cache = Cache.open(store.path)
    inside, outside = store.systems_of_shard(1)[0], store.systems_of_shard(0)[0]
    assert len(cache.read([inside])["positions"])
    with pytest.raises(CacheError, match="shard 0 of atoms is not written yet"):
        cache.read([inside, outside])
    with pytest.raises(CacheError, match=r"atoms is not finished, .* shards are missing"):
        Cache.open(store.path, complete=True)
    with pytest.raises(CacheError, match="atoms is not finished"):
        cache.require()
    with pytest.raises(CacheError, match="atoms is not finished"):
        finalize(store)
    assert not (store.path / "manifest.json").exists()


def test_reading_nothing(store_path):
    arrays = Cache.open(store_path).read([], teacher=TEACHER, signals=("v2v", "energy"))
    assert arrays["teacher/v2v"].shape == (0, 3, 3)
    assert arrays["positions"].shape == (0, 3)
    assert arrays["teacher/energy"].shape == (0,)


def test_describing_a_store_gives_plain_json(store_path):
    described = json.loads(json.dumps(info(store_path)))
    assert described["systems"] == 12
    assert described["atoms"] == 3164
    assert described["teachers"][TEACHER]["signals"]["node"]["encoding"] == "fp16"
    assert described["fields"]["positions"]["unit"] == "A"
