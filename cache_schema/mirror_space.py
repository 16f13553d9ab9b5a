"""Room for mirrors: where they lie, and how much of the disk they may take together."""

import contextlib
import os
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from molkd.cache_schema.errors import CacheError
from molkd.cache_schema.files import TMP_PREFIX, is_abandoned

FOLDER, LIMIT = "MOLKD_CACHE", "MOLKD_CACHE_BYTES"
_DEFAULT_BYTES = 50_000_000_000
_KEEP_SECONDS = 10.0  # what any process has used just now is not removed
_FILL = 0.9  # of the limit is left when files are removed
_UNSEEN = 16  # a part of the limit: after fetching so much, what others fetched is looked at too


def mirrors_folder() -> Path:
    """Return the folder of all mirrors: $MOLKD_CACHE, or one in the user's home."""
    named = os.environ.get(FOLDER)
    return Path(named) if named else Path.home() / ".cache" / "molkd" / "stores"


def mirrors_limit() -> int:
    """Return how many bytes all mirrors together may take: $MOLKD_CACHE_BYTES, or 50 GB.

    Raises
    ------
    CacheError
        If the variable is no number.
    """
    text = os.environ.get(LIMIT, "")
    try:
        limit = int(float(text)) if text else _DEFAULT_BYTES
    except (ValueError, OverflowError):
        limit = 0
    if limit <= 0:
        raise CacheError(f"{LIMIT}={text}: no number of bytes; give one such as 50e9, or unset it")
    return limit


@dataclass(frozen=True)
class _File:
    used: float  # seconds since 1970, when it was last opened
    n_bytes: int
    path: str


class MirrorSpace:
    """Removes the shard files used longest ago when new ones need their room.

    Files that this process has open stay, as does what any process used in the last seconds; so the limit may
    be passed for a moment by what is being read.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._lock = threading.Lock()
        self._used = 0  # bytes of all mirrors as last seen, and what this process fetched since
        self._since = limit  # fetched since they were last seen

    def reserve(self, n_bytes: int) -> None:
        """Make room for a file that is going to be fetched.

        Raises
        ------
        CacheError
            If it can never fit.
        """
        if n_bytes > self.limit:
            raise CacheError(
                f"{self.folder}: a file of {n_bytes:,} bytes is more than mirrors may take ({self.limit:,}); "
                f"set {LIMIT} higher, or copy the store to a local folder (kd cache copy)"
            )
        with self._lock:
            self._since += n_bytes
            is_old = self._since > self.limit // _UNSEEN
            if is_old or self._used + n_bytes > self.limit or n_bytes > self._free():
                self._used, self._since = self._make_room(n_bytes), n_bytes
            self._used += n_bytes
        if n_bytes > self._free():
            raise CacheError(
                f"{self.folder}: disk full ({n_bytes:,} bytes needed, {self._free():,} free); free some "
                f"space, or have mirrors elsewhere ({FOLDER}), then run the same command again"
            )

    def _free(self) -> int:
        return shutil.disk_usage(self.folder).free

    def _make_room(self, n_bytes: int) -> int:
        """Remove files if the limit or the disk asks for it; return the bytes that are left."""
        files = _scan(self.folder)
        total = sum(f.n_bytes for f in files)
        limit = min(self.limit, total + self._free())
        if total + n_bytes <= limit:
            return total
        wanted = min(int(limit * _FILL), limit - n_bytes)
        is_open, now = _open_files(), time.time()
        for file in sorted(files, key=lambda f: f.used):
            if total <= wanted:
                break
            if file.path in is_open or now - file.used < _KEEP_SECONDS:
                continue
            with contextlib.suppress(OSError):  # another user's
                Path(file.path).unlink(missing_ok=True)
                total -= file.n_bytes
        return total


def _scan(folder: Path) -> list[_File]:
    """Return the fetched shard files; remove what downloads that died have left."""
    found = []
    for parent, _, names in os.walk(folder):
        if "c" not in Path(parent).relative_to(folder).parts:
            continue  # small files stay: without them a mirror cannot be opened
        for name in names:
            path = Path(parent, name)
            with contextlib.suppress(OSError):
                if name.startswith(TMP_PREFIX) and is_abandoned(path):
                    path.unlink()
                    continue
                status = path.stat()
                found.append(_File(status.st_mtime, status.st_size, str(path)))
    return found


def _open_files() -> set[str]:
    """Return the files that this process has open, where the system tells."""
    opened = set()
    with contextlib.suppress(OSError):
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                opened.add(str(link.readlink()))
    return opened
