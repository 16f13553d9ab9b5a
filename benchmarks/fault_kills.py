"""Commands that are killed at random points and given again; what they leave is compared with a calm run.

A process that has imported everything forks one child for each run, so a run costs no imports. Every other
kill comes from outside after a random share of the time that the command takes, the others just before one of
its changes on the disk: a file created, renamed, linked or removed, a folder made. Nothing waits for the
disk: what a process handed to the system outlives it.
"""

import hashlib
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from molkd.cache_schema.errors import MolkdError
from molkd.cache_schema.files import TMP_PREFIX
from molkd.cache_schema.layout import PLAN
from molkd.cache_schema.verify import verify
from molkd.pipeline.caching import cache_teacher
from molkd.pipeline.config import CacheConfig
from molkd.pipeline.repairing import repair_store
from molkd.pipeline.sharing.adding import add_systems
from molkd.pipeline.sharing.copying import copy_store
from molkd.pipeline.sharing.merging import merge_stores

SIGNALS = ("energy", "forces", "node", "v2v", "edge")
ENCODINGS = ("node=int8", "v2v=pca:8", "edge=fp16")
TIMED_RUNS = 3
AGAIN = 0.25  # share of kills after which the second run is killed, too
SECONDS = 300  # no run takes longer
MOST_MISSES = 20  # kills in a row that came too late
_CHANGES = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
Tree = dict[str, str]  # file -> sha256


@dataclass
class Command:
    """What is killed.

    Attributes
    ----------
    act : writes the store it is given
    prepare : makes the folder that the first run finds
    expected : the store that must come out; None: what a calm run gives
    """

    name: str
    act: Callable[[Path], object]
    prepare: Callable[[Path], object] = lambda _: None
    expected: Path | None = None


@dataclass
class Killed:
    """What became of the kills of one command."""

    kills: int = 0
    second_kills: int = 0
    too_late: int = 0  # the command had ended
    survived: int = 0
    wrong: list[str] = field(default_factory=list)


def commands(folder: Path) -> list[Command]:
    """Return the commands, on what `made_up_faults.make` put into the folder."""
    whole, teacher = folder / "whole.kdcache", str(folder / "teacher.safetensors")

    def cache(out: Path) -> None:
        cache_teacher(
            CacheConfig(store=out, teacher=teacher, signals=SIGNALS, encoding=ENCODINGS, device="cpu"),
            folder / "first.extxyz",
        )

    def damaged(out: Path, arrays: frozenset[str] = frozenset()) -> None:
        """Cut every third file of these arrays, or of all, short; remove every fourth record of a signal."""
        shutil.copytree(whole, out)
        files = [p for p in sorted(out.glob("data.zarr/**/c/**/*")) if p.is_file()]
        data = [path for path in files if not arrays or arrays & set(path.parts)]
        for path in data[::3]:
            path.write_bytes(path.read_bytes()[:-1])
        for path in sorted(out.glob("log/teachers/**/*.json"))[::4]:
            path.unlink()

    def repair(out: Path, **source: Any) -> None:
        summary = repair_store(out, **source)
        if not summary.ok:
            raise RuntimeError(summary.text())

    of_shards = frozenset({"values", "scale", "index", "shift", "n_edges"})  # what a teacher can write again
    return [
        Command("cache-teacher", cache),
        Command("copy", lambda out: copy_store(whole, out)),
        Command(
            "copy, encoded anew", lambda out: copy_store(whole, out, encoding=("node=pca:4", "v2v=pca:4"))
        ),
        Command("merge", lambda out: merge_stores([folder / "small.kdcache", folder / "large.kdcache"], out)),
        Command(
            "add",
            lambda out: add_systems(
                whole, folder / "second.extxyz", out, teacher=teacher, running={"device": "cpu"}
            ),
        ),
        Command(
            "repair from a copy",
            lambda out: repair(out, copy=folder / "copy.kdcache"),
            damaged,
            whole,
        ),
        Command(
            "repair by the teacher",
            lambda out: repair(out, teacher=teacher, device="cpu"),
            lambda out: damaged(out, of_shards),
            whole,
        ),
    ]


def kill_often(command: Command, folder: Path, n_kills: int, rng: np.random.Generator) -> Killed:
    """Kill a command again and again, each time from the start."""
    out = folder / "run" / "out.kdcache"
    seconds, n_changes, reference = _calm_run(command, out)
    found = Killed()
    misses = 0
    while found.kills < n_kills and misses < MOST_MISSES:
        _begin(command, out)
        before = {} if not out.exists() else _tree(out)
        at = _point(found.kills + misses, seconds, n_changes, rng)
        if not _run(command, out, **at)[0]:
            misses, found.too_late = misses + 1, found.too_late + 1
            continue
        found.kills, misses = found.kills + 1, 0
        where = f"{command.name}, killed at {at}"
        is_broken = bool(before)
        wrong = _left(out, before, reference, is_broken=is_broken)
        before = _tree(out) if out.exists() else {}
        if rng.random() < AGAIN:
            at = _point(int(rng.integers(2)), seconds, n_changes, rng)
            where += f", then at {at}"
            if _run(command, out, **at)[0]:
                found.second_kills += 1
                wrong += _left(out, before, reference, is_broken=is_broken)
        wrong += _run(command, out)[1] or _finished(out, reference)
        found.survived += not wrong
        found.wrong += [f"{where}: {one}" for one in wrong]
    if found.kills < n_kills:
        found.wrong.append(f"{command.name}: only {found.kills} of {n_kills} kills came in time")
    shutil.rmtree(out.parent)
    return found


