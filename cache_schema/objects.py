"""Remote files: what server a URL means; files fetched whole, checked before they count; files sent."""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from molkd.cache_schema.errors import CacheError, IntegrityError
from molkd.cache_schema.files import crc32c, crc_hex, fsync_folder, make_folder, open_temporary, write_error
from molkd.cache_schema.layout import SUFFIX

if TYPE_CHECKING:
    from obstore.store import ObjectStore

BUCKETS = ("s3", "gs", "az")
SCHEMES = (*BUCKETS, "http", "https")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")  # of the path of any file of a store
_ATTEMPTS = 2
_PIECE_BYTES = 1 << 20
_PUT_BYTES = 8 << 20  # of one part of a large object
_MAX_PARTS = 9_000  # S3 takes 10,000
_CRC = "molkd-crc32c"  # what an object's metadata say about its bytes
_SETTINGS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL, or "
    "AWS_SKIP_SIGNATURE=true for a public bucket",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_KEY",
}


def is_url(text: str | Path) -> bool:
    """Say whether a text means a place on a server; a Path never does."""
    return isinstance(text, str) and _URL.match(text) is not None


@dataclass(frozen=True)
class Expected:
    """What a file to be fetched must be."""

    max_bytes: int
    n_bytes: int | None = None  # exactly, where that is known
    crc32c: str = ""
    sha256: str = ""

    def difference(self, n_bytes: int, crc: int, sha256: str) -> str:
        """Say in words how a file differs; empty if it does not."""
        if self.n_bytes is not None and n_bytes != self.n_bytes:
            return f"has {n_bytes:,} bytes, expected {self.n_bytes:,}"
        if n_bytes > self.max_bytes:
            return f"has {n_bytes:,} bytes, at most {self.max_bytes:,} expected"
        if self.crc32c and crc_hex(crc) != self.crc32c:
            return f"has crc32c {crc_hex(crc)}, expected {self.crc32c}"
        if self.sha256 and sha256 != self.sha256:
            return f"has sha256 {sha256[:16]}..., expected {self.sha256[:16]}..."
        return ""


