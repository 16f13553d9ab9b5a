"""The file of one array of one shard while it is written: rows, checksums, and the index that ends it."""

import contextlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.commit import FileRecord
from molkd.cache_schema.crc import crc32c, crc32c_joined, crc_hex
from molkd.cache_schema.files import make_folder, open_temporary, sweep
from molkd.cache_schema.layout import ArrayLayout

MISSING = 0xFFFF_FFFF_FFFF_FFFF  # offset and length of a chunk that is not stored
_BUFFER_BYTES = 1 << 20
_INDEX_ENTRIES = 1 << 16  # of an index in memory at a time


class ArrayFile:
    """A temporary file that grows while its checksums grow with it."""

    def __init__(self, layout: ArrayLayout, target: Path) -> None:
        self.layout = layout
        self.target = target
        make_folder(target.parent)
        sweep(target.parent)
        self.temporary, fd = open_temporary(target)
        self.handle = os.fdopen(fd, "wb", _BUFFER_BYTES)
        self.rows = 0
        self.size = 0
        self.chunk_crcs: list[int] = []
        self._filled = layout.chunk_bytes  # bytes in the chunk being written

    def append(self, rows: NDArray[Any]) -> None:
        """Write stored rows behind those before."""
        data = rows.reshape(-1).view(np.uint8)
        self._write(data)
        self.rows += len(rows)
        begin = 0
        while begin < len(data):
            if self._filled == self.layout.chunk_bytes:
                self.chunk_crcs.append(0)
                self._filled = 0
            end = min(len(data), begin + self.layout.chunk_bytes - self._filled)
            self.chunk_crcs[-1] = crc32c(data[begin:end], self.chunk_crcs[-1])
            self._filled += end - begin
            begin = end

    def finish(self) -> FileRecord:
        """Fill up the last chunk, add the index, make the file durable."""
        rows = self.rows
        n_fill = (-rows) % self.layout.chunk_rows
        fill = np.nan if self.layout.dtype.kind == "f" else 0
        self.append(np.full((n_fill, *self.layout.spec.shape), fill, dtype=self.layout.dtype))
        whole = 0  # each byte is gone over once: the file's checksum follows from those of its chunks
        for crc in self.chunk_crcs:
            whole = crc32c_joined(whole, crc, self.layout.chunk_bytes)
        for piece in index_pieces(self.layout, rows):
            self._write(np.frombuffer(piece, dtype=np.uint8))
            whole = crc32c(piece, whole)
        self.handle.flush()
        os.fsync(self.handle.fileno())
        packed = struct.pack(f">{len(self.chunk_crcs)}I", *self.chunk_crcs)
        return FileRecord(self.size, rows, crc_hex(whole), packed)

    def discard(self) -> None:
        """Remove the file."""
        with contextlib.suppress(OSError):  # a full disk also fails the last flush
            self.handle.close()
        with contextlib.suppress(OSError):
            self.temporary.unlink(missing_ok=True)

    def _write(self, data: NDArray[np.uint8]) -> None:
        self.handle.write(data.data)
        self.size += len(data)


def index_pieces(layout: ArrayLayout, n_rows: int) -> Iterator[bytes]:
    """Yield the index that ends a shard's file: stored chunks in order, the rest marked missing."""
    if not layout.is_sharded:
        return
    stored, crc = layout.stored_chunks(n_rows), 0
    for begin in range(0, layout.n_chunks, _INDEX_ENTRIES):
        chunks = np.arange(begin, min(begin + _INDEX_ENTRIES, layout.n_chunks), dtype=np.uint64)
        entries = np.full((len(chunks), 2), MISSING, dtype="<u8")
        n = min(max(stored - begin, 0), len(chunks))
        entries[:n, 0] = chunks[:n] * np.uint64(layout.chunk_bytes)
        entries[:n, 1] = layout.chunk_bytes
        raw = entries.tobytes()
        crc = crc32c(raw, crc)
        yield raw
    yield struct.pack("<I", crc)
