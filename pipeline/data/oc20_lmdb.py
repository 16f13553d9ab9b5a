"""OC20 S2EF LMDBs in every layout that OCP and fairchem 1 wrote: PyG 1 and 2, y/force and energy/forces."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from molkd.pipeline.data.lmdb_file import LmdbFile
from molkd.pipeline.data.records import Reader, Record, number_candidates, vector_candidates, words
from molkd.pipeline.data.restricted_unpickler import load_count, load_record
from molkd.pipeline.errors import DataError

_LENGTH_KEY = b"length"


class Oc20LmdbReader(Reader):
    """One LMDB file with a pickled torch_geometric Data object per system under the keys "0", "1", ..."""

    energy_keys = ("energy", "y")
    forces_keys = ("forces", "force")

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = LmdbFile(path)
        try:
            length = self._file.get(_LENGTH_KEY)
            # A preprocessing run that was stopped has no length; its keys are then all there is.
            self._length = (
                self._file.n_entries if length is None else load_count(length, f"{path}, key length")
            )
        except DataError:
            self.close()
            raise

    def __len__(self) -> int:
        return self._length

    def record(self, index: int) -> Record:
        """Return the record at `index`."""
        where = f"{self.path}, key {index}"
        data = self._file.get(b"%d" % index)
        if data is None:
            raise DataError(
                f"{where}: missing, though the file counts {len(self)} systems. Copy the file again."
            )
        return _record_from_attributes(load_record(data, where), where)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _record_from_attributes(attributes: Mapping[str, Any], where: str) -> Record:
    missing = [key for key in ("pos", "atomic_numbers") if not isinstance(attributes.get(key), np.ndarray)]
    if missing:
        raise DataError(f"{where}: no {' and no '.join(missing)}. Use LMDBs of the S2EF task.")
    numbers, positions = attributes["atomic_numbers"].reshape(-1), attributes["pos"]
    n_atoms = len(numbers)
    cell = attributes.get("cell")
    pbc = attributes.get("pbc")
    has_cell = isinstance(cell, np.ndarray) and cell.size == 9 and bool(cell.any())
    forces = {key: value for key, value in attributes.items() if key != "pos"}
    return Record(
        atomic_numbers=numbers,
        positions=positions,
        cell=cell.reshape(3, 3) if isinstance(cell, np.ndarray) and has_cell else np.zeros((3, 3)),
        # OC20 leaves pbc out and its models take every cell as periodic; molecules have a cell of zeros.
        pbc=pbc.reshape(-1) if isinstance(pbc, np.ndarray) else np.full(3, has_cell),
        tags=_per_atom(attributes, "tags", n_atoms),
        fixed=_per_atom(attributes, "fixed", n_atoms) != 0,
        energies=number_candidates(attributes),
        forces=vector_candidates(forces, n_atoms),
        info=words(attributes),
    )


def _per_atom(attributes: Mapping[str, Any], key: str, n_atoms: int) -> np.ndarray[Any, Any]:
    value = attributes.get(key)
    return value.reshape(-1) if isinstance(value, np.ndarray) else np.zeros(n_atoms, dtype=np.uint8)
