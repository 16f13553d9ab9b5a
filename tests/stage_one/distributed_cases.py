"""A store of many small shards for tests of stage one by many processes, and what is asked of it."""

import itertools
import shutil

from stage_one_cases import assert_same_files, make_store, structures, write_extxyz, write_teacher

from molkd.cache_schema.verify import verify
from molkd.cache_schema.writer import Store
from molkd.pipeline import caching
from molkd.pipeline.caching import cache_teacher
from molkd.pipeline.config import CacheConfig

N_SYSTEMS = 1500
ENCODINGS = ("node=int8", "v2v=pca:16")
SIGNALS = ("energy", "forces", "node", "v2v")


def make_many(folder):
    """Make train.extxyz, its store bare.kdcache, a teacher, and one.kdcache as one process fills it."""
    make_store(folder / "bare.kdcache", write_extxyz(folder / "train.extxyz", structures(N_SYSTEMS)))
    write_teacher(folder / "teacher")
    shutil.copytree(folder / "bare.kdcache", folder / "one.kdcache")
    cache_teacher(config(folder / "one.kdcache", folder / "teacher.safetensors"))
    assert Store.open(folder / "bare.kdcache").plan.n_shards > 7


def config(store, teacher, **settings):
    given = {"signals": SIGNALS, "encoding": ENCODINGS, "batch_atoms": 256} | settings
    return CacheConfig(store=store, teacher=str(teacher), **given)


def command(store, teacher, *options):
    encodings = itertools.chain(*(("--encoding", e) for e in ENCODINGS))
    signals = ["--signals", ",".join(SIGNALS), "--batch-atoms", 256]
    return ["cache-teacher", store, "--teacher", teacher, *signals, *encodings, *options]


def commits(store):
    return sorted(p.relative_to(store) for p in (store / "log" / "teachers").rglob("*.json"))


def assert_same_store(store, expected):
    report = verify(store)
    assert report.ok
    assert report.notes == []  # nothing left of those that died
    assert_same_files(store / "data.zarr", expected / "data.zarr")
    assert (store / "manifest.json").read_bytes() == (expected / "manifest.json").read_bytes()


def make_job(store, teacher, run="a run"):
    """Return a job as `distributed` sends it, its store prepared."""
    asked = config(store, teacher)
    stage = caching.make_room(asked, caching.open_teacher(asked))
    plain = asked.model_dump(mode="json")
    return {"run": run, "config": plain, "threads": 1, "name": stage.name, "groups": dict(stage.groups)}
