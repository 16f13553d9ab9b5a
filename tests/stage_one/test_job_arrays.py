"""Processes that share stage one without a scheduler, and what each of them does with a shard."""

import logging
import shutil
import time

import pytest
from distributed_cases import assert_same_store, command, commits, config, make_job
from forked_commands import run, start
from stage_one_cases import write_teacher

from molkd.cache_schema.writer import Store
from molkd.pipeline import caching, worker
from molkd.pipeline.caching import cache_teacher
from molkd.pipeline.config import CacheConfig, make_config
from molkd.pipeline.errors import ConfigError
from molkd.pipeline.teachers.load import load_teacher


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "in turn"])
def test_job_arrays(many, bare, teacher, tmp_path, at_once):
    jobs = []
    for part in ("0/2", "1/2"):
        jobs.append(start(command(bare, teacher, "--worker", part), tmp_path / f"log-{part[0]}"))
        if not at_once:
            assert jobs[0].wait() == 0, jobs[0].text
            done = {int(p.stem) for p in commits(bare)}
            assert done == set(range(0, Store.open(bare).plan.n_shards, 2)) or part == "1/2"
    assert [job.wait() for job in jobs] == [0, 0], [job.text for job in jobs]
    assert_same_store(bare, many / "one.kdcache")


def test_what_a_dead_job_left_is_found_by_running_again(many, bare, teacher, tmp_path):
    dead = start(command(bare, teacher, "--worker", "0/3"), tmp_path / "log")
    while not commits(bare):
        assert dead.process.exitcode is None, dead.text
        time.sleep(0.002)
    dead.process.kill()
    dead.wait()
    for part in ("1/3", "2/3"):
        assert run(command(bare, teacher, "--worker", part), tmp_path / "log").wait() == 0
    assert not (bare / "manifest.json").exists() or Store.open(bare).missing_shards("teachers/teacher/node")
    assert run(command(bare, teacher), tmp_path / "log").wait() == 0
    assert_same_store(bare, many / "one.kdcache")


def test_jobs_of_an_array_do_not_each_make_the_store(many, teacher, tmp_path):
    asked = config(tmp_path / "new.kdcache", teacher, worker="0/2")
    with pytest.raises(ConfigError, match=r"new\.kdcache: no store yet, .*kd ingest \S+train\.extxyz \S+new"):
        cache_teacher(asked, many / "train.extxyz")
    with pytest.raises(ConfigError, match=r"first run kd ingest DATA \S+new\.kdcache, then"):
        cache_teacher(asked, asked.store)
    assert not asked.store.exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"workers": 2, "worker": "0/2"}, "--workers and --worker exclude each other"),
        ({"workers": 2, "scheduler": "tcp://a:1"}, "--workers and --scheduler exclude each other"),
        ({"worker": "2/2"}, r"i from 0 to n - 1, .*found '2/2'"),
        ({"worker": "1"}, "write it as i/n"),
        ({"worker": "-1/2"}, "write it as i/n"),
        ({"workers": 0}, "workers: .*greater than or equal to 1"),
    ],
)
def test_settings_that_make_no_sense(given, says):
    with pytest.raises(ConfigError, match=says):
        make_config(CacheConfig, {"store": "s", "teacher": "t"} | given)


def test_a_finished_shard_costs_no_teacher(many, teacher, monkeypatch):
    done = many / "one.kdcache"
    job = make_job(done, teacher, run="finished")
    monkeypatch.setattr(worker, "open_teacher", None)
    answers = [worker.perform("do shard", job, shard) for shard in range(Store.open(done).plan.n_shards)]
    assert all(answer == {"receipt": {"systems": 0, "bytes": 0, "bad": []}} for answer in answers)


def test_a_worker_with_another_teacher_is_refused(many, bare, teacher, tmp_path):
    job = make_job(bare, teacher, run="other")
    job["config"]["teacher"] = str(write_teacher(tmp_path / "teacher", seed=4))
    answer = worker.perform("do shard", job, 0)
    assert answer["error"] == "CacheError"
    assert "teacher teacher is another one (weights_sha256" in answer["message"]
    assert commits(bare) == []


def test_halted_workers(bare, teacher, monkeypatch):
    """Told to drop the shard in work, a worker leaves nothing of it; then it begins no other."""
    job = make_job(bare, teacher, run="halted")
    batches = []
    original = worker._go_on

    def go_on(run, n_systems):
        batches.append(n_systems)
        if len(batches) == 2:
            worker.halt(run, drop=True)
        original(run, n_systems)

    monkeypatch.setattr(worker, "_go_on", go_on)
    nothing = {"receipt": {"systems": 0, "bytes": 0, "bad": []}}
    assert worker.perform("do shard", job, 0) == nothing
    assert worker.perform("do shard", job, 1) == nothing
    assert len(batches) == 2
    assert commits(bare) == []
    assert not list(bare.rglob(".tmp-*"))
    worker.release("halted")
    assert worker._held == {}


class Noisy:
    """The teacher on hardware that rounds differently."""

    def __init__(self, teacher):
        self._teacher = teacher

    def __getattr__(self, name):
        return getattr(self._teacher, name)

    def compute(self, batch, signals):
        return {k: v * (1 + 1e-6) for k, v in self._teacher.compute(batch, signals).items()}


def test_of_two_roundings_the_first_committed_stays(made, teacher, store, monkeypatch, caplog):
    """As on GPUs: both computations are right, and neither process is to fail for it."""
    asked = config(store, teacher, signals=("energy", "node"), encoding="fp32")
    alone = shutil.copytree(store, store.with_name("alone.kdcache"))
    original = caching.compute_shard

    def overtaken(*arguments):
        monkeypatch.setattr(caching, "compute_shard", original)
        with monkeypatch.context() as other:
            other.setattr(caching, "load_teacher", lambda *a, **k: Noisy(load_teacher(*a, **k)))
            cache_teacher(asked)
        shutil.copytree(store, alone, dirs_exist_ok=True)
        original(*arguments)

    monkeypatch.setattr(caching, "compute_shard", overtaken)
    with caplog.at_level(logging.WARNING):
        cache_teacher(asked)
    assert "already committed by" in caplog.text
    assert "different values; it is kept" in caplog.text
    assert_same_store(store, alone)
