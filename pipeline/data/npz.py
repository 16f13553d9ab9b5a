"""COLL's npz files as the GemNet code reads them: R, Z, N, E, F, all systems concatenated."""

import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from molkd.pipeline.data.records import Reader, Record
from molkd.pipeline.errors import DataError


class NpzReader(Reader):
    """Molecules without cell from R (sum N, 3) A, Z (sum N,), N (S,), E (S,) eV and F (sum N, 3) eV/A.

    E and F may be absent. The whole file is held in memory: COLL has 1.4 million atoms.
    """

    energy_keys = ("E",)
    forces_keys = ("F",)

    def __init__(self, path: Path) -> None:
        self.path = path
        self._arrays = _load(path)
        n_atoms = self._arrays["N"].astype(np.int64)
        self._ptr = np.concatenate([[0], np.cumsum(n_atoms)])  # (S+1,)
        n_systems, total = len(n_atoms), int(self._ptr[-1])
        self._per_system = {
            k: a.reshape(-1) for k, a in self._arrays.items() if a.shape in {(n_systems,), (n_systems, 1)}
        }
        self._per_atom = {k: a for k, a in self._arrays.items() if a.shape == (total, 3) and k != "R"}

    def __len__(self) -> int:
        return len(self._ptr) - 1

    def record(self, index: int) -> Record:
        """Return the record at `index`."""
        atoms = slice(int(self._ptr[index]), int(self._ptr[index + 1]))
        numbers = self._arrays["Z"][atoms]
        return Record(
            atomic_numbers=numbers,
            positions=self._arrays["R"][atoms],
            cell=np.zeros((3, 3)),
            pbc=np.zeros(3, dtype=bool),
            tags=np.zeros(len(numbers), dtype=np.uint8),
            fixed=np.zeros(len(numbers), dtype=bool),
            energies={k: float(a[index]) for k, a in self._per_system.items() if k != "N"},
            forces={k: a[atoms] for k, a in self._per_atom.items()},
        )

    def close(self) -> None:
        """Free the memory."""
        self._arrays, self._per_system, self._per_atom = {}, {}, {}


def _load(path: Path) -> dict[str, NDArray[np.generic]]:
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            wanted = {key: file[key] for key in file.files}
    except (ValueError, OSError, EOFError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path}: not a readable npz of plain arrays ({error}). Copy it again; pickles are refused."
        ) from error
    arrays = {key: a for key, a in wanted.items() if a.dtype.kind in "iuf"}
    missing = [key for key in ("R", "Z", "N") if key not in arrays]
    if missing:
        raise DataError(
            f"{path}: no array {', '.join(missing)} (found {', '.join(wanted) or 'none'}). Write R, Z, N "
            "and, as labels, E and F as in COLL; other layouts can be converted to extended xyz."
        )
    n_atoms = arrays["N"]
    if n_atoms.ndim != 1 or n_atoms.dtype.kind == "f" or (n_atoms < 0).any():
        raise DataError(f"{path}: N must be one count of atoms per system. Write the file again.")
    total = int(n_atoms.sum())
    shapes: dict[str, set[tuple[int, ...]]] = {
        "R": {(total, 3)},
        "Z": {(total,)},
        "F": {(total, 3)},
        "E": {(len(n_atoms),), (len(n_atoms), 1)},
    }
    problems = [
        f"{key} has shape {arrays[key].shape}, expected {' or '.join(map(str, sorted(allowed)))}"
        for key, allowed in shapes.items()
        if key in arrays and arrays[key].shape not in allowed
    ]
    if problems:
        raise DataError(
            f"{path}: {'; '.join(problems)} for the {total} atoms that N counts. Write the file again."
        )
    return arrays
