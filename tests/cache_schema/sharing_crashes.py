"""Kill a copy, a merge, an overlay (SIGKILL) before its n-th change on disk, for some n; resume; compare.

    python sharing_crashes.py FOLDER KILLS

Prints JSON: for each scenario the number of changes of a whole run, of kills, and what was wrong after any.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from cache_example import make_example, tree_digest, write_all

from molkd.cache_schema.layout import PLAN
from molkd.cache_schema.overlay import create_overlay
from molkd.cache_schema.verify import verify
from molkd.pipeline.sharing.copying import copy_store
from molkd.pipeline.sharing.merging import merge_stores
from molkd.pipeline.sharing.selection import Selection

CHANGES = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir"}
FOLDER, KILLS = Path(sys.argv[1]), int(sys.argv[2])
SOURCE, SMALL, LARGE = (FOLDER / f"{name}.kdcache" for name in ("source", "small", "large"))
OUT = FOLDER / "out" / "x.kdcache"


def count_changes(act: Callable[[], object], kill_at: int, report: int) -> None:
    """Do it, count what changes OUT and die before number `kill_at`; else tell `report` the count."""
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        writes = (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_CREAT)
        )
        if (event in CHANGES or writes) and str(OUT.parent) in str(arguments):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    os.fsync = lambda fd: None
    act()
    os.write(report, str(seen).encode())


def in_child(act: Callable[[], object], kill_at: int) -> tuple[int, int]:
    """Return the signal that ended the child and the changes it counted."""
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            count_changes(act, kill_at, send)
            code = 0
        finally:
            os._exit(code)
    os.close(send)
    status = os.waitpid(pid, 0)[1]
    counted = int(os.read(receive, 100) or 0)
    os.close(receive)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"the run with kill_at={kill_at} failed")
    return (os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0), counted


def campaign(act: Callable[[], object]) -> dict[str, object]:
    """Kill it again and again, each time from the start."""
    shutil.rmtree(OUT.parent, ignore_errors=True)
    OUT.parent.mkdir()
    _, n_changes = in_child(act, 0)
    reference, manifest = tree_digest(OUT / "data.zarr"), _read(OUT / "manifest.json")
    wrong, kills = [], 0
    for kill_at in np.unique(np.linspace(1, n_changes, KILLS).astype(int)).tolist():
        shutil.rmtree(OUT)
        ended, _ = in_child(act, kill_at)
        kills += ended == signal.SIGKILL
        if (OUT / PLAN).exists():
            wrong += [f"{kill_at}: {problem}" for problem in verify(OUT).problems]
        elif OUT.exists():
            wrong.append(f"{kill_at}: a store without a plan")
        in_child(act, 0)  # the same command again
        if tree_digest(OUT / "data.zarr") != reference:
            wrong.append(f"{kill_at}: data.zarr differs after resuming")
        if _read(OUT / "manifest.json") != manifest:
            wrong.append(f"{kill_at}: the manifest differs after resuming")
        report = verify(OUT)
        wrong += [f"{kill_at}, resumed: {p}" for p in (*report.problems, *report.notes) if p.kind != "base"]
        if {p.name for p in OUT.parent.iterdir()} != {OUT.name}:
            wrong.append(f"{kill_at}: left-overs beside the store")
    return {"changes": n_changes, "kills": kills, "wrong": wrong}


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def main() -> None:
    write_all(SOURCE, make_example([700, 400, 5, 1000, 90, 33], seed=1))
    copy_store(SOURCE, SMALL, selection=Selection(max_atoms=400))
    copy_store(SOURCE, LARGE, selection=Selection(min_atoms=90))
    coded = ("node=int8", "v2v=pca:2")
    result = {
        "copy": campaign(lambda: copy_store(SOURCE, OUT, signals=("node", "edge"))),
        "encode": campaign(
            lambda: copy_store(
                SOURCE, OUT, signals=("node", "v2v"), encoding=coded, selection=Selection(random=4)
            )
        ),
        "merge": campaign(lambda: merge_stores([SMALL, LARGE], OUT, signals=("node", "energy"))),
        "overlay": campaign(lambda: create_overlay(SOURCE, OUT)),
    }
    json.dump(result, sys.stdout)


main()
