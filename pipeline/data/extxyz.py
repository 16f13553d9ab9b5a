"""Extended xyz, plain or compressed: frames are indexed once, then each is read alone."""

import bz2
import gzip
import io
import lzma
import shutil
import tempfile
import threading
import zlib
from array import array
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard
from ase import Atoms
from ase.io.extxyz import read_xyz

from molkd.pipeline.data.ase_source import ENERGY_KEYS, FORCES_KEYS, record_from_atoms
from molkd.pipeline.data.records import PARSER_ERRORS, Reader, Record
from molkd.pipeline.errors import DataError

_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
COMPRESSIONS = {*_OPENERS, ".zst"}
_COPY_BYTES = 1 << 20


class ExtxyzReader(Reader):
    """Random access to the frames of an extended xyz file."""

    energy_keys = ENERGY_KEYS
    forces_keys = FORCES_KEYS

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _decompress(path) if path.suffix.lower() in COMPRESSIONS else path.open("rb")
        self._lock = threading.Lock()
        try:
            self._offsets = _index_frames(self._file, path)
        except DataError:
            self._file.close()
            raise

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def record(self, index: int) -> Record:
        """Return the record at `index`."""
        begin, end = self._offsets[index], self._offsets[index + 1]
        try:
            with self._lock:  # one file position, perhaps several threads
                self._file.seek(begin)
                text = self._file.read(end - begin).decode()
            atoms = cast("Atoms", next(read_xyz(io.StringIO(text), index=0)))
            return record_from_atoms(atoms)
        except PARSER_ERRORS as error:
            raise DataError(
                f"{self.path}, system {index}: cannot be read as extended xyz ({error}). Correct this frame, "
                f"which starts at byte {begin}, or leave it out."
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _decompress(path: Path) -> BinaryIO:
    """Unpack into a temporary file without a name; the system removes it even after a crash."""
    suffix = path.suffix.lower()
    plain = cast("BinaryIO", tempfile.TemporaryFile())  # noqa: SIM115, the reader closes it
    try:
        if suffix == ".zst":
            _decompress_zst(path, plain)
        else:
            with _OPENERS[suffix](path) as packed:
                shutil.copyfileobj(packed, plain, _COPY_BYTES)
    except (EOFError, ValueError, zlib.error, lzma.LZMAError, zstandard.ZstdError, gzip.BadGzipFile) as error:
        plain.close()
        raise DataError(f"{path}: damaged or cut off compressed file ({error}). Copy it again.") from error
    except OSError as error:
        plain.close()
        raise DataError(
            f"{path}: cannot be unpacked to {tempfile.gettempdir()} ({error}). Check the file; if "
            "that disk is full, set TMPDIR to a folder with space."
        ) from error
    return plain


def _decompress_zst(path: Path, plain: BinaryIO) -> None:
    """Unpack all frames of a zstd file; the library's own file object is silent about one that is cut off."""
    with path.open("rb") as packed:
        unpacker = None
        while data := packed.read(_COPY_BYTES):
            while data:
                unpacker = unpacker or zstandard.ZstdDecompressor().decompressobj()
                plain.write(unpacker.decompress(data))
                data = unpacker.unused_data if unpacker.eof else b""
                unpacker = None if unpacker.eof else unpacker
    if unpacker is not None:
        raise EOFError("it ends inside a zstd frame")


def _index_frames(file: BinaryIO, path: Path) -> "array[int]":
    """Return the byte offset of every frame, and the end of the last one."""
    offsets = array("q")
    file.seek(0)
    position = 0
    while line := file.readline():
        if not line.strip():  # blank lines between and after frames
            position = file.tell()
            continue
        index = len(offsets)
        if line.lstrip().startswith(b"VEC") and offsets:  # old style: cell vectors behind the atoms
            position = file.tell()
            continue
        n_atoms = int(line) if line.strip().isdigit() else None
        if n_atoms is None:
            raise DataError(
                f"{path}, system {index}: expected a number of atoms at byte {position}, found "
                f"{line[:40]!r}. Correct the file: a frame is a count, a comment line and one line per atom."
            )
        n_lines = sum(1 for _ in islice(file, n_atoms + 1))
        if n_lines <= n_atoms:
            raise DataError(
                f"{path}, system {index}: the file ends after {max(n_lines - 1, 0)} of {n_atoms} atoms. "
                "It is cut off; copy or write it again."
            )
        offsets.append(position)
        position = file.tell()
    offsets.append(position)
    return offsets