class Remote:
    """The files below a URL.

    Attributes
    ----------
    url : without the slash at its end
    scheme : one of SCHEMES
    host : bucket, container or host
    name : last part of the URL, fit for a folder
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in SCHEMES:
            raise CacheError(f"{url}: no such kind of place; stores are read from {', '.join(SCHEMES)}")
        if parts.query or parts.fragment or "@" in parts.netloc or not parts.netloc:
            raise CacheError(
                f"{parts.scheme}://{parts.hostname or ''}{parts.path}: give scheme, host and path only, "
                f"{parts.scheme}://.../NAME{SUFFIX}; "
                "credentials come from the environment"
            )
        self.url, self.scheme, self.host = url.rstrip("/"), parts.scheme, parts.netloc
        last = unquote(parts.path).rstrip("/").rsplit("/", 1)[-1]
        self.name = re.sub(r"[^A-Za-z0-9_.-]", "_", last).lstrip(".") or f"store{SUFFIX}"
        self._store = _connect(self.url, self.scheme)
        self._pid = os.getpid()

    def at(self, relative: str) -> str:
        """Return the URL of a file."""
        return f"{self.url}/{relative}"

    def read(self, relative: str, max_bytes: int) -> bytes | None:
        """Return a small file; None if there is none.

        Raises
        ------
        CacheError
            If the server cannot be asked.
        IntegrityError
            If the file is larger.
        """
        import obstore

        with self._asking(relative):
            try:
                answer = obstore.get(self._store, relative)
            except FileNotFoundError:
                return None
            raw, n_bytes = bytearray(), int(answer.meta["size"])
            stream = answer.stream(min_chunk_size=_PIECE_BYTES)
            while n_bytes <= max_bytes and (piece := next(stream, None)) is not None:
                raw += bytes(piece)
                n_bytes = max(n_bytes, len(raw))
        if n_bytes > max_bytes:
            raise IntegrityError(f"{self.at(relative)}: {n_bytes:,} bytes, at most {max_bytes:,} expected")
        return bytes(raw)

    def fetch(self, relative: str, target: Path, expected: Expected) -> int:
        """Bring a file to `target`, which holds all of it or is not there; return its bytes.

        Raises
        ------
        CacheError
            If the server has no such file or cannot be asked, or the disk is full.
        IntegrityError
            If the file is not what is expected, also when it is fetched once more.
        """
        difference = ""
        for _ in range(_ATTEMPTS):
            try:
                make_folder(target.parent)
                temporary, fd = open_temporary(target)
                try:
                    with os.fdopen(fd, "wb") as handle:
                        n_bytes, difference = self._copy(relative, handle, expected)
                        handle.flush()
                        os.fsync(handle.fileno())
                    if not difference:
                        temporary.replace(target)
                        fsync_folder(target.parent)
                        return n_bytes
                finally:
                    temporary.unlink(missing_ok=True)
            except OSError as error:
                raise write_error(target, error, expected.n_bytes or 0) from error
        raise IntegrityError(
            f"{self.at(relative)}: {difference} (fetched {_ATTEMPTS} times); the copy on the server is "
            "damaged or was replaced: ask for it to be published again, or use another copy"
        )

    def _copy(self, relative: str, handle: Any, expected: Expected) -> tuple[int, str]:
        """Write a file's bytes, no more than are expected; return how many, and what is wrong with them."""
        import obstore

        with self._asking(relative):
            try:
                answer = obstore.get(self._store, relative)
            except FileNotFoundError:
                raise IntegrityError(
                    f"{self.at(relative)}: missing, but the store's manifest names it; "
                    "ask for the store to be published again, or use another copy"
                ) from None
            n_bytes = int(answer.meta["size"])
            limit = expected.max_bytes if expected.n_bytes is None else expected.n_bytes
            if n_bytes > limit or (expected.n_bytes is not None and n_bytes != expected.n_bytes):
                return n_bytes, expected.difference(n_bytes, 0, "")
            stream = answer.stream(min_chunk_size=_PIECE_BYTES)
        n_bytes, crc, sha256 = 0, 0, hashlib.sha256()
        while True:
            with self._asking(relative):
                piece = next(stream, None)
            if piece is None:
                break
            data = bytes(piece)
            n_bytes += len(data)
            if n_bytes > limit:
                break
            crc = crc32c(data, crc)
            if expected.sha256:
                sha256.update(data)
            handle.write(data)
        return n_bytes, expected.difference(n_bytes, crc, sha256.hexdigest())

    def size(self, relative: str) -> int | None:
        """Return the bytes of a file; None if there is none.

        Raises
        ------
        CacheError
            If the server cannot be asked.
        """
        import obstore

        with self._asking(relative):
            try:
                return int(obstore.head(self._store, relative)["size"])
            except FileNotFoundError:
                return None

    def holds(self, relative: str, n_bytes: int, crc: str) -> bool:
        """Say whether a file was sent before: with this size, and this crc32c in its metadata."""
        import obstore

        with self._asking(relative):
            try:
                found = obstore.get(self._store, relative, options={"head": True})
            except FileNotFoundError:
                return False
            return int(found.meta["size"]) == n_bytes and found.attributes.get(_CRC) == crc

    def send(self, relative: str, data: Path | bytes, crc: str, *, replace: bool = True) -> bool:
        """Make a file of the server, which appears whole or not at all.

        Parameters
        ----------
        crc : of the bytes; kept in the object's metadata, for `holds`

        Returns
        -------
        bool
            False if `replace` is false and there was one; it is left as it was.

        Raises
        ------
        CacheError
            If the server refuses.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError

        n_bytes = len(data) if isinstance(data, bytes) else data.stat().st_size
        with self._asking(relative):
            try:
                obstore.put(
                    self._store,
                    relative,
                    data,
                    attributes={_CRC: crc},
                    mode="overwrite" if replace else "create",
                    use_multipart=n_bytes > _PUT_BYTES and replace,
                    chunk_size=max(_PUT_BYTES, -(-n_bytes // _MAX_PARTS)),
                    max_concurrency=4,
                )
            except AlreadyExistsError:
                return False
        return True

    @contextmanager
    def _asking(self, relative: str) -> Iterator[None]:
        """Turn the library's errors into one line."""
        from obstore.exceptions import BaseError

        if os.getpid() != self._pid:
            raise CacheError(
                f"{self.at(relative)}: cannot be reached from a forked process; start workers with spawn, or "
                "copy the store to a local folder first (kd cache copy)"
            )
        try:
            yield
        except (BaseError, OSError) as error:
            reason = str(error).partition("\n")[0]
            how = _SETTINGS.get(self.scheme)
            remedy = f" and the environment ({how})" if how else ""
            raise CacheError(
                f"{self.at(relative)}: {reason}; check the URL, the network{remedy}, then run the same "
                "command again, what was done is kept"
            ) from error


def check_relative(relative: str, where: str) -> str:
    """Return the path of a file in a store if it is one that a store may have.

    Raises
    ------
    IntegrityError
        Naming where it was read.
    """
    if not all(_PART.fullmatch(part) for part in relative.split("/")):
        raise IntegrityError(f"{where}: names the file {relative!r}, which leads out of the store")
    return relative


def _connect(url: str, scheme: str) -> "ObjectStore":
    try:
        from obstore.exceptions import BaseError
        from obstore.store import HTTPStore, from_url
    except ImportError as error:
        raise CacheError(f"{url}: needs the extra s3; install it with pip install 'molkd[s3]'") from error

    endpoints = (value for name, value in os.environ.items() if name.startswith("AWS_ENDPOINT"))
    plain = scheme == "http" or any(e.startswith("http://") for e in endpoints)
    client: Any = {
        "allow_http": plain,
        "connect_timeout": timedelta(seconds=20),
        "read_timeout": timedelta(seconds=60),
        "timeout": timedelta(hours=6),  # of a whole file; what stalls ends with the read timeout
    }
    retry: Any = {"max_retries": 4, "retry_timeout": timedelta(seconds=60)}
    try:
        if scheme in BUCKETS:
            return from_url(url, client_options=client, retry_config=retry)
        return HTTPStore.from_url(url, client_options=client, retry_config=retry)
    except (BaseError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise CacheError(f"{url}: {reason}; check the URL") from error
