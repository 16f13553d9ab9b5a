"""A compressed Zarr v3 archive that any Zarr client opens: plain arrays, rows without gaps."""

import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BloscCname, BloscCodec, BloscShuffle, GzipCodec, ZstdCodec

from molkd.cache_schema.groups import ATOMS
from molkd.cache_schema.plan import SYSTEM_ARRAYS
from molkd.cache_schema.signal import attributes, codebook_dimensions
from molkd.cache_schema.zarr_json import inner_dimensions, teacher_attributes
from molkd.pipeline.errors import ConfigError
from molkd.pipeline.sharing.choice import ABOUT, Choice

_CHUNK_BYTES = 16 << 20
_MAX_CHUNK_ROWS = 65_536
_ABOUT = (
    "An archive of a store of molkd: systems holds a row a system; atoms and signals on atoms hold the rows "
    "of the systems one after the other, those of system i from atom_ptr[i] on; signals are stored as in the "
    "store, the attribute formula says how values follow."
)


def parse_compressor(text: str) -> tuple[BytesBytesCodec, ...]:
    """Return the codecs that a text names.

    Raises
    ------
    ConfigError
        If it is none of blosc[:CNAME[:LEVEL]], zstd[:LEVEL], gzip[:LEVEL] and none.
    """
    name, *details = text.split(":")
    try:
        if name == "none" and not details:
            return ()
        if name == "zstd" and len(details) <= 1:
            return (ZstdCodec(level=int(details[0]) if details else 5),)
        if name == "gzip" and len(details) <= 1:
            return (GzipCodec(level=int(details[0]) if details else 5),)
        if name == "blosc" and len(details) <= 2:
            cname = BloscCname(details[0] if details else "zstd")
            level = int(details[1]) if len(details) > 1 else 5
            return (BloscCodec(cname=cname, clevel=level, shuffle=BloscShuffle.bitshuffle),)
    except ValueError:
        pass
    cnames = ", ".join(one.value for one in BloscCname)
    raise ConfigError(
        f"--compressor {text}: choose blosc:zstd:5 (or {cnames}; level 0 to 9), zstd:5, gzip:5 or none"
    )


def write_folder(
    folder: Path,
    choice: Choice,
    codecs: tuple[BytesBytesCodec, ...],
    on_systems: Callable[[int], object],
) -> None:
    """Write the archive into an empty folder."""
    cache = choice.cache
    root = zarr.create_group(
        folder, attributes={"about": _ABOUT, "dataset": cache.dataset, "fingerprint": cache.fingerprint}
    )
    systems = root.create_group("systems", attributes={"source_names": list(cache.source_names)})
    for name, column in choice.systems.items():
        dimensions = SYSTEM_ARRAYS[name][2] if name in SYSTEM_ARRAYS else ["bound"]  # of atom_ptr
        _create(systems, name, column.shape, column.dtype, codecs, dimensions)[...] = column
    for group in (ATOMS, *choice.groups):
        names = choice.names(group, decode=False)
        arrays = {name: _Rows(_array(root, choice, group, name, codecs)) for name in names}
        for part in choice.pieces(group):
            for name, rows in choice.read(group, part, decode=False).items():
                arrays[name].append(rows)
            on_systems(len(part))
        for array in arrays.values():
            array.write()
    for group in choice.groups:
        _, teacher, _ = group.split("/", 2)
        root[f"teachers/{teacher}"].attrs.update(
            teacher_attributes(teacher, cache.teachers[teacher].provenance)
        )
        signal = choice.signal(group)
        root[group].attrs.update(attributes(signal))
        for name, values in (signal.codebook.arrays() if signal.codebook is not None else {}).items():
            dimensions = codebook_dimensions(signal.encoding, name)
            _create(root[group], name, values.shape, values.dtype, codecs, dimensions)[...] = values


class _Rows:
    """Rows of an array on their way: written in whole chunks, so that each is compressed once."""

    def __init__(self, array: Any) -> None:
        self._array, self._rows, self._n_written = array, list[NDArray[Any]](), 0

    def append(self, rows: NDArray[Any]) -> None:
        self._rows.append(rows)
        n_rows = sum(map(len, self._rows))
        self._write(n_rows - n_rows % self._array.chunks[0])

    def write(self) -> None:
        """Write what is left."""
        self._write(sum(map(len, self._rows)))

    def _write(self, n_rows: int) -> None:
        if n_rows:
            rows = np.concatenate(self._rows)
            self._array[self._n_written : self._n_written + n_rows] = rows[:n_rows]
            self._rows, self._n_written = [rows[n_rows:]], self._n_written + n_rows


def _array(
    root: zarr.Group, choice: Choice, group: str, name: str, codecs: tuple[BytesBytesCodec, ...]
) -> Any:
    layout = choice.cache.state(group).group.layouts[name]
    shape = (choice.n_rows(group, name), *layout.spec.shape)
    dimensions = [layout.spec.axis, *inner_dimensions(layout)]
    return _create(root.require_group(group), name, shape, layout.dtype, codecs, dimensions)


def _create(
    group: Any,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    codecs: tuple[BytesBytesCodec, ...],
    dimension_names: list[str],
) -> Any:
    row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
    n_rows = max(1, min(shape[0], _MAX_CHUNK_ROWS, _CHUNK_BYTES // row_bytes))
    return group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=(n_rows, *shape[1:]),
        compressors=codecs or None,
        dimension_names=dimension_names,
        attributes={"about": ABOUT[name]} if name in ABOUT else {},
    )


def pack(folder: Path, file: BinaryIO, form: str) -> None:
    """Put the files of an archive into one, "zip" or "tar"."""
    members = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    if form == "zip":
        with zipfile.ZipFile(file, "w") as packed:
            for path in members:
                packed.write(path, path.relative_to(folder).as_posix())
    else:
        with tarfile.open(fileobj=file, mode="w") as packed_tar:
            for path in members:
                packed_tar.add(path, path.relative_to(folder).as_posix(), recursive=False)
