"""Runs of the real command line in forked processes that already imported torch, to kill them by the dozen.

The process that forks imports the packages once; a run then starts in milliseconds instead of seconds.
"""

import multiprocessing
import os
import resource
import signal
import sys
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

_EVENTS = {"os.rename", "os.link", "os.mkdir", "os.remove"}
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["molkd.cli", "molkd.pipeline.distributed", "torch_geometric"])


@dataclass
class Run:
    """One process of the command line; `log` gets its stderr, ``log.out`` its stdout."""

    process: BaseProcess
    log: Path

    def wait(self, timeout: float = 120.0) -> int:
        """Return the exit code, minus the number of the signal that ended it."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"still running after {timeout} s: {self.text}")
        return self.process.exitcode

    @property
    def text(self) -> str:
        return self.log.read_text()

    @property
    def out(self) -> str:
        return Path(f"{self.log}.out").read_text()


def start(
    arguments: list[object],
    log: Path,
    *,
    watched: Path | None = None,
    kill_at: int | None = None,
    file_bytes: int | None = None,
) -> Run:
    """Start ``kd`` with these arguments.

    Parameters
    ----------
    log : file for stderr; with `watched`, ``log.count`` gets the number of changes seen
    watched : folder in which creations, renames, links and removals of files are counted
    kill_at : the process kills itself, as hard as the system does, just before this change
    file_bytes : no file may become longer
    """
    process = _context.Process(
        target=_main, args=([str(a) for a in arguments], str(log), str(watched or ""), kill_at, file_bytes)
    )
    process.start()
    return Run(process, log)


def run(arguments: list[object], log: Path, **options: object) -> Run:
    """Start and wait."""
    started = start(arguments, log, **options)
    started.wait()
    return started


def _main(arguments: list[str], log: str, watched: str, kill_at: int | None, file_bytes: int | None) -> None:
    for stream, path in ((1, f"{log}.out"), (2, log)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    sys.argv = ["kd", *arguments]
    from molkd.cli import main  # noqa: TID251

    changes = _count_changes(watched, kill_at) if watched else [0]
    try:
        main()
    finally:
        if watched:
            Path(f"{log}.count").write_text(str(changes[0]))


def _count_changes(watched: str, kill_at: int | None) -> list[int]:
    changes = [0]

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event == "open":
            path, flags = args[0], args[2]
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in _EVENTS:
            path = args[0]
        else:
            return
        if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(watched):
            return
        changes[0] += 1
        if changes[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return changes
