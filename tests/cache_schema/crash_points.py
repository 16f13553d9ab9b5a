"""Kill a writing process (SIGKILL) before its n-th file operation, for many n; resume; compare the result.

    python crash_points.py FOLDER STEP

Prints JSON: the number of operations of a whole run, of kills, and what was wrong after any of them.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from cache_example import make_example, tree_digest, write_all

from molkd.cache_schema import array_file
from molkd.cache_schema.groups import load_atoms
from molkd.cache_schema.layout import PLAN
from molkd.cache_schema.verify import verify
from molkd.cache_schema.writer import Store

OPERATIONS = {
    "open",
    "os.rename",
    "os.link",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.truncate",
    "fsync",
    "append",
}


def count_operations(kill_at: int, report: int) -> None:
    """Count what touches the disk and die before number `kill_at`; else tell the pipe `report` the count."""
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in OPERATIONS and (event in ("fsync", "append") or "kdcache" in str(arguments)):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    append = array_file.ArrayFile.append

    def counted_append(self, rows):
        sys.audit("append")
        append(self, rows)
        self.handle.flush()  # so that a kill leaves a partly written file

    array_file.ArrayFile.append = counted_append
    os.fsync = lambda fd: sys.audit("fsync")
    write_all(FOLDER / "x.kdcache", EXAMPLE)
    os.write(report, str(seen).encode())


def in_child(kill_at: int) -> tuple[int, int]:
    """Return the signal that ended the child and the operations it counted."""
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            count_operations(kill_at, send)
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


def check_after_kill(path: Path) -> list[str]:
    """Whatever the moment: what counts as committed is sound."""
    if not (path / PLAN).exists():
        return [] if not path.exists() else ["a store without a plan"]
    report = verify(path)
    return [str(p) for p in report.problems]


EXAMPLE = make_example([700, 400, 5, 1000], seed=1)
FOLDER = Path(sys.argv[1])


def main() -> None:
    path = FOLDER / "x.kdcache"
    _, n_operations = in_child(0)
    reference = tree_digest(path / "data.zarr")
    wrong, kills, partial = [], 0, 0
    for kill_at in range(1, n_operations, int(sys.argv[2])):
        shutil.rmtree(path, ignore_errors=True)
        ended, _ = in_child(kill_at)
        if ended != signal.SIGKILL:
            wrong.append(f"{kill_at}: not killed")
            continue
        kills += 1
        wrong += [f"{kill_at}: {problem}" for problem in check_after_kill(path)]
        if (path / PLAN).exists():
            store = Store.open(path)
            rows = load_atoms(store.plan, store.systems).rows
            partial += 0 < len(store.missing_shards("atoms")) < len(rows)
        in_child(0)  # the same command again
        if tree_digest(path / "data.zarr") != reference:
            wrong.append(f"{kill_at}: data.zarr differs after resuming")
        report = verify(path)
        wrong += [f"{kill_at}, resumed: {p}" for p in (*report.problems, *report.notes)]
        if {p.name for p in FOLDER.iterdir()} != {"x.kdcache"}:
            wrong.append(f"{kill_at}: left-overs beside the store")
    json.dump({"operations": n_operations, "kills": kills, "partial": partial, "wrong": wrong}, sys.stdout)


main()
