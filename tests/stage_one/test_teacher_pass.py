"""Batches too large for the device, labels by key, shards that another process finishes, copies from CUDA."""

import logging
import shutil

import numpy as np
import pytest
import torch
from stage_one_cases import assert_same_files, structures, write_extxyz

from molkd.cache_schema.reader import Cache
from molkd.cache_schema.verify import verify
from molkd.pipeline import caching
from molkd.pipeline.caching import cache_teacher
from molkd.pipeline.config import CacheConfig
from molkd.pipeline.errors import ConfigError, DataError, TeacherError
from molkd.pipeline.planning import plan_teacher
from molkd.pipeline.teachers.load import load_teacher
from molkd.pipeline.transfer import HostCopy, side_stream

LOGGER = "molkd.pipeline.teacher_pass"
FLOAT32 = 1e-5  # relative to a signal's largest value; rounding of sums in another order


def config(store, teacher, *signals, **settings):
    return CacheConfig(store=store, teacher=str(teacher), signals=signals or ("energy", "node"), **settings)


class Small:
    """A teacher whose device holds so many edges at most; it counts what it is asked."""

    def __init__(self, teacher, max_edges):
        self._teacher, self.max_edges, self.asked, self.failed = teacher, max_edges, [], 0

    def __getattr__(self, name):
        return getattr(self._teacher, name)

    def compute(self, batch, signals):
        if batch.edge_index.shape[1] > self.max_edges:
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.asked.append(batch.n_systems)
        return self._teacher.compute(batch, signals)


@pytest.fixture
def on_small_device(monkeypatch):
    """Let stage one load a teacher on a device for so many edges; returns the teachers loaded."""

    def limit(max_edges):
        loaded = []

        def load(*args, **kwargs):
            loaded.append(Small(load_teacher(*args, **kwargs), max_edges))
            return loaded[-1]

        monkeypatch.setattr(caching, "load_teacher", load)
        return loaded

    return limit


def test_out_of_memory_halves_the_work_and_goes_on(store, made, teacher_file, on_small_device, caplog):
    asked = {"precision": "float64", "encoding": "fp32"}
    whole = shutil.copytree(store, store.with_name("whole.kdcache"))
    cache_teacher(config(whole, teacher_file, **asked))
    loaded = on_small_device(600)
    with caplog.at_level(logging.WARNING, LOGGER):
        done = cache_teacher(config(store, teacher_file, **asked))
    (teacher,) = loaded
    assert sum(teacher.asked) == done.n_computed
    assert len(teacher.asked) > 10
    assert teacher.failed < len(teacher.asked) / 2  # it learns: such batches are not tried again
    assert "out of memory at" in caplog.text
    with Cache.open(store, complete=True) as a, Cache.open(whole) as b:
        for name in ("energy", "node"):
            everything = np.arange(a.n_systems)
            found, expected = (
                c.read(everything, (), teacher="teacher", signals=(name,))[f"teacher/{name}"] for c in (a, b)
            )
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
    assert verify(store).ok


def test_a_single_system_that_does_not_fit_is_named(store, teacher_file, on_small_device):
    on_small_device(30)
    with pytest.raises(TeacherError, match=r"train\.extxyz#\d+: \d+ atoms with \d+ edges need more memory"):
        cache_teacher(config(store, teacher_file))
    assert verify(store).ok


def test_a_shard_finished_by_another_process_is_not_computed_again(store, teacher_file, monkeypatch):
    """The other process runs to its end while this one is at its first shard."""
    twin = shutil.copytree(store, store.with_name("twin.kdcache"))
    alone = cache_teacher(config(twin, teacher_file))
    shards = []
    original = caching.compute_shard

    def interrupted(stage, shard, *rest):
        shards.append(shard)
        if len(shards) == 1:
            assert cache_teacher(config(store, teacher_file)).n_computed == alone.n_computed
        return original(stage, shard, *rest)

    monkeypatch.setattr(caching, "compute_shard", interrupted)
    done = cache_teacher(config(store, teacher_file))
    assert shards == [0, 0, 1, *range(2, max(shards) + 1)]
    assert 0 < done.n_computed < alone.n_computed
    assert_same_files(store / "data.zarr", twin / "data.zarr")


def test_labels_by_their_keys(teacher_file, tmp_path):
    systems = structures(6, labelled=False)
    for k, atoms in enumerate(systems):
        atoms.info["dft"] = -1.5 * k
    data = write_extxyz(tmp_path / "named.extxyz", systems)
    asked = config(tmp_path / "s.kdcache", teacher_file)
    with pytest.raises(DataError, match="no energy label 'nothing'"):
        plan_teacher(asked, data, energy_key="nothing")
    cache_teacher(asked, data, energy_key="dft")
    with Cache.open(asked.store) as cache:
        np.testing.assert_array_equal(cache.energy, -1.5 * np.asarray(cache.source_row))
    with pytest.raises(ConfigError, match=r"s\.kdcache: is a store, its labels were chosen .*kd ingest"):
        cache_teacher(asked, asked.store, energy_key="dft")


def test_values_on_the_host_are_not_copied():
    values = torch.arange(6.0).reshape(2, 3)
    copy = HostCopy({"forces": values}, side_stream(torch.device("cpu")))
    assert np.shares_memory(copy.wait()["forces"], values.numpy())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_copies_from_cuda_hold_what_was_there_when_they_began():
    device = torch.device("cuda")
    stream = side_stream(device)
    copies = []
    for k in range(20):
        values = torch.full((1000, 3, 64), float(k), device=device).transpose(1, 2)
        copies.append(HostCopy({"v2v": values}, stream))
        del values  # its memory may be given to the next round only after the copy
    for k, copy in enumerate(copies):
        assert (copy.wait()["v2v"] == k).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_store_made_on_cuda_holds_what_one_made_on_the_cpu_holds(made, teacher_file, tmp_path):
    stores = [shutil.copytree(made / "train.kdcache", tmp_path / device) for device in ("cpu", "cuda")]
    for store in stores:
        cache_teacher(
            config(store, teacher_file, "energy", "node", "v2v", device=store.name, encoding="fp32")
        )
    with Cache.open(stores[0]) as on_cpu, Cache.open(stores[1], complete=True) as on_cuda:
        for name in ("energy", "node", "v2v"):
            expected, found = (
                c.read(np.arange(c.n_systems), (), teacher="teacher", signals=(name,))[f"teacher/{name}"]
                for c in (on_cpu, on_cuda)
            )
            assert np.abs(found - expected).max() <= FLOAT32 * np.abs(expected).max()
