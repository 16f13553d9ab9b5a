"""Stage one by many processes: whoever dies, is slow or repeats work, the store is that of one process."""

import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver

import dask
import forked_commands  # noqa: F401  says what `forkserver` imports
import pytest
from distributed import Client
from distributed_cases import N_SYSTEMS, SIGNALS, assert_same_store, command, commits, config, make_job
from stage_one_cases import files, make_store, structures, write_extxyz, write_teacher
from worker_processes import background, kill, killed_at, pids, writers

from molkd.cache_schema.reader import Cache
from molkd.cache_schema.verify import verify
from molkd.cache_schema.writer import Store
from molkd.pipeline import cluster, distributed, worker
from molkd.pipeline.caching import cache_teacher
from molkd.pipeline.config import CacheConfig
from molkd.pipeline.errors import CacheError, ConfigError, TeacherError
from molkd.pipeline.models.potential import Potential

KD = [sys.executable, "-c", "from molkd.cli import main; main()"]


@pytest.fixture(scope="module", autouse=True)
def forked_workers():
    """Workers, too, start from the process that has imported everything; elsewhere each is a new Python."""
    forkserver.ensure_running()
    with dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        yield


@pytest.fixture(scope="module")
def scheduler():
    """The address of a cluster of two workers that was there before."""
    with cluster.local_cluster("cpu", 2, 8) as (existing, threads):
        assert threads == 1
        yield existing.scheduler_address


