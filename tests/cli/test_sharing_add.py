"""`kd cache add`: the teacher runs as it did for the store, and nothing runs in vain."""

import shutil

import numpy as np
import pytest
from stage_one_cases import files, make_store, structures, write_extxyz, write_teacher

from molkd.cache_schema.reader import Cache
from molkd.pipeline.caching import cache_teacher
from molkd.pipeline.config import CacheConfig


@pytest.fixture
def wide(everything, tmp_path):
    """A store of 12 systems that a teacher saw in float64."""
    data = write_extxyz(tmp_path / "old.extxyz", structures(12, seed=8))
    store = make_store(tmp_path / "wide.kdcache", data)
    teacher = str(everything / "teacher.safetensors")
    cache_teacher(CacheConfig(store=store, teacher=teacher, signals=("energy",), precision="float64"))
    return store


@pytest.fixture
def data(tmp_path):
    return write_extxyz(tmp_path / "new.extxyz", structures(4, seed=9))


@pytest.fixture
def no_teacher_runs(monkeypatch):
    def never(*arguments):
        raise AssertionError("the teacher ran")

    monkeypatch.setattr("molkd.pipeline.sharing.adding.cache_teacher", never)


def test_a_store_in_float64_grows_in_float64(kd, everything, wide, data, tmp_path):
    out, teacher = tmp_path / "b.kdcache", str(everything / "teacher.safetensors")
    done = kd("cache", "add", wide, data, out, "--teacher", teacher)
    assert done.code == 0, done.err
    alone = make_store(tmp_path / "alone.kdcache", data)
    cache_teacher(CacheConfig(store=alone, teacher=teacher, signals=("energy",), precision="float64"))
    with Cache.open(out, complete=True) as merged, Cache.open(alone) as expected:
        assert merged.teachers["teacher"].provenance["precision"] == "float64"
        place = {row.tobytes(): i for i, row in enumerate(merged.ids)}
        for i, row in enumerate(expected.ids):
            own, other = (
                cache.read([k], (), "teacher", ("energy",))["teacher/energy"]
                for cache, k in ((merged, place[row.tobytes()]), (expected, i))
            )
            np.testing.assert_allclose(own, other, rtol=1e-12)  # float32 is off by 1e-8 at least


def test_what_another_call_left_is_named(kd, refused, everything, wide, data, tmp_path):
    """A wrong model stops the first call, which leaves its part; the next one is for another store."""
    out = tmp_path / "b.kdcache"
    wrong = write_teacher(tmp_path / "wrong", seed=4)
    part = "b.adding.kdcache"
    command = ("cache", "add", wide, data, out, "--teacher", wrong)
    refused(*command, says=["its teacher teacher is another one"], new=[part])
    teacher = everything / "teacher.safetensors"
    command = ("cache", "add", everything / "train.kdcache", data, out, "--teacher", teacher)
    refused(*command, says=[rf"precision float64, given float32.*left .*{part}.*remove it"])
    shutil.rmtree(tmp_path / part)
    assert kd(*command).code == 0


@pytest.mark.usefixtures("no_teacher_runs")
@pytest.mark.parametrize("place", ["itself", "folder", "copy", "other"])
def test_a_place_that_is_taken_is_refused_at_once(refused, everything, store, data, tmp_path, place):
    out = tmp_path / "b.kdcache"
    says = ["b.kdcache: exists, and is not .*train.kdcache with the systems given"]
    new = []
    if place == "itself":
        out, says = store, ["is never changed"]
    elif place == "folder":
        out.mkdir()
        (out / "precious").write_text("text")
    elif place == "copy":
        shutil.copytree(store, out)
        new = ["b.adding.kdcache"]  # might be the result if nothing in the data was new
    else:
        shutil.copytree(everything / "bare.kdcache", out)
    refused(
        "cache", "add", store, data, out, "--teacher", everything / "teacher.safetensors", says=says, new=new
    )


@pytest.mark.usefixtures("no_teacher_runs")
def test_a_store_named_like_the_part_is_not_removed(refused, everything, store, data, tmp_path):
    own = store.rename(tmp_path / "b.adding.kdcache")
    command = ("cache", "add", own, everything / "train.extxyz", tmp_path / "b.kdcache", "--teacher")
    refused(*command, everything / "teacher.safetensors", says=["is never changed"])
    assert files(own)


def test_the_same_data_again_add_nothing(kd, everything, store, tmp_path):
    command = ("cache", "add", store, everything / "train.extxyz", tmp_path / "b.kdcache", "--teacher")
    for _ in range(2):
        done = kd(*command, everything / "teacher.safetensors", "--json")
        assert done.code == 0, done.err
        assert '"n_new": 0' in done.out


def test_a_teacher_without_signals_to_compute_is_refused(refused, everything, data, tmp_path):
    command = ("cache", "add", everything / "bare.kdcache", data, tmp_path / "b.kdcache", "--teacher", "x.pt")
    refused(
        *command, says=["no signals.*kd ingest .*bare.kdcache DATA OUT.*kd cache-teacher OUT --teacher x.pt"]
    )
