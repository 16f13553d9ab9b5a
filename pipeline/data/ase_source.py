"""Whatever ASE reads: single files through ase.io, databases through ase.db."""

import sqlite3
import warnings
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms, FixCartesian
from ase.io.formats import UnknownFileTypeError, filetype
from ase.io.trajectory import TrajectoryReader
from numpy.typing import NDArray

from molkd.pipeline.data.records import (
    PARSER_ERRORS,
    Reader,
    Record,
    number_candidates,
    vector_candidates,
    words,
)
from molkd.pipeline.errors import DataError

# The calculator's results come under "energy" and "forces". "free_energy" is left out: it includes the
# smearing entropy, and files that have both would mix two quantities.
ENERGY_KEYS = ("energy", "REF_energy", "ref_energy", "dft_energy", "DFT_energy")
FORCES_KEYS = ("forces", "REF_forces", "ref_forces", "dft_forces", "DFT_forces")
# ASE declares no types for these.
_open_trajectory: Any = TrajectoryReader
_open_database: Any = ase.db.connect
_SQLITE_MAGIC = b"SQLite format 3\0"
_SQLITE_HEADER_BYTES = 100
_DATABASE_ERRORS: tuple[type[Exception], ...] = (*PARSER_ERRORS, sqlite3.Error, UnknownFileTypeError)
_FORMAT_ERRORS: tuple[type[Exception], ...] = (*PARSER_ERRORS, UnknownFileTypeError)


class AseFileReader(Reader):
    """A file that ase.io knows; trajectories are read on demand, other formats are kept in memory."""

    energy_keys = ENERGY_KEYS
    forces_keys = FORCES_KEYS

    def __init__(self, path: Path) -> None:
        self.path = path
        self._frames: Any  # a list of Atoms, or what reads like one
        try:
            if filetype(str(path)) == "traj":
                self._frames = _open_trajectory(str(path))
            else:
                with warnings.catch_warnings():
                    # ASE's remarks on odd files; what was read is checked later.
                    warnings.simplefilter("ignore")
                    self._frames = ase.io.read(path, index=":", do_not_split_by_at_sign=True)
        except _FORMAT_ERRORS as error:
            raise DataError(
                f"{path}: not extxyz, OC20 LMDB, aselmdb, npz or an ASE database, and ase.io cannot read it "
                f"({type(error).__name__}: {error}). Convert it to extended xyz, or rename it to its usual "
                "suffix."
            ) from error

    def __len__(self) -> int:
        return len(self._frames)

    def record(self, index: int) -> Record:
        """Return the record at `index`."""
        try:
            return record_from_atoms(self._frames[index])
        except PARSER_ERRORS as error:
            raise DataError(
                f"{self.path}, system {index}: cannot be read ({error}). Write it again or leave it out."
            ) from error

    def close(self) -> None:
        """Close the file."""
        if not isinstance(self._frames, list):
            self._frames.close()
        self._frames = []


class AseDatabaseReader(Reader):
    """An ASE database: SQLite rows are read on demand, a JSON database is kept in memory."""

    energy_keys = ENERGY_KEYS
    forces_keys = FORCES_KEYS

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[int, Any] = {}
        with path.open("rb") as file:
            header = file.read(_SQLITE_HEADER_BYTES)
        is_sqlite = header.startswith(_SQLITE_MAGIC)
        if path.suffix.lower() == ".db" and not is_sqlite:
            raise DataError(
                f"{path}: not an SQLite file. Give an ASE database, or rename the file to its usual suffix."
            )
        if is_sqlite and path.stat().st_size < _sqlite_size(header):
            raise DataError(
                f"{path}: cut off, an SQLite file of {_sqlite_size(header)} bytes. Copy it again."
            )
        try:
            self._database = _open_database(path, type="db" if is_sqlite else "json", use_lock_file=False)
            if is_sqlite:
                rows = self._database.select(columns=["id"], include_data=False)
                self._ids = sorted(row.id for row in rows)
            else:  # ASE parses the whole file for every row it gives
                self._rows = {row.id: row for row in self._database.select()}
                self._ids = sorted(self._rows)
        except _DATABASE_ERRORS as error:
            raise DataError(
                f"{path}: not an ASE database, or damaged ({type(error).__name__}: {error}). Copy it again, "
                "or write it with ase.db."
            ) from error

    def __len__(self) -> int:
        return len(self._ids)

    def record(self, index: int) -> Record:
        """Return the record at `index`."""
        row_id = self._ids[index]
        try:
            row = self._rows[row_id] if self._rows else self._database.get(id=row_id)
            atoms = row.toatoms(add_additional_information=True)
            extra = atoms.info.pop("data", {})
            atoms.info.update({**extra, **atoms.info.pop("key_value_pairs", {})})
            return record_from_atoms(atoms)
        except _DATABASE_ERRORS as error:
            raise DataError(
                f"{self.path}, system {index} (row id {row_id}): cannot be read ({error}). Copy the database "
                "again or delete this row."
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._rows = {}


def record_from_atoms(atoms: Atoms) -> Record:
    """Return structure, constraints and everything that could be a label of an ASE Atoms object."""
    results = getattr(atoms.calc, "results", {}) if atoms.calc is not None else {}
    arrays = {k: v for k, v in atoms.arrays.items() if k not in {"positions", "numbers", "tags", "fixed"}}
    n_atoms = len(atoms)
    return Record(
        atomic_numbers=atoms.numbers,
        positions=atoms.positions,
        cell=np.asarray(atoms.cell[:]),
        pbc=atoms.pbc,
        tags=atoms.arrays.get("tags", np.zeros(n_atoms, dtype=np.uint8)),
        fixed=_fixed_atoms(atoms),
        energies=number_candidates({**atoms.info, **results}),
        forces=vector_candidates({**atoms.info, **arrays, **results}, n_atoms),
        info=words(atoms.info),
    )


def _fixed_atoms(atoms: Atoms) -> NDArray[np.bool_]:
    """Return (N,) which atoms are held: column `fixed`, FixAtoms, or FixCartesian in all directions."""
    fixed = np.zeros(len(atoms), dtype=bool)
    if "fixed" in atoms.arrays:
        fixed |= atoms.arrays["fixed"].astype(bool).reshape(len(atoms), -1).all(axis=1)
    for constraint in atoms.constraints:
        if isinstance(constraint, FixAtoms) or (
            isinstance(constraint, FixCartesian) and all(constraint.mask)
        ):
            fixed[constraint.index] = True
    return fixed


def _sqlite_size(header: bytes) -> int:
    """Return the length that an SQLite header claims, 0 if an old library has left it out of date."""
    page_size, n_pages = int.from_bytes(header[16:18]), int.from_bytes(header[28:32])
    is_current = header[24:28] == header[92:96]  # counter of changes, and its value when n_pages was written
    return (65536 if page_size == 1 else page_size) * n_pages if is_current else 0
