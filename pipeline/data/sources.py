"""Any supported file or folder of structures, as one list of systems with random access."""

import logging
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from molkd.cache_schema.layout import PLAN
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.remote import is_url
from molkd.pipeline.data.ase_source import AseDatabaseReader, AseFileReader
from molkd.pipeline.data.aselmdb import AseLmdbReader, is_aselmdb
from molkd.pipeline.data.extxyz import COMPRESSIONS, ExtxyzReader
from molkd.pipeline.data.lmdb_file import is_lmdb
from molkd.pipeline.data.npz import NpzReader
from molkd.pipeline.data.oc20_lmdb import Oc20LmdbReader
from molkd.pipeline.data.records import Reader, Record, build_system
from molkd.pipeline.data.store_source import StoreSource
from molkd.pipeline.data.system import System
from molkd.pipeline.errors import DataError

_log = logging.getLogger(__name__)

XYZ_SUFFIXES = {".extxyz", ".xyz"}
LMDB_SUFFIXES = {".lmdb", ".aselmdb", ".mdb"}
LOOK_AHEAD = (
    1000  # systems searched for a named label before it counts as absent; unlabelled ones may come first
)


class Source(Protocol):
    """Systems of one file or folder, in file order."""

    path: Path

    def __len__(self) -> int:
        """Return the number of systems S."""
        ...

    def read(self, index: int) -> System:
        """Return system `index`, from 0 to S - 1, in any order; raise DataError if it cannot be read."""
        ...

    def close(self) -> None:
        """Release files; the source cannot be read afterwards."""
        ...


def open_source(path: str | Path, *, energy_key: str | None = None, forces_key: str | None = None) -> Source:
    """Open structures for reading, the format chosen by suffix and content.

    Formats: extended xyz (also .xz, .gz, .bz2, .zst), OC20 S2EF LMDB and ASE-LMDB (a file, or a folder of
    shards in the order of their names), COLL npz, ASE databases (.db, .json), stores of ours, and what else
    ``ase.io`` reads.

    Parameters
    ----------
    path : file, folder of LMDB shards, store, or URL of a store
    energy_key, forces_key : the label's name in the file, for files with several; by default the ASE
        calculator's results, then common names. ``free_energy`` is only taken if named.

    Raises
    ------
    DataError
        If the file is missing, damaged, empty or of an unknown format, or has no label of the given name.
    """
    if is_url(path) or (Path(path) / PLAN).exists():
        return StoreSource(Cache.open(path))
    path = Path(path)
    try:
        reader = _open_reader(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error}). Check that you may read it.") from error
    try:
        if len(reader) == 0:
            raise DataError(f"{path} holds no systems. Check that the file was written completely.")
        return _RecordSource(reader, energy_key, forces_key)
    except DataError:
        reader.close()
        raise


def open_sources(
    paths: Iterable[str | Path], *, energy_key: str | None = None, forces_key: str | None = None
) -> list[Source]:
    """Open several sources; one DataError tells what is wrong with all of them."""
    sources: list[Source] = []
    problems: list[str] = []
    for path in paths:
        try:
            sources.append(open_source(path, energy_key=energy_key, forces_key=forces_key))
        except DataError as error:
            problems.append(str(error))
    if problems:
        for source in sources:
            source.close()
        raise DataError("\n".join(problems))
    return sources


class _RecordSource:
    """A reader together with the choice of labels: the Source of every format."""

    def __init__(self, reader: Reader, energy_key: str | None, forces_key: str | None) -> None:
        self.path = reader.path
        self._reader = reader
        self._energy_keys = reader.energy_keys if energy_key is None else (energy_key,)
        self._forces_keys = reader.forces_keys if forces_key is None else (forces_key,)
        problems = _absent_labels(reader, energy_key, forces_key)
        if problems:
            raise DataError(f"{self.path}: {'; '.join(problems)}.")
        if energy_key is None:
            self._warn_if_unlabelled()

    def __len__(self) -> int:
        return len(self._reader)

    def read(self, index: int) -> System:
        if not 0 <= index < len(self):
            raise IndexError(f"system {index} of {len(self)} in {self.path}")
        record = self._reader.record(index)
        return build_system(record, self._energy_keys, self._forces_keys, self._reader.name(index))

    def close(self) -> None:
        self._reader.close()

    def _warn_if_unlabelled(self) -> None:
        energies = self._reader.record(0).energies
        if energies and not any(key in energies for key in self._energy_keys):
            _log.warning(
                "%s: the first system has no energy under %s. Numbers in the file: %s. Name the energy key "
                "if it is one of them.", self.path, ", ".join(self._energy_keys), ", ".join(sorted(energies)),
            )  # fmt: skip