def _point(number: int, seconds: float, n_changes: int, rng: np.random.Generator) -> dict[str, float | int]:
    if number % 2:
        return {"after": round(float(rng.uniform(0, seconds)), 4)}
    return {"change": int(rng.integers(1, n_changes + 1))}


def _calm_run(command: Command, out: Path) -> tuple[float, int, Tree]:
    """Return the shortest time of a run, its changes on the disk, and what it leaves."""
    took, n_changes = [], 0
    for _ in range(TIMED_RUNS):
        _begin(command, out)
        began = time.monotonic()
        _, wrong, n_changes = _run(command, out)
        took.append(time.monotonic() - began)
        if wrong:
            raise SystemExit(f"{command.name} fails undisturbed: {wrong[0]}")
    reference = _tree(command.expected or out)
    wrong = _finished(out, reference)
    if wrong:
        raise SystemExit(f"{command.name} undisturbed: {wrong[0]}")
    return min(took), n_changes, reference


def _begin(command: Command, out: Path) -> None:
    shutil.rmtree(out.parent, ignore_errors=True)
    out.parent.mkdir()
    command.prepare(out)


def _left(out: Path, before: Tree, reference: Tree, *, is_broken: bool) -> list[str]:
    """Look at what a killed run left: what is committed must be right, and nothing that was whole be lost.

    Parameters
    ----------
    before : what the run found
    is_broken : whether that was a damaged store
    """
    if not (out / PLAN).exists():
        return ["a store without a plan"] if out.exists() else []
    after, wrong = _tree(out), []
    try:
        problems = verify(out).problems
    except MolkdError as error:
        return [f"cannot be verified: {error}"]
    if not is_broken:
        wrong += [str(problem) for problem in problems]
        records = [Path(name) for name in after if name.startswith("log/") and TMP_PREFIX not in name]
        shards = {(record.parent.relative_to("log").as_posix(), int(record.stem)) for record in records}
        wrong += [
            f"{name} is committed with other content"
            for name in after
            if "/c/" in name
            and TMP_PREFIX not in name
            and _shard_of(name) in shards
            and after[name] != reference.get(name)
        ]
    whole = [n for n in before if before[n] == reference.get(n) or (n.startswith("log/") and n in reference)]
    return wrong + [f"{n} was whole and is not" for n in whole if after.get(n) != before[n]]


def _shard_of(name: str) -> tuple[str, int]:
    array, _, place = name.removeprefix("data.zarr/").partition("/c/")
    return array.rpartition("/")[0], int(place.split("/")[0])


def _finished(out: Path, reference: Tree) -> list[str]:
    """Compare with a calm run, byte for byte but for records, which tell of time and host."""
    found = _tree(out)
    wrong = [f"{name} is missing" for name in reference if name not in found]
    wrong += [f"{name} is left over" for name in found if name not in reference]
    wrong += [
        f"{name} differs" for name in _data(reference) if name in found and found[name] != reference[name]
    ]
    report = verify(out)
    wrong += [str(one) for one in (*report.problems, *report.notes)]
    beside = sorted(path.name for path in out.parent.iterdir() if path != out)
    return wrong + ([f"left beside the store: {', '.join(beside)}"] if beside else [])


def _data(tree: Tree) -> list[str]:
    return [name for name in tree if not name.startswith("log/")]


def _tree(folder: Path) -> Tree:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _run(
    command: Command, out: Path, after: float | None = None, change: int | None = None
) -> tuple[bool, list[str], int]:
    """Run a command in a child; return whether it was killed, how it failed, and its changes on the disk.

    Parameters
    ----------
    after : seconds until it is killed
    change : number of the change on the disk just before which it dies
    """
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(receive)
        _child(command, out, change, send)
    os.close(send)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(receive) as pipe:
        said = pipe.read()
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True, [], 0
    if status:
        return False, [said.strip() or f"ended with status {status}"], 0
    return False, [], int(said)


def _child(command: Command, out: Path, change: int | None, send: int) -> None:
    signal.alarm(SECONDS)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    seen, code, place = 0, 1, str(out.parent)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        flags = arguments[2] if event == "open" else None
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (event in _CHANGES or writes) and place in str(arguments[0]):
            seen += 1
            if seen == change:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        os.fsync = lambda _: None
        sys.addaudithook(hook)
        command.act(out)
        os.write(send, str(seen).encode())
        code = 0
    except BaseException:
        os.write(send, traceback.format_exc().encode()[-2000:])
    finally:
        os._exit(code)
