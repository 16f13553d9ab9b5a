"""Runs in processes of their own: killed, interrupted, orphaned, on a Dask cluster; all of them go on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from molkd.pipeline.distill.run_folder import RunFolder
from molkd.pipeline.study.grid import cells_of, runs_of
from molkd.pipeline.study.options import StudyOptions
from molkd.pipeline.study.process import make_job, perform
from molkd.pipeline.study.reading import read_study
from molkd.pipeline.study.run import run_study
from molkd.pipeline.study.state import FAILED, read_failure

KD = [sys.executable, "-c", "from molkd.cli import main; main()"]
SLOW = 400  # steps, of some milliseconds: enough to be hit in the middle of
CHECKPOINTS = {"checkpoint_every": 5, "val_every": 100_000}


def wait_for(condition, process=None):
    while not condition():
        assert process is None or process.poll() is None
        time.sleep(0.005)


def children(pid):
    """Return the processes that a process has started, by the system's own list."""
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()] + [
        int(p)
        for task in Path(f"/proc/{pid}/task").iterdir()
        if task.name != str(pid)
        for p in (task / "children").read_text().split()
    ]


@pytest.fixture
def slow(content, write):
    """A study of two runs that take a while, without tests and tables."""
    given = content | {"strategies": {"n2n": "n2n"}, "steps": SLOW, "test": {}}
    return write(given | {"set": content["set"] | CHECKPOINTS})


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_killed_interrupted_and_continued(slow, no_tables):
    """One run is killed and noted, Ctrl-C stops the other at a checkpoint; the same command finishes both."""
    out = slow.parent / "small" / "runs" / "p" / "n2n"
    runs = [out / "seed0", out / "seed1"]
    command = [*KD, "study", str(slow), "--jobs", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        wait_for(lambda: all((run / "last.pt").exists() for run in runs), process)
        killed = children(process.pid)[0]
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: any((run / FAILED).exists() for run in runs), process)
        os.killpg(process.pid, signal.SIGINT)  # as the terminal does
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "failed: ended by SIGKILL; the system does that where memory runs out" in said
    assert "stopping at checkpoints" in said
    assert said.endswith("interrupted; the same command continues\n")
    assert "Traceback" not in said
    dead, stopped = sorted(runs, key=lambda run: not (run / FAILED).exists())
    assert read_failure(dead).kind == "killed"
    assert not (stopped / FAILED).exists()
    reached = {run: RunFolder(run).load_state()["counters"]["step"] for run in runs}
    assert all(0 < step < SLOW for step in reached.values())
    assert "interrupted at step" in (stopped / "log.txt").read_text()

    study = read_study(slow)
    done = run_study(study, StudyOptions(jobs=2))
    assert (done.n_finished, done.failed) == (2, {})
    for run in runs:
        assert json.loads((run / "metrics.json").read_text())["steps"] == SLOW
        assert f"continuing at step {reached[run]} of {SLOW}" in (run / "log.txt").read_text()
    assert not list(out.rglob(FAILED))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_run_whose_study_was_killed_stops_at_a_checkpoint(slow):
    run = slow.parent / "small" / "runs" / "p" / "n2n" / "seed0"
    command = [*KD, "study", str(slow), "--jobs", "1"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        wait_for(lambda: (run / "last.pt").exists(), process)
        process.kill()
    wait_for(lambda: not RunFolder(run).is_busy)
    assert "interrupted at step" in (run / "log.txt").read_text()
    assert 0 < RunFolder(run).load_state()["counters"]["step"] < SLOW


def test_what_a_process_says_of_its_end(study, tmp_path):
    """An error of the user's comes back as its line, an unexpected one with its traceback, a stop as none."""
    config = runs_of(study(), cells_of(study()), periodic=True)[0].config
    absent = config.model_copy(update={"store": tmp_path / "none.kdcache"})
    outcome = perform(make_job(absent, threads=1), lambda: 0)
    assert (outcome.ended, outcome.failure.kind) == ("failed", "error")
    assert "none.kdcache" in outcome.failure.reason
    assert read_failure(config.out) == outcome.failure
    broken = make_job(config, threads=1)
    broken["config"]["seed"] = "three"
    outcome = perform(broken, lambda: 0)
    assert outcome.failure.kind == "unexpected"
    assert "(exit code 1)" in outcome.failure.reason
    assert "ValidationError" in outcome.failure.trace
    assert perform(broken, lambda: 1).ended == "interrupted"


@pytest.mark.slow
def test_runs_on_a_cluster(content, write, material, no_tables):
    """Two workers of a Dask cluster make the runs that a single process makes, bit for bit."""
    from molkd.pipeline import cluster

    content["set"] |= {"device": "cpu"}
    few = write(content | {"test": {}, "strategies": {"none": [], "v2v": "v2v"}, "seeds": 1})
    with cluster.local_cluster("cpu", 2, 3) as (existing, _):
        address = existing.scheduler_address
        options = StudyOptions(scheduler=address, threads=1)
        there = read_study(few, out=few.parent / "there")
        assert run_study(there, options).n_finished == 2
        wrong = write(content | {"test": {}, "strategies": {"none": []}, "seeds": 1}, "wrong.yaml")
        absent = read_study(wrong, out=few.parent / "absent")
        (absent.out / "runs" / "p" / "none" / "seed0" / "last.pt").mkdir(parents=True)  # no checkpoint
        failed = run_study(absent, options).failed
    assert "damaged checkpoint" in failed["p/none/seed0"]
    here = read_study(few, out=few.parent / "here")
    assert run_study(here, StudyOptions(jobs=2, threads=1)).n_finished == 2
    for name in ("none", "v2v"):
        files = [s.out / "runs" / "p" / name / "seed0" / "best.safetensors" for s in (here, there)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_the_command_itself(content, write, tmp_path):
    """Results on stdout, progress on stderr, exit code 1 where a run failed."""
    few = write(content | {"test": {}, "strategies": {"none": []}, "seeds": 1})
    shown = subprocess.run([*KD, "study", str(few), "--dry-run", "--json"], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["n_to_make"] == 1
    (tmp_path / "small" / "runs" / "p" / "none" / "seed0" / "last.pt").mkdir(parents=True)  # no checkpoint
    failed = subprocess.run([*KD, "study", str(few)], capture_output=True, text=True)
    assert failed.returncode == 1, failed.stderr
    assert "failed runs (1):\n  p/none/seed0: " in failed.stdout
    assert "[1/1] p/none/seed0 failed: " in failed.stderr
    assert yaml.safe_load(few.read_text())["name"] == "small"
