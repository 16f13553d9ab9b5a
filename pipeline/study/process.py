"""Start the process of one run, wait for it, and say how it ended."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from molkd.pipeline.config import TrainConfig
from molkd.pipeline.distill.run_folder import RunFolder
from molkd.pipeline.study.state import Failure, forget_failure, note_failure

Job = dict[str, Any]  # `config` of the run, `threads` (None leaves them), `device` (None leaves it)
Ended = Literal["finished", "interrupted", "busy", "failed"]

_LOOK_SECONDS = 0.1
_TRACE_BYTES = 4000


@dataclass(frozen=True)
class Outcome:
    """How a process ended; its run folder says the rest."""

    ended: Ended
    seconds: float
    failure: Failure | None = None


def make_job(config: TrainConfig, threads: int | None) -> Job:
    """Return a job as plain JSON values."""
    return {"config": config.model_dump(mode="json"), "threads": threads, "device": None}


def perform(job: Job, stops: Callable[[], int]) -> Outcome:
    """Train in a process of its own, so that nothing that happens to it happens to others.

    Parameters
    ----------
    stops : is asked again and again: 1 has the run stop at a checkpoint, more kills it
    """
    began, out = time.monotonic(), Path(job["config"]["out"])
    folder = RunFolder(out)
    if stops():
        return Outcome("interrupted", 0.0)
    if folder.finished() is not None:  # by somebody else, since the work was shared out
        return Outcome("finished", 0.0)
    if folder.is_busy:
        return Outcome("busy", 0.0)
    forget_failure(out)
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "molkd.pipeline.study.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env=_environment(job),
            process_group=0,  # Ctrl-C on the terminal reaches this process only, which passes it on
        )
        try:
            _tell(child, json.dumps(job) + "\n")
            _wait(child, stops)
        finally:
            if child.poll() is None:
                child.kill()
        assert child.stdout is not None
        answer = child.stdout.read().decode()
        child.communicate()
        said.seek(max(0, said.seek(0, os.SEEK_END) - _TRACE_BYTES))
        trace = said.read().decode(errors="replace")
    outcome = _outcome(child.returncode, answer, trace, time.monotonic() - began, is_stopped=stops() > 0)
    if outcome.failure is not None:
        note_failure(out, outcome.failure)
    return outcome


def _environment(job: Job) -> dict[str, str]:
    environment = dict(os.environ)
    if job["threads"] is not None:
        environment["OMP_NUM_THREADS"] = str(job["threads"])
    if job["device"] is not None:
        environment["CUDA_VISIBLE_DEVICES"] = job["device"]
    return environment


def _tell(child: "subprocess.Popen[bytes]", line: str) -> None:
    """Send the job; the pipe stays open, and ends when this process does."""
    assert child.stdin is not None
    try:
        child.stdin.write(line.encode())
        child.stdin.flush()
    except BrokenPipeError:
        pass  # it died before it listened; its exit code says so


def _wait(child: "subprocess.Popen[bytes]", stops: Callable[[], int]) -> None:
    told = 0
    while True:
        try:
            child.wait(_LOOK_SECONDS)
        except subprocess.TimeoutExpired:
            asked = stops()
            if asked > 1 and told < 2:
                child.kill()
            elif asked and not told:
                child.send_signal(signal.SIGTERM)
            told = max(told, asked)
            continue
        return


def _outcome(code: int, answer: str, trace: str, seconds: float, *, is_stopped: bool) -> Outcome:
    if answer:
        told = json.loads(answer)
        failure = Failure(told["kind"], told["reason"]) if told["ended"] == "failed" else None
        return Outcome(told["ended"], seconds, failure)
    if is_stopped:  # killed while it started, or a second time
        return Outcome("interrupted", seconds)
    if code < 0:
        name = signal.Signals(-code).name
        cause = "; the system does that where memory runs out: take fewer --jobs" if name == "SIGKILL" else ""
        return Outcome("failed", seconds, Failure("killed", f"ended by {name}{cause}", trace))
    last = (trace.strip().splitlines() or ["no message"])[-1]
    return Outcome("failed", seconds, Failure("unexpected", f"{last} (exit code {code})", trace))
