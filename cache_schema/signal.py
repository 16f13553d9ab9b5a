"""A teacher's signal as a store declares it, with the codebook that lies beside the codes."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema import zarr_json
from molkd.cache_schema.checks import is_hex
from molkd.cache_schema.codebook import MAX_PCA_CHANNELS, Codebook, decode_rows, make_codebook
from molkd.cache_schema.encoding import ENCODINGS, decode, is_fitted
from molkd.cache_schema.errors import IntegrityError
from molkd.cache_schema.fields import FieldSpec
from molkd.cache_schema.files import inside
from molkd.cache_schema.layout import DATA, SCALE
from molkd.cache_schema.untrusted import read_small

_COPY = "restore the file from a copy of the store"
_DIMENSIONS = {"step": ["code"], "bits": ["code"], "mean": ["channel"], "basis": ["code", "channel"]}
_TYPES = {"step": "float32", "bits": "uint8", "mean": "float32", "basis": "float32"}


@dataclass(frozen=True, eq=False)
class Signal:
    """What a signal's values mean and how they are stored.

    Attributes
    ----------
    codebook : of a fitted encoding
    recoded_from : the encodings that the values went through before this one, the first one first, each with
        `encoding` and, where it was measured, `error_rms`; errors of records are against the last of them
    """

    spec: FieldSpec
    encoding: str
    codebook: Codebook | None = None
    recoded_from: tuple[dict[str, Any], ...] = ()

    @property
    def formula(self) -> str:
        """How values follow from what is stored."""
        return ENCODINGS[self.encoding].formula if self.codebook is None else self.codebook.formula

    def decode(self, stored: Mapping[str, Any]) -> NDArray[Any]:
        """Return the values of stored rows; no copy where they are the same."""
        if self.codebook is None:
            return decode(stored["values"], self.spec)
        values: NDArray[Any] = decode_rows(stored["values"], stored[SCALE], self.codebook)
        return values

    def same_as(self, spec: FieldSpec, encoding: str) -> bool:
        """Say whether the signal is stored as asked; a codebook that is there is taken as it is."""
        return (self.spec, self.encoding) == (spec, encoding)


def attributes(signal: Signal) -> dict[str, Any]:
    """Return the attributes of a signal's group; they vouch for the codebook's files."""
    entry = zarr_json.signal_entry(signal.spec, signal.encoding, signal.formula)
    if signal.codebook is not None:
        entry["codebook"] = {
            "systems": signal.codebook.n_systems,
            "arrays": {
                name: {"shape": list(array.shape), "sha256": hashlib.sha256(_raw(array)).hexdigest()}
                for name, array in signal.codebook.arrays().items()
            },
        }
    if signal.recoded_from:
        entry["recoded_from"] = list(signal.recoded_from)
    return zarr_json.signal_attributes(entry)


def codebook_dimensions(encoding: str, name: str) -> list[str]:
    """Return names for the axes of a codebook's array; int8 has one code a channel."""
    return ["channel"] if encoding == "int8" else _DIMENSIONS[name]


def codebook_files(group: str, codebook: Codebook) -> dict[str, bytes]:
    """Return the files of a codebook by their paths in data.zarr: two for each array."""
    files = {}
    for name, array in codebook.arrays().items():
        dimensions = codebook_dimensions(codebook.encoding, name)
        document = zarr_json.plain_document(array.shape, str(array.dtype), dimensions, "1")
        files[f"{group}/{name}/zarr.json"] = zarr_json.dump(document)
        files[_chunk(f"{group}/{name}", array.ndim)] = _raw(array)
    return files


