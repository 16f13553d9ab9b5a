"""LMDB files opened for reading: shared inside the process, and checked before anything is mapped."""

import threading
from dataclasses import dataclass
from pathlib import Path

import lmdb

from molkd.pipeline.errors import DataError

_MAGIC = 0xBEEFC0DE.to_bytes(4, "little")
_MAGIC_OFFSET = 16  # behind the header of page 0
_REMEDY = "Copy it again from where it came from."


@dataclass
class _Shared:
    environment: lmdb.Environment
    n_users: int


# py-lmdb refuses a second environment on the same file in one process, so readers of one file share it.
_open_files: dict[tuple[int, int], _Shared] = {}
_lock = threading.Lock()


class LmdbFile:
    """Read-only access to one LMDB file (``subdir=False``)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        stat = path.stat()
        self._inode = (stat.st_dev, stat.st_ino)
        with _lock:
            if self._inode not in _open_files:
                _open_files[self._inode] = _Shared(_open_checked(path), 0)
            shared = _open_files[self._inode]
            shared.n_users += 1
        self._environment: lmdb.Environment | None = shared.environment

    @property
    def n_entries(self) -> int:
        """Number of keys."""
        return int(self._open_environment().stat()["entries"])

    def get(self, key: bytes) -> bytes | None:
        """Return the value under `key`, None if there is none."""
        try:
            with self._open_environment().begin() as transaction:
                value: bytes | None = transaction.get(key)
                return value
        except lmdb.Error as error:
            raise DataError(f"{self.path}, key {key.decode()}: damaged LMDB ({error}). {_REMEDY}") from error

    def first_value(self) -> bytes | None:
        """Return the value under the smallest key, None in an empty file."""
        try:
            with self._open_environment().begin() as transaction, transaction.cursor() as cursor:
                return bytes(cursor.value()) if cursor.first() else None
        except lmdb.Error as error:
            raise DataError(f"{self.path}: damaged LMDB ({error}). {_REMEDY}") from error

    def close(self) -> None:
        """Give up this reader's share; the last one closes the file."""
        if self._environment is None:
            return
        self._environment = None
        with _lock:
            shared = _open_files[self._inode]
            shared.n_users -= 1
            if shared.n_users == 0:
                shared.environment.close()
                del _open_files[self._inode]

    def _open_environment(self) -> lmdb.Environment:
        if self._environment is None:
            raise DataError(f"{self.path}: read after it was closed. Open the source again.")
        return self._environment


def is_lmdb(path: Path) -> bool:
    """Return whether a file starts like an LMDB file."""
    with path.open("rb") as file:
        return file.read(_MAGIC_OFFSET + 4)[_MAGIC_OFFSET:] == _MAGIC


def _open_checked(path: Path) -> lmdb.Environment:
    if not is_lmdb(path):
        raise DataError(f"{path}: not an LMDB file. {_REMEDY}")
    try:
        # lock=False: data sets lie on read-only and network disks. readahead=False: reading is random.
        environment = lmdb.open(str(path), subdir=False, readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise DataError(
            f"{path}: cannot be opened as LMDB ({error}). If another library of this process has it "
            "open, close it there; if too many files are open, raise the limit (ulimit -n); otherwise it is "
            f"damaged. {_REMEDY}"
        ) from error
    # Touching a page that the file does not have would kill the process (SIGBUS): check the length first.
    n_bytes = path.stat().st_size
    expected = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if n_bytes < expected:
        environment.close()
        raise DataError(f"{path}: cut off, {n_bytes} of {expected} bytes. {_REMEDY}")
    return environment
