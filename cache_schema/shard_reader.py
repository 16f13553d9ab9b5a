"""Rows out of shard files: one `preadv` a run of rows; a chunk is checked when it is first touched."""

import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.commit import FileRecord, rewrite_remedy
from molkd.cache_schema.errors import CacheError, IntegrityError
from molkd.cache_schema.files import crc32c, crc_hex, inside
from molkd.cache_schema.layout import ArrayLayout, record_path
from molkd.cache_schema.shard_writer import shard_index
from molkd.cache_schema.state import GroupState

_OPEN_FILES = 256
_MAX_BUFFERS = 512  # per preadv; the system's limit is 1,024 or more


class _File:
    """An open file that closes when the last reader lets go of it, so that threads may share it."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class ArrayReader:
    """Reads rows of one array of one group."""

    def __init__(self, root: Path, state: GroupState, name: str, files: "FileCache") -> None:
        self.layout: ArrayLayout = state.group.layouts[name]
        self._root, self._state, self._name, self._files = root, state, name, files
        self._checked: dict[int, NDArray[np.bool_]] = {}  # shard -> which chunks had the right checksum

    def read(self, begin: NDArray[np.int64], count: NDArray[np.int64]) -> NDArray[Any]:
        """Return the rows [begin, begin + count) of every run, one run after the other, as stored.

        Parameters
        ----------
        begin, count : (R,) rows on the group's axis; a run lies in one shard

        Raises
        ------
        CacheError
            If a shard is not committed.
        IntegrityError
            If bytes are not what was committed.
        """
        layout = self.layout
        out = np.empty((int(count.sum()), *layout.spec.shape), dtype=layout.dtype)
        if not len(out):
            return out
        target = out.reshape(-1).view(np.uint8).data
        place = np.concatenate([[0], np.cumsum(count)]) * layout.row_bytes  # of each run in `out`
        order = np.argsort(begin, kind="stable")
        begin, count, place_end = begin[order], count[order], place[1:][order]
        place = place[:-1][order]
        shard = begin // layout.rows_per_file
        # Runs that follow one another in the file are fetched together, each to its own place.
        breaks = np.flatnonzero((begin[1:] != begin[:-1] + count[:-1]) | (shard[1:] != shard[:-1])) + 1
        edges = [0, *breaks.tolist(), len(begin)]
        for first, last in pairwise(edges):
            buffers = _merge(target, place[first:last].tolist(), place_end[first:last].tolist())
            n_rows = int(count[first:last].sum())
            self._fetch(int(shard[first]), int(begin[first]) % layout.rows_per_file, n_rows, buffers)
        return out

    def _fetch(self, shard: int, row: int, n_rows: int, buffers: list[memoryview]) -> None:
        record = self._record(shard)
        file = self._open(shard, record)
        self._check_chunks(file, shard, record, row, n_rows)
        offset = row * self.layout.row_bytes
        for first in range(0, len(buffers), _MAX_BUFFERS):
            offset += self._pread(file, shard, buffers[first : first + _MAX_BUFFERS], offset)

    def _pread(self, file: _File, shard: int, buffers: Sequence[memoryview], offset: int) -> int:
        wanted = sum(len(b) for b in buffers)
        got = os.preadv(file.fd, buffers, offset)
        if got != wanted:  # rare: a signal, or more than the system moves at once
            flat = bytearray()
            while len(flat) < wanted:
                part = os.pread(file.fd, wanted - len(flat), offset + len(flat))
                if not part:
                    raise self._damaged(shard, f"ends at byte {offset + len(flat)}")
                flat += part
            rest = memoryview(flat)
            for buffer in buffers:
                buffer[:] = rest[: len(buffer)]
                rest = rest[len(buffer) :]
        return wanted

    def _record(self, shard: int) -> FileRecord:
        try:
            return self._state.files[shard][self._name]
        except KeyError:
            raise CacheError(
                f"{self._root}: shard {shard} of {self._state.group.name} is not written yet; "
                "run the command that writes it again, it continues where it stopped"
            ) from None

    def _open(self, shard: int, record: FileRecord) -> _File:
        relative = self.layout.file(shard)
        try:
            file, is_new = self._files.get(self._root, relative)
        except FileNotFoundError:
            raise self._damaged(shard, "is missing") from None
        if is_new:
            size = os.fstat(file.fd).st_size
            if size != record.n_bytes:
                raise self._damaged(shard, f"has {size} bytes, expected {record.n_bytes}")
        if shard not in self._checked:
            self._check_index(file, shard, record)
            self._checked[shard] = np.zeros(len(record.chunk_crc32c), dtype=bool)
        return file

    def _check_index(self, file: _File, shard: int, record: FileRecord) -> None:
        layout = self.layout
        if not layout.is_sharded:
            return
        raw = os.pread(file.fd, layout.index_bytes, record.n_bytes - layout.index_bytes)
        if raw == shard_index(layout, record.rows):
            return
        if crc32c(raw[:-4]) != struct.unpack("<I", raw[-4:])[0]:
            raise self._damaged(shard, "has a damaged index")
        raise self._damaged(shard, "was rewritten by another program (its chunks are not in order)")

    def _check_chunks(self, file: _File, shard: int, record: FileRecord, row: int, n_rows: int) -> None:
        layout, checked = self.layout, self._checked[shard]
        first, last = row // layout.chunk_rows, -(-(row + n_rows) // layout.chunk_rows)
        if checked[first:last].all():
            return
        buffer = np.empty(layout.chunk_bytes, dtype=np.uint8)
        for chunk in np.flatnonzero(~checked[first:last]) + first:
            self._pread(file, shard, [buffer.data], int(chunk) * layout.chunk_bytes)
            if crc_hex(crc32c(buffer)) != record.chunk_crc32c[chunk]:
                raise self._damaged(shard, f"is damaged in chunk {chunk}")
            checked[chunk] = True

    def _damaged(self, shard: int, what: str) -> IntegrityError:
        group = self._state.group.name
        return IntegrityError(
            f"{self._root / self.layout.file(shard)}: shard {shard} of array {self.layout.path} {what} "
            f"(record {record_path(group, shard)}); {rewrite_remedy(group, shard)}"
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


def _merge(target: memoryview, begins: list[int], ends: list[int]) -> list[memoryview]:
    """Return the pieces of `target`, neighbours joined."""
    pieces = []
    begin, end = begins[0], ends[0]
    for next_begin, next_end in zip(begins[1:], ends[1:], strict=True):
        if next_begin == end:
            end = next_end
        else:
            pieces.append(target[begin:end])
            begin, end = next_begin, next_end
    pieces.append(target[begin:end])
    return pieces
