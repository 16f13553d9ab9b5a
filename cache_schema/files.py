"""Files that appear whole or not at all: temporary names, fsync, publication, sweeping, checksums."""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from molkd.cache_schema.errors import CacheError, IntegrityError

TMP_PREFIX = ".tmp-"
_FOREIGN_TEMPORARY_SECONDS = 24 * 3600  # another host's writer cannot be asked; a day without a write is dead
_SAME_PID_SECONDS = 60  # the pid may have been given to a new process

Bring = Callable[[str, Path], None]  # makes sure that a store's file is at its path
_bring_to: dict[Path, Bring] = {}  # by store: those whose files come from elsewhere when they are first used


def host_name() -> str:
    """Return this host's name, reduced to what fits in a temporary file's name."""
    return re.sub(r"[^A-Za-z0-9]", "_", socket.gethostname()) or "host"


def temporary_path(target: Path) -> Path:
    """Return a name beside `target` that no other writer uses."""
    return target.with_name(f"{TMP_PREFIX}{host_name()}-{os.getpid()}-{secrets.token_hex(4)}")


def on_first_use(root: Path, bring: Bring) -> None:
    """Have `bring` called for every file of a store that `inside` is asked for."""
    _bring_to[root.resolve()] = bring


def inside(root: Path, relative: str) -> Path:
    """Return `root/relative` after following links; the result must lie in the store.

    Raises
    ------
    CacheError
        If the file has to be fetched and cannot be.
    IntegrityError
        If a symbolic link or ".." leads out of the store, or a file that is fetched arrives damaged.
    """
    home = root.resolve()
    try:
        path = (home / relative).resolve()
    except (OSError, RuntimeError) as error:  # a link to itself; names that are too long
        raise IntegrityError(
            f"{root / relative}: leads nowhere ({error}); no store has such links"
        ) from error
    if home != path and home not in path.parents:
        raise IntegrityError(
            f"{root / relative}: leads out of the store to {path}; a store holds no links to files elsewhere"
        )
    bring = _bring_to.get(home)
    if bring is not None:
        bring(relative, path)
    return path


def fsync_folder(folder: Path) -> None:
    """Make renames in a folder durable; file systems that cannot sync folders are left alone."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents durably; modes follow umask and setgid."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        fsync_folder(path.parent)


def open_temporary(target: Path) -> tuple[Path, int]:
    """Create a temporary file beside `target`, locked for as long as its writer lives."""
    path = temporary_path(target)
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    with contextlib.suppress(OSError):  # no locks on this file system: the pid in the name has to do
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return path, fd


def write_file(target: Path, data: bytes, *, replace: bool) -> bool:
    """Write a small file durably and atomically.

    Returns
    -------
    bool
        False if `replace` is false and the file existed; it is left as it was.
    """
    temporary, fd = open_temporary(target)
    try:
        with os.fdopen(fd, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        if replace:
            temporary.replace(target)
        elif not _link(temporary, target, data):
            return False
        fsync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _link(temporary: Path, target: Path, data: bytes) -> bool:
    try:
        target.hardlink_to(temporary)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
            raise
        return _create_exclusively(target, data)  # file systems without hard links
    return True


def _create_exclusively(target: Path, data: bytes) -> bool:
    try:
        handle = target.open("xb")
    except FileExistsError:
        return False
    with handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    return True


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, where the file system has locks; wait for whoever holds it.

    Nothing hangs on it: without locks, a lost race is found when a commit record is linked, and a temporary
    folder's age and process id say whether it is alive.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def is_abandoned(temporary: Path) -> bool:
    """Say whether the writer of a temporary file (or folder) is certainly dead."""
    found = re.fullmatch(r"\.tmp-(\w+)-(\d+)-[0-9a-f]+", temporary.name)
    if not found:
        return False
    try:
        age = time.time() - temporary.stat().st_mtime
        if found[1] != host_name():
            return age > _FOREIGN_TEMPORARY_SECONDS
        if process_lives(int(found[2])) and age < _SAME_PID_SECONDS:
            return False
        fd = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False  # a writer in another container: same host name, its own pids
    except OSError:
        return not process_lives(int(found[2]))
    finally:
        os.close(fd)
    return True


def process_lives(pid: int) -> bool:
    """Say whether a process of this host exists."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def sweep(folder: Path) -> None:
    """Remove what dead writers left in a folder."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.name.startswith(TMP_PREFIX) and is_abandoned(path):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def write_error(path: Path, error: OSError, needed: int) -> CacheError:
    """Turn a failed write into a message with path, bytes and remedy."""
    folder = path if path.is_dir() else path.parent
    try:
        free = f"{shutil.disk_usage(folder).free:,} bytes free"
    except OSError:
        free = "free space unknown"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CacheError(
            f"{path}: disk full ({needed:,} bytes needed, {free}); "
            "free some space and run the same command again, finished shards are kept"
        )
    return CacheError(
        f"{path}: cannot write ({error.strerror or error}; {needed:,} bytes needed, {free}); "
        "check the folder's rights and the disk, then run the same command again, finished shards are kept"
    )