def codebook_of(group: str, entry: dict[str, Any]) -> tuple[dict[str, bytes], dict[str, str]]:
    """Return what a signal's attributes say of its codebook's files: every zarr.json, and sha256 of the rest.

    Paths are those in data.zarr. What makes no sense is left out, `read_signal` complains about it.
    """
    book = entry.get("codebook")
    tables = book.get("arrays") if isinstance(book, dict) else None
    documents, digests = {}, {}
    for name, table in tables.items() if isinstance(tables, dict) else ():
        shape = table.get("shape") if isinstance(table, dict) else None
        if name in _TYPES and isinstance(shape, list) and len(shape) == len(_DIMENSIONS[name]):
            dimensions = codebook_dimensions(str(entry.get("encoding")), name)
            document = zarr_json.plain_document(tuple(shape), _TYPES[name], dimensions, "1")
            documents[f"{group}/{name}/zarr.json"] = zarr_json.dump(document)
            digests[_chunk(f"{group}/{name}", len(shape))] = str(table.get("sha256"))
    return documents, digests


def _chunk(path: str, n_axes: int) -> str:
    return f"{path}/c/{'/'.join(['0'] * n_axes)}"


def read_signal(
    root: Path, group: str, document: dict[str, Any], where: str, read: Callable[[str], tuple[Any, str]]
) -> Signal:
    """Return the signal that a group's zarr.json describes.

    Parameters
    ----------
    read : gives a parsed zarr.json of data.zarr and where it lies, and takes note of its checksum

    Raises
    ------
    CacheError
        If the encoding is unknown.
    IntegrityError
        If an entry is missing or of the wrong kind, or the codebook is damaged.
    """
    spec, encoding, entry = zarr_json.read_signal(document, where)
    before = entry.get("recoded_from", [])
    if not isinstance(before, list) or not all(isinstance(one, dict) for one in before):
        raise IntegrityError(f"{where}: damaged list of earlier encodings; {_COPY}")
    recoded_from = tuple(before)
    if not is_fitted(encoding):
        return Signal(spec, encoding, None, recoded_from)
    book = entry.get("codebook")
    tables = book.get("arrays") if isinstance(book, dict) else None
    n_systems = book.get("systems") if isinstance(book, dict) else None
    if not isinstance(tables, dict) or not set(tables) <= set(_TYPES) or type(n_systems) is not int:
        raise IntegrityError(f"{where}: damaged description of the encoding {encoding}; {_COPY}")
    n_channels = spec.shape[-1]  # there are no more codes than channels
    arrays = {
        name: _read_array(root, f"{group}/{name}", name, table, n_channels, where, read)
        for name, table in tables.items()
    }
    return Signal(spec, encoding, make_codebook(encoding, arrays, n_systems, spec, where), recoded_from)


def _read_array(
    root: Path,
    path: str,
    name: str,
    table: object,
    n_channels: int,
    where: str,
    read: Callable[[str], tuple[Any, str]],
) -> NDArray[Any]:
    shape = table.get("shape") if isinstance(table, dict) else None
    digest = table.get("sha256") if isinstance(table, dict) else None
    dimensions = _DIMENSIONS[name]
    most = n_channels if len(dimensions) == 1 else min(n_channels, MAX_PCA_CHANNELS)
    if (
        not isinstance(shape, list)
        or len(shape) != len(dimensions)
        or not all(type(n) is int and 0 < n <= most for n in shape)
        or not is_hex(digest, 64)
    ):
        raise IntegrityError(f"{where}: damaged description of {name}; {_COPY}")
    document, described = read(f"{path}/zarr.json")
    wanted = zarr_json.plain_document(tuple(shape), _TYPES[name], dimensions, "1")
    if zarr_json.geometry(document) != zarr_json.geometry(wanted):
        raise IntegrityError(f"{described}: differs from {where}; {_COPY}")
    file = inside(root, f"{DATA}/{_chunk(path, len(shape))}")
    dtype = np.dtype(_TYPES[name]).newbyteorder("<")
    n_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if not file.is_file() or file.stat().st_size != n_bytes:
        raise IntegrityError(f"{file}: missing, or not of {n_bytes} bytes; {_COPY}")
    raw = read_small(file, n_bytes, _COPY)
    if hashlib.sha256(raw).hexdigest() != digest:
        raise IntegrityError(f"{file}: damaged, its sha256 is not the recorded one; {_COPY}")
    return np.frombuffer(raw, dtype).reshape(shape).astype(_TYPES[name])


def _raw(array: NDArray[Any]) -> bytes:
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