def _absent_labels(reader: Reader, energy_key: str | None, forces_key: str | None) -> list[str]:
    """Return what to say about named labels that no system among the first LOOK_AHEAD has."""
    wanted = {kind: key for kind, key in (("energy", energy_key), ("forces", forces_key)) if key is not None}
    present: dict[str, set[str]] = {"energy": set(), "forces": set()}
    n_searched = min(len(reader), LOOK_AHEAD)
    for index in range(n_searched):
        if all(key in present[kind] for kind, key in wanted.items()):
            return []
        record = reader.record(index)
        present["energy"].update(record.energies)
        present["forces"].update(record.forces)
    return [
        f"no {kind} label '{key}' in the first {n_searched} systems; keys that fit: "
        f"{', '.join(sorted(present[kind])) or 'none'}"
        for kind, key in wanted.items()
        if key not in present[kind]
    ]


class _Shards(Reader):
    """Readers of the same format, one after the other."""

    def __init__(self, path: Path, readers: Sequence[Reader]) -> None:
        self.path = path
        self.energy_keys = tuple(dict.fromkeys(key for r in readers for key in r.energy_keys))
        self.forces_keys = tuple(dict.fromkeys(key for r in readers for key in r.forces_keys))
        self._readers = readers
        self._ends = list(accumulate(len(r) for r in readers))

    def __len__(self) -> int:
        return self._ends[-1]

    def record(self, index: int) -> Record:
        """Return the record at `index`."""
        reader, local = self._locate(index)
        return reader.record(local)

    def name(self, index: int) -> str:
        """Return the name in its shard."""
        reader, local = self._locate(index)
        return reader.name(local)

    def close(self) -> None:
        """Close all shards."""
        for reader in self._readers:
            reader.close()

    def _locate(self, index: int) -> tuple[Reader, int]:
        shard = bisect_right(self._ends, index)
        return self._readers[shard], index - (self._ends[shard - 1] if shard else 0)


def _open_reader(path: Path) -> Reader:
    if not path.exists():
        raise DataError(
            f"{path} does not exist. Give the path of a file of structures or a folder of LMDB shards."
        )
    if path.is_dir():
        return _open_folder(path)
    suffix = path.suffix.lower()
    inner_suffix = Path(path.stem).suffix.lower() if suffix in COMPRESSIONS else suffix
    if inner_suffix in XYZ_SUFFIXES:
        return ExtxyzReader(path)
    if suffix in LMDB_SUFFIXES or is_lmdb(path):
        return _open_lmdb(path)
    if suffix == ".npz":
        return NpzReader(path)
    if suffix in {".db", ".json"}:
        return AseDatabaseReader(path)
    return AseFileReader(path)


def _open_lmdb(path: Path) -> Reader:
    return AseLmdbReader(path) if is_aselmdb(path) else Oc20LmdbReader(path)


def _open_folder(folder: Path) -> Reader:
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in LMDB_SUFFIXES and p.name != "lock.mdb")
    if not files:
        raise DataError(
            f"{folder} is a folder without .lmdb or .aselmdb files. Give a folder of LMDB shards, or files."
        )
    readers: list[Reader] = []
    try:
        for file in files:
            readers.append(_open_lmdb(file))  # noqa: PERF401, the list has to survive an error to close its files
    except DataError:
        for reader in readers:
            reader.close()
        raise
    return _Shards(folder, readers)
