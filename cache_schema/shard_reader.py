"""Rows out of shard files: one `preadv` a run of rows; a chunk is checked when it is first touched."""

import contextlib
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.array_file import index_pieces
from molkd.cache_schema.commit import FileRecord, rewrite_remedy
from molkd.cache_schema.crc import crc32c, crc_hex
from molkd.cache_schema.errors import CacheError, IntegrityError
from molkd.cache_schema.files import inside
from molkd.cache_schema.layout import ArrayLayout, record_path
from molkd.cache_schema.mirror import damage_remedy
from molkd.cache_schema.runs import Runs
from molkd.cache_schema.state import GroupState
from molkd.cache_schema.untrusted import is_hollow, open_regular

_OPEN_FILES = 256
_PIECE_BYTES = 1 << 22  # of a chunk in memory at a time
_MAX_BUFFERS = 512  # per preadv; the system's limit is 1,024 or more


class _File:
    """An open file that closes when the last reader lets go of it, so that threads may share it."""

    def __init__(self, path: Path) -> None:
        self.fd = open_regular(path)
        # Else the kernel reads megabytes around each system; what is wanted ahead is announced.
        with contextlib.suppress(OSError):
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class ArrayReader:
    """Reads rows of one array of one group."""

    def __init__(self, root: Path, state: GroupState, name: str, files: "FileCache") -> None:
        self.layout: ArrayLayout = state.group.layouts[name]
        self._root, self._state, self._name, self._files = root, state, name, files
        self._checked: dict[int, bytearray] = {}  # shard -> which chunks had the right checksum
        self._paths: dict[int, str] = {}

    def read(self, runs: Runs) -> NDArray[Any]:
        """Return rows as stored.

        Raises
        ------
        CacheError
            If a shard is not committed.
        IntegrityError
            If bytes are not what was committed.
        """
        layout = self.layout
        for shard in {run.shard for run in runs.runs}:
            self._open(shard)  # what is not there, or no file, is known before memory is taken for it
        out = self._room(runs.n_rows)
        if not len(out):
            return out
        target, row_bytes, chunk_rows = (
            out.reshape(-1).view(np.uint8).data,
            layout.row_bytes,
            layout.chunk_rows,
        )
        shard = -1
        for run in runs.runs:
            if run.shard != shard:
                shard = run.shard
                file, checked = self._open(shard), self._checked[shard]
            first, last = run.row // chunk_rows, -(-(run.row + run.n_rows) // chunk_rows)
            if checked.find(0, first, last) >= 0:
                self._check_chunks(file, shard, first, last)
            buffers = [target[begin * row_bytes : end * row_bytes] for begin, end in run.places]
            self._pread(file, shard, buffers, run.row * row_bytes, run.n_rows * row_bytes)
        return out

    def files(self, runs: Runs) -> Iterator[tuple[Path, str]]:
        """Yield the files, root and path in it, that rows are read from; some more than once."""
        for shard in {run.shard for run in runs.runs}:
            yield self._root, self.layout.file(shard)

    def _room(self, n_rows: int) -> NDArray[Any]:
        layout = self.layout
        try:
            return np.empty((n_rows, *layout.spec.shape), dtype=layout.dtype)
        except MemoryError as error:
            raise CacheError(
                f"{self._root}: {n_rows} rows of {layout.path} take {n_rows * layout.row_bytes:,} bytes of "
                "memory, which are not there; read fewer systems at a time"
            ) from error

    def announce(self, runs: Runs) -> None:
        """Tell the system which rows will be read soon, so that it fetches them meanwhile."""
        for run in runs.runs:
            if run.shard not in self._state.files:
                continue
            layout = self.layout
            first = run.row // layout.chunk_rows * layout.chunk_bytes  # checksums are those of whole chunks
            last = -(-(run.row + run.n_rows) // layout.chunk_rows) * layout.chunk_bytes
            with contextlib.suppress(OSError):  # a hint; not every file system takes it
                os.posix_fadvise(self._open(run.shard).fd, first, last - first, os.POSIX_FADV_WILLNEED)

    def _pread(
        self, file: _File, shard: int, buffers: Sequence[memoryview], offset: int, wanted: int
    ) -> None:
        if len(buffers) <= _MAX_BUFFERS and os.preadv(file.fd, buffers, offset) == wanted:
            return
        # Rare: more pieces, or more bytes, than the system moves at once.
        for buffer in buffers:
            done = 0
            while done < len(buffer):
                got = os.preadv(file.fd, [buffer[done:]], offset + done)
                if not got:
                    raise self._damaged(shard, f"ends at byte {offset + done}")
                done += got
            offset += done

    def _record(self, shard: int) -> FileRecord:
        try:
            return self._state.files[shard][self._name]
        except KeyError:
            raise CacheError(
                f"{self._root}: shard {shard} of {self._state.group.name} is not written yet; "
                "run the command that writes it again, it continues where it stopped"
            ) from None

    def _open(self, shard: int) -> _File:
        relative = self._paths.get(shard)
        if relative is None:
            relative = self._paths[shard] = self.layout.file(shard)
        try:
            file, is_new = self._files.get(self._root, relative)
        except FileNotFoundError:
            self._record(shard)
            raise self._damaged(shard, "is missing") from None
        if is_new or shard not in self._checked:
            record = self._record(shard)
            size = os.fstat(file.fd).st_size
            if size != record.n_bytes:
                raise self._damaged(shard, f"has {size} bytes, expected {record.n_bytes}")
            if is_hollow(file.fd):
                raise self._damaged(shard, "is hollow: it has a size, but was never written")
            if shard not in self._checked:
                self._check_index(file, shard, record)
                self._checked[shard] = bytearray(record.n_chunks)
        return file

    def _check_index(self, file: _File, shard: int, record: FileRecord) -> None:
        offset, crc, is_ours, raw = record.n_bytes - self.layout.index_bytes, 0, True, b""
        for piece in index_pieces(self.layout, record.rows):
            crc = crc32c(raw, crc)
            raw = os.pread(file.fd, len(piece), offset)
            is_ours &= raw == piece
            offset += len(piece)
        if is_ours:
            return
        if struct.pack("<I", crc) != raw:
            raise self._damaged(shard, "has a damaged index")
        raise self._damaged(shard, "was rewritten by another program (its chunks are not in order)")

    def _check_chunks(self, file: _File, shard: int, first: int, last: int) -> None:
        size, checked, record = self.layout.chunk_bytes, self._checked[shard], self._record(shard)
        buffer = np.empty(min(size, _PIECE_BYTES), dtype=np.uint8)
        for chunk in range(first, last):
            if checked[chunk]:
                continue
            crc = 0
            for begin in range(0, size, _PIECE_BYTES):
                piece = buffer[: size - begin]
                self._pread(file, shard, [piece.data], chunk * size + begin, len(piece))
                crc = crc32c(piece, crc)
            if crc_hex(crc) != record.chunk_crc32c(chunk):
                raise self._damaged(shard, f"is damaged in chunk {chunk}")
            checked[chunk] = 1

    def _damaged(self, shard: int, what: str) -> IntegrityError:
        group, file = self._state.group.name, self.layout.file(shard)
        remedy = damage_remedy(self._root, file) or rewrite_remedy(group, shard)
        return IntegrityError(
            f"{self._root / file}: shard {shard} of array {self.layout.path} {what} "
            f"(record {record_path(group, shard)}); {remedy}"
        )


class FileCache:
    """The files used last stay open."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, _File] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, root: Path, relative: str) -> tuple[_File, bool]:
        """Return the open file, and whether it was opened just now."""
        with self._lock:
            file = self._files.get(relative)
            if file is not None:
                self._files.move_to_end(relative)
                return file, False
            file = self._files[relative] = _File(inside(root, relative))
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
            return file, True

    def clear(self) -> None:
        """Close all files that no reader is using."""
        with self._lock:
            self._files.clear()
