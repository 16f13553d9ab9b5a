"""ASE-LMDB files (.aselmdb) of fairchem's data sets and of ase-db-backends: zlib-compressed JSON rows."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molkd.pipeline.data.ase_source import ENERGY_KEYS, FORCES_KEYS
from molkd.pipeline.data.lmdb_file import LmdbFile
from molkd.pipeline.data.records import (
    PARSER_ERRORS,
    Reader,
    Record,
    number_candidates,
    vector_candidates,
    words,
)
from molkd.pipeline.errors import DataError

_NOT_LABELS = {"id", "ctime", "mtime", "positions", "numbers", "cell", "pbc", "tags"}


class AseLmdbReader(Reader):
    """One .aselmdb file with rows under the keys "1", "2", ..."""

    energy_keys = ENERGY_KEYS
    forces_keys = FORCES_KEYS

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = LmdbFile(path)
        try:
            next_id = self._json(b"nextid")
            deleted = set(self._json(b"deleted_ids") or ())
            if not isinstance(next_id, int):
                raise DataError(f"{path}, key nextid: missing or no number. Copy the file again.")
            self._ids = [row_id for row_id in range(1, next_id) if row_id not in deleted]
        except DataError:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._ids)

    def record(self, index: int) -> Record:
        """Return the record at `index`."""
        key = b"%d" % self._ids[index]
        row = self._json(key)
        try:
            return _record_from_row(row)
        except PARSER_ERRORS as error:
            raise DataError(
                f"{self.path}, key {key.decode()} (system {index}): not a row of an ASE database "
                f"({type(error).__name__}: {error}). Copy the file again."
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _json(self, key: bytes) -> Any:
        data = self._file.get(key)
        if data is None:
            return None
        try:
            return json.loads(zlib.decompress(data))
        except (zlib.error, ValueError) as error:
            raise DataError(
                f"{self.path}, key {key.decode()}: damaged row ({error}). Copy the file again."
            ) from error


def is_aselmdb(path: Path) -> bool:
    """Return whether the first value is zlib-compressed JSON rather than a pickle."""
    file = LmdbFile(path)
    try:
        value = file.first_value()
    finally:
        file.close()
    return value is not None and value[:1] == b"\x78"


def _record_from_row(row: dict[str, Any]) -> Record:
    numbers = _array(row["numbers"])
    n_atoms = len(numbers)
    cell = row.get("cell")
    extra = {**(row.get("data") or {}), **(row.get("key_value_pairs") or {})}
    labels = {k: v for k, v in {**extra, **row}.items() if k not in _NOT_LABELS}
    fixed = np.zeros(n_atoms, dtype=bool)
    for constraint in row.get("constraints") or ():
        if constraint["name"] == "FixAtoms":
            fixed[_array(constraint["kwargs"]["indices"]).astype(np.int64)] = True
    return Record(
        atomic_numbers=numbers,
        positions=_array(row["positions"]).reshape(-1, 3),
        cell=np.zeros((3, 3)) if cell is None else _array(cell),
        pbc=np.zeros(3, dtype=bool) if row.get("pbc") is None else _array(row["pbc"]),
        tags=np.zeros(n_atoms, dtype=np.uint8) if row.get("tags") is None else _array(row["tags"]),
        fixed=fixed,
        energies=number_candidates(labels),
        forces=vector_candidates({k: _array(v) for k, v in labels.items() if _is_array(v)}, n_atoms),
        info=words(extra),
    )


def _is_array(value: object) -> bool:
    return (isinstance(value, list) and bool(value) and isinstance(value[0], list)) or (
        isinstance(value, dict) and "__ndarray__" in value
    )


def _array(value: Any) -> NDArray[np.generic]:
    """Return a plain list, or ASE's ``{"__ndarray__": [shape, dtype, flat list]}``, as an array."""
    if isinstance(value, dict):
        shape, dtype, flat = value["__ndarray__"]
        return np.asarray(flat, dtype=np.dtype(dtype)).reshape(shape)
    return np.asarray(value)
