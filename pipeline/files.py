"""Writing files so that a crash leaves the old one or the new one, and keeping others out of a folder."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from molkd.cache_schema.files import make_folder, write_file
from molkd.pipeline.errors import DataError


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replace `path` durably and whole; umask applies, parents are made.

    Raises
    ------
    DataError
        If it cannot be written.
    """
    try:
        make_folder(path.parent)
        write_file(path, content.encode() if isinstance(content, str) else content, replace=True)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(
            f"{path}: cannot be written ({reason}); check the path, its rights and the free space"
        ) from error


@contextmanager
def locked_folder(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes out of a folder; no file is left, and file systems without locks do without.

    Raises
    ------
    BlockingIOError
        If another process is in, unless we are to wait for it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)
