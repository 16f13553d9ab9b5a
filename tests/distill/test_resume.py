"""An interrupted and resumed run ends bitwise where an uninterrupted one does (CPU)."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from distill_cases import (
    MODELS,
    assert_same_run,
    before_step,
    interrupt_after,
    read_metrics,
    train_config,
)

from molkd.pipeline.config import dump_yaml
from molkd.pipeline.distill.train import train_student
from molkd.pipeline.errors import IntegrityError

N_STEPS = 26

# Runs `kd` with each line of arguments in a process of its own, slow enough to be hit in the middle whatever
# the load of the machine. Processes are forked behind the imports, which take longer than the runs.
LAUNCHER = """
import json, os, sys, time
from molkd.cli import main
from molkd.pipeline.distill import train
step = train.train_step
def slow(*arguments):
    time.sleep(0.05)
    return step(*arguments)
train.train_step = slow
for line in sys.stdin:
    sys.argv = ["kd", *json.loads(line)]
    pid = os.fork()
    if pid == 0:
        os.dup2(2, 1)
        main()
        sys.exit()
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class CrashError(Exception):
    """Stands for whatever ends a process."""


def config_of(store: Path, out: Path, name: str):
    """Epochs of 6 batches; rows, checkpoints and validation at steps that do not coincide."""
    kd = [{"name": "n2n"}] + [{"name": "v2v"}] * (name != "schnet")
    return train_config(
        store,
        out,
        student="schnet-tiny" if name == "schnet" else "painn-tiny",
        model=MODELS[name],
        kd=kd,
        training={"max_steps": N_STEPS},
        log_every=3,
        val_every=5,
        checkpoint_every=4,
    )


@pytest.fixture(scope="module")
def uninterrupted(store, tmp_path_factory):
    """Function from a model's name to the folder of a run without incidents."""
    runs: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in runs:
            runs[name] = tmp_path_factory.mktemp("whole") / name
            train_student(config_of(store, runs[name], name))
        return runs[name]

    return run


# After the first step, at the end of an epoch, beside a validation, in mid-epoch, before the last step.
@pytest.mark.parametrize("n_steps", [1, 6, 10, 15, 25])
@pytest.mark.parametrize("name", MODELS)
def test_sigterm_ends_the_step_and_the_same_call_continues(
    store, tmp_path, uninterrupted, monkeypatch, name, n_steps
):
    config = config_of(store, tmp_path, name)
    with monkeypatch.context() as patch:
        interrupt_after(patch, n_steps)
        summary = train_student(config)
    assert (summary.finished, summary.steps) == (False, n_steps)
    assert not (tmp_path / "metrics.json").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert train_student(config).finished
    assert_same_run(tmp_path, uninterrupted(name))


# Before any checkpoint, between a checkpoint and rows that will be written again, behind a validation.
@pytest.mark.parametrize("n_steps", [2, 7, 11, 24])
def test_a_crash_falls_back_to_the_last_checkpoint(store, tmp_path, uninterrupted, monkeypatch, n_steps):
    def crash():
        raise CrashError

    config = config_of(store, tmp_path, "painn-direct")
    with monkeypatch.context() as patch:
        before_step(patch, n_steps, crash)
        with pytest.raises(CrashError):
            train_student(config)
    assert (tmp_path / "last.pt").exists() == (n_steps > 4)
    train_student(config)
    assert_same_run(tmp_path, uninterrupted("painn-direct"))


def test_a_run_may_be_interrupted_again_and_again(store, tmp_path, uninterrupted, monkeypatch):
    config = config_of(store, tmp_path, "painn-direct")
    for n_steps in range(3, N_STEPS, 5):
        with monkeypatch.context() as patch:
            interrupt_after(patch, n_steps)
            assert train_student(config).steps == n_steps
    assert train_student(config).finished
    assert_same_run(tmp_path, uninterrupted("painn-direct"))


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    """A process that starts the runs; a line of arguments in, process id and exit code out."""
    log = tmp_path_factory.mktemp("launcher") / "stderr.txt"
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, "-c", LAUNCHER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        ) as process,
    ):
        yield process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "kill -9"])
@pytest.mark.parametrize("name", MODELS)
def test_a_process_that_is_ended_from_outside(store, tmp_path, uninterrupted, launcher, name, number):
    run, settings = tmp_path / "run", tmp_path / "settings.yaml"
    config = config_of(store, run, name)
    settings.write_text(dump_yaml(config))
    arguments = ["train-student", store, "--student", config.student, "--config", settings, "--out", run]
    print(json.dumps([str(a) for a in arguments]), file=launcher.stdin, flush=True)
    pid = int(launcher.stdout.readline())
    wait_for_step(run, 9 if number == signal.SIGKILL else 3)
    os.kill(pid, number)
    assert int(launcher.stdout.readline()) == (130 if number == signal.SIGTERM else -signal.SIGKILL)
    assert not (run / "metrics.json").exists()
    assert ("the same command continues" in (run / "log.txt").read_text()) == (number == signal.SIGTERM)
    state = torch.load(run / "last.pt", weights_only=True)
    assert 0 < state["counters"]["step"] < N_STEPS
    assert train_student(config).finished
    assert_same_run(run, uninterrupted(name))


def wait_for_step(run: Path, step: int) -> None:
    """Wait until metrics.csv tells of a step."""
    for _ in range(6000):
        if (run / "metrics.csv").exists() and any(int(r["step"]) >= step for r in read_metrics(run)):
            return
        time.sleep(0.01)
    pytest.fail(f"{run}: not at step {step} after a minute")


def test_a_damaged_checkpoint_is_named(store, tmp_path, monkeypatch):
    config = config_of(store, tmp_path, "painn-direct")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        train_student(config)
    content = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(IntegrityError, match=r"last\.pt: damaged checkpoint .*remove it"):
        train_student(config)