@pytest.mark.slow
def test_workers_killed_at_random(many, bare, teacher):
    finished = len(SIGNALS) * Store.open(bare).plan.n_shards
    with killed_at([2, finished // 3, finished // 2], lambda: len(commits(bare)), seed=1) as dead:
        done = cache_teacher(config(bare, teacher, workers=2))
    assert len(dead) == 3
    assert pids() == []
    assert 0 < done.n_computed <= N_SYSTEMS
    assert_same_store(bare, many / "one.kdcache")


@pytest.mark.slow
def test_a_shard_that_no_worker_survives(bare, teacher, monkeypatch):
    def kill_writers():
        for pid in writers(bare):
            kill(pid)
        return False

    monkeypatch.setattr(distributed, "_DEATHS", 2)
    with (
        background(kill_writers),
        pytest.raises(TeacherError, match=r"train\.kdcache: 2 workers died over shard \d+; .*--batch-atoms"),
    ):
        cache_teacher(config(bare, teacher, workers=2))
    assert verify(bare).ok


def test_workers_that_do_not_even_start(bare, teacher):
    def kill_all():
        return sum(kill(pid) for pid in pids()) > 0

    with (
        background(kill_all),
        pytest.raises(
            ConfigError, match=r"--workers 2: a worker process ended while it started .*take fewer"
        ),
    ):
        cache_teacher(config(bare, teacher, workers=2))
    assert commits(bare) == []


@pytest.mark.slow
def test_ctrl_c_on_the_terminal(many, bare, teacher):
    """It reaches every process of the terminal; the command ends, and a later one goes on."""
    arguments = [*KD, *(str(a) for a in command(bare, teacher, "--workers", 2))]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while len(commits(bare)) < 3:
        assert process.poll() is None
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.endswith("interrupted; the same command continues\n")
    assert "Traceback" not in said
    assert not list(bare.rglob(".tmp-*"))
    kept = {p: (bare / p).read_bytes() for p in commits(bare)}
    assert len(kept) < len(SIGNALS) * Store.open(bare).plan.n_shards
    cache_teacher(config(bare, teacher))
    assert kept.items() <= {p: (bare / p).read_bytes() for p in commits(bare)}.items()
    assert_same_store(bare, many / "one.kdcache")


@pytest.mark.slow
def test_two_runs_on_one_cluster_at_once(many, bare, teacher, scheduler):
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(cache_teacher, config(bare, teacher, scheduler=scheduler)) for _ in range(2)]
        done = [each.result() for each in runs]
    assert N_SYSTEMS <= sum(each.n_computed for each in done) <= 2 * N_SYSTEMS
    assert_same_store(bare, many / "one.kdcache")
    before = files(bare)
    again = cache_teacher(config(bare, teacher, scheduler=scheduler))
    assert (again.n_computed, again.bytes_written) == (0, 0)
    assert files(bare) == before


@pytest.mark.slow
def test_the_same_shard_twice_at_once(many, bare, teacher, scheduler):
    job = make_job(bare, teacher)
    with Client(scheduler, set_as_default=False) as client:
        twins = [
            client.submit(worker.perform, "do shard", job, 1, workers=[address], pure=False)
            for address in client.nthreads()
        ]
        receipts = [twin.result()["receipt"] for twin in twins]
    assert len(receipts) == 2
    assert max(receipt["systems"] for receipt in receipts) == len(Store.open(bare).systems_of_shard(1))
    cache_teacher(config(bare, teacher))
    assert_same_store(bare, many / "one.kdcache")


@pytest.fixture
def broken(tmp_path):
    """A store with one system of nitrogen, and a teacher that says nonsense about it."""
    systems = structures(600)
    systems[77].numbers[0] = 7
    store = make_store(tmp_path / "s.kdcache", write_extxyz(tmp_path / "odd.extxyz", systems))
    potential = Potential.load(write_teacher(tmp_path / "teacher"))
    weights = potential.model.state_dict()
    (embedding,) = (name for name in weights if "embedding" in name.lower() and weights[name].ndim == 2)
    weights[embedding][7 - 1] = float("nan")
    potential.metadata["provenance"]["elements"] = [1, 6, 7, 8]
    potential.save(tmp_path / "teacher.safetensors")
    return store, tmp_path / "teacher.safetensors"


@pytest.mark.slow
def test_a_failing_system_stops_with_its_name_and_what_is_committed_stays(broken, scheduler):
    store, teacher = broken
    asked = config(store, teacher, encoding="fp16", scheduler=scheduler)
    with pytest.raises(TeacherError, match=r"odd\.extxyz#77: the teacher gives non-finite .*--skip-bad"):
        cache_teacher(asked)
    assert verify(store).ok
    assert not list(store.rglob(".tmp-*"))
    kept = {p: (store / p).read_bytes() for p in commits(store)}
    done = cache_teacher(asked.model_copy(update={"skip_bad": True}))
    assert [bad.partition("odd.extxyz")[2] for bad in done.bad_systems] == ["#77"]
    assert kept.items() <= {p: (store / p).read_bytes() for p in commits(store)}.items()
    with Cache.open(store, complete=True) as cache:
        assert len(cache.bad_systems("teacher")) == 1


@pytest.mark.slow
def test_files_that_may_not_grow_stop_all_workers(many, bare, teacher, scheduler):
    asked = config(bare, teacher, scheduler=scheduler)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Client(scheduler, set_as_default=False) as client:
        client.run(resource.setrlimit, resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            with pytest.raises(CacheError, match=r"train\.kdcache: cannot write \(File too large"):
                cache_teacher(asked)
        finally:
            client.run(resource.setrlimit, resource.RLIMIT_FSIZE, (hard, hard))
    assert verify(bare).ok
    assert not list(bare.rglob(".tmp-*"))
    cache_teacher(asked)
    assert_same_store(bare, many / "one.kdcache")


@pytest.mark.slow
def test_the_scheduler_goes_while_shards_are_in_work(bare, teacher):
    with cluster.local_cluster("cpu", 2, 8) as (existing, _):

        def leave():
            if len(commits(bare)) > 1:
                existing.close()
            return len(commits(bare)) > 1

        with background(leave), pytest.raises(CacheError, match=r"the scheduler tcp://.* has gone, or gave"):
            cache_teacher(config(bare, teacher, scheduler=existing.scheduler_address, batch_atoms=32))
    assert commits(bare)
    assert verify(bare).ok


@pytest.mark.slow
def test_workers_without_this_package(bare, teacher, scheduler, monkeypatch):
    monkeypatch.setattr(cluster, "find_spec", {}.get)
    with pytest.raises(ConfigError, match=f"--scheduler {scheduler}: its workers cannot import molkd"):
        cache_teacher(config(bare, teacher, scheduler=scheduler))


@pytest.mark.parametrize(
    "address", ["nonsense", "tcp://127.0.0.1:9", "foo://127.0.0.1:9", "file.json"], ids=lambda a: a[:5]
)
def test_no_scheduler_there(bare, teacher, address, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_CONNECT_SECONDS", 0.2)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.json").write_text('{"type": "Nothing"}')
    with pytest.raises(ConfigError, match=f"--scheduler {address}: no Dask scheduler answers there"):
        cache_teacher(config(bare, teacher, scheduler=address))
    assert commits(bare) == []


def test_each_worker_gets_a_gpu_in_turn(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert cluster.visible_devices("auto") == ["0", "1", "2"]
    assert cluster.visible_devices("cuda:1") == ["1"]
    assert cluster.visible_devices("cpu") == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-7f,2")  # as a batch system gives them
    assert cluster.visible_devices("auto") == ["4", "GPU-7f", "2"]
    assert cluster.visible_devices("cuda:2") == ["2"]


@pytest.mark.slow
def test_workers_see_their_gpu_alone(monkeypatch):
    monkeypatch.setattr(cluster, "visible_devices", lambda name: ["4", "GPU-7f"])
    with cluster.local_cluster("auto", 3, 8) as (workers, threads), Client(workers) as client:
        seen = client.run(os.getenv, "CUDA_VISIBLE_DEVICES")
    assert threads is None
    assert sorted(seen.values()) == ["4", "4", "GPU-7f"]
    assert os.getenv("CUDA_VISIBLE_DEVICES") is None


def test_settings_for_workers_elsewhere(many, tmp_path, monkeypatch):
    """Paths hold from any folder, and everything is a plain value."""
    monkeypatch.chdir(many)
    given = CacheConfig(store="one.kdcache", teacher="teacher.safetensors", workers=3)
    plain = distributed._plain(given, "cuda")
    monkeypatch.chdir(tmp_path)
    there = CacheConfig.model_validate(plain)
    assert there.store == many / "one.kdcache"
    assert there.teacher == str(many / "teacher.safetensors")
    assert (there.workers, there.device) == (None, "cuda")
    assert there.model_dump(mode="json") == plain
    assert (
        distributed._plain(given.model_copy(update={"teacher": "sevennet-0"}), "cpu")["teacher"]
        == "sevennet-0"
    )
