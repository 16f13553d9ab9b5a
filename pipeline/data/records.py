"""What a file reader hands over for one system, and how a System with its labels is made of it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from molkd.pipeline.data.system import System
from molkd.pipeline.errors import DataError

# A foreign parser may fail with any of these on a damaged file.
PARSER_ERRORS: tuple[type[Exception], ...] = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
)
PARSER_ERRORS += (OSError, RuntimeError, TypeError, ValueError)


_LONGEST_WORD = 100  # characters
_LARGEST_INT = 1 << 63  # Python refuses to write out what a hostile file may hold


class Record(NamedTuple):
    """One system as a file tells it, in Angstrom, eV and eV/A; shapes and dtypes are not yet checked."""

    atomic_numbers: NDArray[np.generic]  # (N,)
    positions: NDArray[np.generic]  # (N, 3)
    cell: NDArray[np.generic]  # (3, 3)
    pbc: NDArray[np.generic]  # (3,)
    tags: NDArray[np.generic]  # (N,)
    fixed: NDArray[np.generic]  # (N,)
    energies: Mapping[str, float]  # every number that could be an energy label, by its key in the file
    forces: Mapping[str, NDArray[np.generic]]  # every (N, 3) array that could be a force label, by its key
    info: Mapping[str, str] = MappingProxyType({})  # see `words`


class Reader(ABC):
    """Random access to the records of one file."""

    path: Path
    energy_keys: tuple[str, ...]  # where the energy label is looked for, first match wins
    forces_keys: tuple[str, ...]

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of systems S."""

    @abstractmethod
    def record(self, index: int) -> Record:
        """Return the record at `index`, from 0 to S - 1; raise DataError naming file, system and remedy."""

    @abstractmethod
    def close(self) -> None:
        """Release files and memory."""

    def name(self, index: int) -> str:
        """Return the short name for messages, ``train.extxyz#12``."""
        return f"{self.path.name}#{index}"


def number_candidates(values: Mapping[str, object]) -> dict[str, float]:
    """Return the entries that are one number, as float."""
    return {key: float(a.reshape(())) for key, a in _numeric(values) if a.size == 1}


def words(values: Mapping[str, object]) -> dict[str, str]:
    """Return the entries that are a short text, a truth or one number, as text: errors are sorted by them.

    What a terminal would obey, or a table would break at, is replaced by question marks.
    """
    plain = {
        key: value.item() if isinstance(value, np.generic | np.ndarray) and value.size == 1 else value
        for key, value in values.items()
    }
    texts = {
        key: f"{value:g}" if isinstance(value, float) else str(value)
        for key, value in plain.items()
        if isinstance(value, str | float) or (isinstance(value, int) and abs(value) < _LARGEST_INT)
    }
    short = {key: text for key, text in texts.items() if len(text) <= _LONGEST_WORD}
    return {key: "".join(c if c.isprintable() else "?" for c in text) for key, text in short.items()}


def vector_candidates(values: Mapping[str, object], n_atoms: int) -> dict[str, NDArray[np.generic]]:
    """Return the entries of shape (N, 3)."""
    return {key: a for key, a in _numeric(values) if a.shape == (n_atoms, 3)}


def _numeric(values: Mapping[str, object]) -> list[tuple[str, NDArray[np.generic]]]:
    arrays = [
        (key, np.asarray(v))
        for key, v in values.items()
        if isinstance(v, int | float | np.generic | np.ndarray)
    ]
    return [(key, a) for key, a in arrays if a.dtype.kind in "iuf"]


def build_system(
    record: Record, energy_keys: tuple[str, ...], forces_keys: tuple[str, ...], source: str
) -> System:
    """Check shapes and ranges of a record and choose its labels.

    Parameters
    ----------
    record : the file's content
    energy_keys, forces_keys : where to look for a label, first match wins; no match gives NaN
    source : name of the system, for messages

    Raises
    ------
    DataError
        Listing everything that does not fit together.
    """
    numbers = np.asarray(record.atomic_numbers)
    n_atoms = len(numbers) if numbers.ndim == 1 else -1
    arrays = {
        "atomic numbers": (numbers, (max(n_atoms, 0),)),
        "positions": (np.asarray(record.positions), (n_atoms, 3)),
        "cell": (np.asarray(record.cell), (3, 3)),
        "pbc": (np.asarray(record.pbc), (3,)),
        "tags": (np.asarray(record.tags), (n_atoms,)),
        "fixed": (np.asarray(record.fixed), (n_atoms,)),
    }
    problems = [
        f"{name} have shape {a.shape}, expected {s}" for name, (a, s) in arrays.items() if a.shape != s
    ]
    problems += [f"{name} are not numbers" for name, (a, _) in arrays.items() if a.dtype.kind not in "iufb"]
    if not problems:
        problems += [
            f"{name} must be whole numbers from 0 to 255"
            for name in ("atomic numbers", "tags")
            if not _fits_uint8(arrays[name][0])
        ]
    if problems:
        raise DataError(f"{source}: {'; '.join(problems)}. Correct the file or leave this system out.")
    energy = next((record.energies[k] for k in energy_keys if k in record.energies), np.nan)
    forces = next((record.forces[k] for k in forces_keys if k in record.forces), None)
    return System(
        atomic_numbers=numbers.astype(np.uint8),
        positions=arrays["positions"][0].astype(np.float64),
        cell=arrays["cell"][0].astype(np.float64),
        pbc=arrays["pbc"][0].astype(bool),
        energy=float(energy),
        forces=np.full((n_atoms, 3), np.nan) if forces is None else forces.astype(np.float64),
        tags=arrays["tags"][0].astype(np.uint8),
        fixed=arrays["fixed"][0].astype(bool),
        source=source,
        info=record.info,
    )


def _fits_uint8(values: NDArray[np.generic]) -> bool:
    as_float = values.astype(np.float64)
    return bool(np.all((as_float >= 0) & (as_float <= 255) & (as_float % 1 == 0)))
