"""Files of a server: fetched whole and checked before they count; sent whole, with their checksum beside."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from molkd.cache_schema.crc import crc32c, crc_hex
from molkd.cache_schema.errors import IntegrityError
from molkd.cache_schema.files import make_folder, open_temporary, write_error
from molkd.cache_schema.server import BUCKETS, Server

AT_ONCE = 8  # requests under way
_ATTEMPTS = 2
_PIECE_BYTES = 1 << 20
_PUT_BYTES = 8 << 20  # of one part of a large object
_MAX_PARTS = 9_000  # S3 takes 10,000
_CRC = "molkd-crc32c"  # what an object's metadata say about its bytes


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


class Remote(Server):
    """The files below a URL, read and written whole."""

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

        with self.asking(relative):
            try:
                answer = obstore.get(self.store, relative)
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
                    if not difference:
                        temporary.replace(target)  # no fsync: what a crash spoils is fetched anew
                        return n_bytes
                finally:
                    temporary.unlink(missing_ok=True)
            except OSError as error:
                raise write_error(target, error, expected.n_bytes or 0) from error
        raise IntegrityError(
            f"{self.at(relative)}: {difference} (fetched {_ATTEMPTS} times); the copy on the server is "
            "damaged or was replaced: ask for it to be published again, or use another copy"
        )

    def _copy(self, relative: str, handle: BinaryIO, expected: Expected) -> tuple[int, str]:
        """Write a file's bytes, no more than are expected; return how many, and what is wrong with them."""
        import obstore

        with self.asking(relative):
            try:
                answer = obstore.get(self.store, relative)
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
            with self.asking(relative):
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

    def sizes(self, relatives: Iterable[str]) -> dict[str, int | None]:
        """Return the bytes of files; None for one that is not there.

        Raises
        ------
        CacheError
            If the server cannot be asked.
        """
        names = list(relatives)
        if self.scheme in BUCKETS:
            folders = {str(PurePosixPath(name).parent) for name in names}
            there = dict(self.files(os.path.commonpath(folders))) if names else {}
            return {name: there.get(name) for name in names}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return dict(zip(names, pool.map(self._size, names), strict=True))

    def files(self, folder: str = "") -> Iterator[tuple[str, int]]:
        """Yield path and bytes of every file in a folder of a bucket and below."""
        import obstore

        with self.asking(folder):
            for batch in obstore.list(self.store, prefix=folder or None):
                yield from ((entry["path"], int(entry["size"])) for entry in batch)

    def entries(self, folder: str = "") -> tuple[list[str], list[str]]:
        """Return the folders and the files that lie directly in a folder of a bucket."""
        import obstore

        with self.asking(folder):
            found = obstore.list_with_delimiter(self.store, prefix=folder or None)
            return list(found["common_prefixes"]), [entry["path"] for entry in found["objects"]]

    def _size(self, relative: str) -> int | None:
        import obstore

        with self.asking(relative):
            try:
                return int(obstore.head(self.store, relative)["size"])
            except FileNotFoundError:
                return None

    def holds(self, relative: str, n_bytes: int, crc: str) -> bool:
        """Say whether a file was sent before: with this size, and this crc32c in its metadata."""
        import obstore

        with self.asking(relative):
            try:
                found = obstore.get(self.store, relative, options={"head": True})
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
        with self.asking(relative):
            try:
                obstore.put(
                    self.store,
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
