"""Reading what anybody may have written: regular files of bounded size only, and JSON without surprises."""

import contextlib
import errno
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from molkd.cache_schema.errors import IntegrityError

_HOLLOW_BYTES = 1 << 26  # files below need no look at what of them is stored
_HOLLOW_SHARE = 64  # of a file, at least one part in so many has to be stored
_MAX_EXTENTS = 10_000  # looked at; a file in more pieces is not hollow
_BYTES_PER_ITEM = 4  # of JSON text; what we write has more

SHOWN = 120  # characters of a stored value in a message


def brief(value: object) -> str:
    """Return a stored value as a message may show it."""
    return shorten(
        repr(value) if not isinstance(value, list | dict) else json.dumps(value)[: SHOWN + 1], SHOWN
    )


def shorten(text: str, n_characters: int) -> str:
    """Return a text that may hold stored values, cut off where it is too long for a message."""
    return text if len(text) <= n_characters else f"{text[: n_characters - 3]}..."


def open_regular(path: Path) -> int:
    """Open a file for reading and return its descriptor; a pipe or device is refused without waiting for it.

    Raises
    ------
    IntegrityError
        If it is no regular file.
    OSError
        If it cannot be opened.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        if error.errno not in (errno.ENXIO, errno.ENODEV, errno.ELOOP):  # a socket, no such device
            raise
    else:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
    raise IntegrityError(f"{path}: is no regular file; a store holds nothing else, restore it from a copy")


def open_and_size(path: Path) -> int:
    """Return the size of a regular file that can be opened.

    Raises
    ------
    IntegrityError, OSError
        As `open_regular`.
    """
    fd = open_regular(path)
    try:
        return os.fstat(fd).st_size
    finally:
        os.close(fd)


def read_small(path: Path, max_bytes: int, remedy: str) -> bytes:
    """Read a whole file that cannot be large.

    Raises
    ------
    IntegrityError
        If it is larger than `max_bytes`, mostly holes, or no regular file.
    """
    with os.fdopen(open_regular(path), "rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        if size > max_bytes:
            raise IntegrityError(f"{path}: {size} bytes, at most {max_bytes} expected; {remedy}")
        if is_hollow(handle.fileno()):
            raise IntegrityError(f"{path}: {size} bytes, hardly any of them written; {remedy}")
        return handle.read(size)


def is_hollow(fd: int) -> bool:
    """Say whether hardly anything of a large file is stored: it was never written, only given a size.

    File systems that know of no holes say that all of it is stored.
    """
    size = os.fstat(fd).st_size
    if size < _HOLLOW_BYTES:
        return False
    stored = end = 0
    with contextlib.suppress(OSError):  # no data after this point
        for _ in range(_MAX_EXTENTS):
            begin = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, begin, os.SEEK_HOLE)
            stored += end - begin
            if stored >= size // _HOLLOW_SHARE:
                return False
        return False
    return stored < size // _HOLLOW_SHARE


def walk(folder: Path) -> Iterator[Path]:
    """Yield everything below a folder that is no folder itself; links are yielded, never followed."""
    waiting = [str(folder)]
    while waiting:
        here = waiting.pop()
        try:
            with os.scandir(here) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError:  # removed meanwhile, or a path too long to be asked for
            continue
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                waiting.append(entry.path)
            else:
                yield Path(entry.path)


def n_bytes_below(folder: Path) -> int:
    """Return the bytes of all regular files below a folder."""
    total = 0
    for path in walk(folder):
        with contextlib.suppress(OSError):
            found = path.lstat()
            total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return total


def parse_json(
    raw: bytes, max_bytes: int | None = None, on_table: Callable[[dict[str, Any]], object] = bool
) -> Any:
    """Return what a JSON text says.

    Parameters
    ----------
    max_bytes : that a text of this kind can have; bounds the number of values in it. None: any
    on_table : called with each dictionary as soon as it is read, to make something smaller of its values

    Raises
    ------
    ValueError
        If it is not JSON in UTF-8, nested too deeply, has a key twice, NaN or an infinity, text that cannot
        be written, or far more values than its kind.
    """
    n_items = raw.count(b",") + raw.count(b"[") + raw.count(b"{")
    if max_bytes is not None and n_items > max_bytes // _BYTES_PER_ITEM:
        raise ValueError(f"{n_items} values")

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key twice")
        on_table(found)
        return found

    try:
        value = json.loads(raw.decode(), object_pairs_hook=table, parse_constant=_no_constant)
        if b"\\ud" in raw or b"\\uD" in raw:
            json.dumps(
                value, ensure_ascii=False, default=bytes.hex
            ).encode()  # half a surrogate pair is no text
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
