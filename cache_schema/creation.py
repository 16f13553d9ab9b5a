"""The first contents of a store: the systems table, empty groups and the plan."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from molkd.cache_schema.errors import CacheError
from molkd.cache_schema.files import (
    exclusive,
    fsync_folder,
    make_folder,
    sweep,
    temporary_path,
    write_file,
)
from molkd.cache_schema.identity import ID_BYTES, dataset_fingerprint
from molkd.cache_schema.jsonfile import bounded, canonical, seal
from molkd.cache_schema.layout import (
    DATA,
    LOG,
    MAX_SYSTEMS,
    PLAN,
    Packing,
    atoms_layout,
    choose_rows_per_shard,
    pack,
    stored_order,
)
from molkd.cache_schema.plan import SYSTEM_ARRAYS, Plan, Systems, system_file
from molkd.cache_schema.teachers import short
from molkd.cache_schema.zarr_json import ROOT_ATTRIBUTES, array_document, dump, group_document, plain_document

LABELS_SHA256 = "labels_sha256"  # key of `dataset`: hash of what the store keeps beside identities
_SHOWN = 3


@dataclass(frozen=True)
class SystemTable:
    """One row a system, in the caller's order, checked."""

    id: NDArray[np.uint8]  # (S, 16)
    n_atoms: NDArray[np.int32]  # (S,)
    energy: NDArray[np.float64]  # (S,) eV, NaN if unknown
    cell: NDArray[np.float32]  # (S, 3, 3) A
    pbc: NDArray[np.bool_]  # (S, 3)
    source: NDArray[np.int32]  # (S,)
    source_row: NDArray[np.int64]  # (S,)
    source_names: tuple[str, ...]

    @classmethod
    def check(
        cls,
        where: Path,
        *,
        ids: ArrayLike,
        n_atoms: ArrayLike,
        energy: ArrayLike,
        cell: ArrayLike,
        pbc: ArrayLike,
        source: ArrayLike,
        source_row: ArrayLike,
        source_names: tuple[str, ...],
    ) -> "SystemTable":
        """Bring the caller's arrays into the stored types.

        Raises
        ------
        CacheError
            If there are no systems, lengths differ, ids repeat, or a number does not make sense.
        """
        rows = np.ascontiguousarray(ids, dtype=np.uint8).reshape(-1, ID_BYTES)
        n = len(rows)
        if not 0 < n <= MAX_SYSTEMS:
            raise CacheError(f"{where}: {n} systems; a store needs at least one")
        given = {"n_atoms": (n_atoms, ()), "energy": (energy, ()), "cell": (cell, (3, 3)), "pbc": (pbc, (3,))}
        given |= {"source": (source, ()), "source_row": (source_row, ())}
        for name, (values, tail) in given.items():
            if np.shape(values) != (n, *tail):
                raise CacheError(f"{where}: {name} has shape {np.shape(values)}, expected {(n, *tail)}")
        table = cls(
            id=rows,
            n_atoms=np.asarray(n_atoms, dtype=np.int32),
            energy=np.asarray(energy, dtype=np.float64),
            cell=np.asarray(cell, dtype=np.float32),
            pbc=np.asarray(pbc, dtype=bool),
            source=np.asarray(source, dtype=np.int32),
            source_row=np.asarray(source_row, dtype=np.int64),
            source_names=source_names,
        )
        table._check_values(where)
        return table

    def _check_values(self, where: Path) -> None:
        if not ((self.source >= 0) & (self.source < len(self.source_names))).all():
            raise CacheError(
                f"{where}: source holds numbers beyond the {len(self.source_names)} source names"
            )
        for wrong, message in (
            (self.n_atoms < 1, "no atoms"),
            (np.isinf(self.energy), "an infinite energy; a missing label is NaN"),
            (~np.isfinite(self.cell).all(axis=(1, 2)), "a cell that is not finite"),
        ):
            if wrong.any():
                raise CacheError(f"{where}: {self._names(np.flatnonzero(wrong))}: {message}")
        order = np.lexsort(self.id.T)
        repeated = order[1:][(self.id[order][1:] == self.id[order][:-1]).all(axis=1)]
        if len(repeated):
            raise CacheError(
                f"{where}: {len(repeated)} systems are given twice ({self._names(np.sort(repeated))}); "
                "drop duplicates"
            )

    def _names(self, rows: NDArray[np.integer[Any]]) -> str:
        shown = [f"{self.source_names[self.source[r]]}#{self.source_row[r]}" for r in rows[:_SHOWN]]
        return ", ".join(shown) + (f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else "")

    @property
    def fingerprint(self) -> str:
        """Hash of the set of ids."""
        return dataset_fingerprint(self.id)


def build(
    folder: Path, table: SystemTable, dataset: dict[str, Any], seed: int, rows_per_shard: int | None
) -> NDArray[np.int64]:
    """Write the first contents of a store into an empty folder, the plan last.

    Returns
    -------
    (S,)
        For each stored system its row in the caller's arrays.
    """
    if not 0 <= seed < 1 << 63:
        raise CacheError(f"seed {seed}: must be from 0 to 2**63 - 1")
    canonical(dataset)  # refuse what is no JSON before anything is written
    order = stored_order(table.id, seed)
    rows = choose_rows_per_shard(table.n_atoms, rows_per_shard)
    packing, places = pack(table.n_atoms[order], rows)
    columns = {name: getattr(table, name)[order] for name in SYSTEM_ARRAYS if name not in vars(places)}
    columns |= vars(places)

    hashes = {}
    for name, (dtype, _, _, _) in SYSTEM_ARRAYS.items():
        raw = columns[name].astype(np.dtype(dtype).newbyteorder("<")).tobytes()
        hashes[name] = hashlib.sha256(raw).hexdigest()
        _write(folder / system_file(name), raw)

    metadata = {}
    for name, raw in metadata_files(packing, table.source_names).items():
        metadata[name] = hashlib.sha256(raw).hexdigest()
        _write(folder / DATA / name, bounded(raw, "the names of the sources"))

    make_folder(folder / LOG)
    plan = Plan(seed, table.fingerprint, packing, hashes, metadata, dataset)
    _write(folder / PLAN, bounded(seal(plan.to_json()), "the provenance of the data set"))
    return order


def metadata_files(packing: Packing, source_names: Sequence[str]) -> dict[str, bytes]:
    """Return every zarr.json that a store has before it knows a teacher, by its path in data.zarr."""
    documents = {
        "zarr.json": group_document(ROOT_ATTRIBUTES),
        "systems/zarr.json": group_document({"source_names": list(source_names)}),
        "atoms/zarr.json": group_document({}),
        "teachers/zarr.json": group_document({}),
    }
    for name, (dtype, tail, dimensions, unit) in SYSTEM_ARRAYS.items():
        shape = (packing.n_systems, *tail)
        documents[f"systems/{name}/zarr.json"] = plain_document(shape, dtype, dimensions, unit)
    for layout in atoms_layout(packing).values():
        documents[f"{layout.path}/zarr.json"] = array_document(layout)
    return {name: dump(document) for name, document in documents.items()}


@contextlib.contextmanager
def new_folder(root: Path) -> Iterator[Path]:
    """Give an empty folder to write to, which becomes `root` when all is written; else nothing is left.

    Raises
    ------
    CacheError
        If `root` exists and is not an empty folder, or lies in a store.
    """
    for folder in root.resolve().parents:
        if (folder / PLAN).exists() and (folder / DATA).exists():
            raise CacheError(f"{root}: lies in the store {folder}; choose a place outside of it")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise CacheError(
            f"{root}: exists and is not a store (no {PLAN} in it); choose another name, or remove it"
        )
    temporary = temporary_path(root.absolute())
    try:
        make_folder(temporary.parent)
        sweep(temporary.parent)
        temporary.mkdir()
        with exclusive(temporary):  # alive, whatever its age
            if root.exists():  # an empty folder made beforehand keeps its rights
                _take_rights(temporary, root)
            yield temporary
            temporary.rename(root)
        fsync_folder(root.absolute().parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_rights(folder: Path, like: Path) -> None:
    rights = like.stat()
    if folder.stat().st_gid != rights.st_gid:
        os.chown(folder, -1, rights.st_gid)
    folder.chmod(rights.st_mode & 0o7777)


def match_order(table: SystemTable, stored_ids: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return, for each stored system, its row in the caller's arrays; both hold the same ids."""
    given, stored = np.lexsort(table.id.T), np.lexsort(stored_ids.T)
    order = np.empty(len(given), dtype=np.int64)
    order[stored] = given
    return order


def describe_difference(table: SystemTable, stored_ids: NDArray[np.uint8]) -> str:
    """Say how the given systems differ from the stored ones."""
    given = {row.tobytes(): k for k, row in enumerate(table.id)}
    stored = {row.tobytes() for row in stored_ids}
    extra = np.array([k for name, k in given.items() if name not in stored], dtype=np.int64)
    missing = [name.hex() for name in sorted(stored - set(given))]
    parts = []
    if len(extra):
        parts.append(f"{len(extra)} given systems are not in it ({table._names(extra)})")
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        parts.append(f"{len(missing)} of its systems are not given (ids {', '.join(missing[:_SHOWN])}{more})")
    return "; ".join(parts)


def require_same_systems(
    root: Path, table: SystemTable, dataset: dict[str, Any], plan: Plan, systems: Systems
) -> NDArray[np.int64]:
    """Return, for each system of a store, its row in the caller's arrays.

    Raises
    ------
    CacheError
        If the store holds other systems, or the same with other labels.
    """
    if table.fingerprint != plan.fingerprint:
        raise CacheError(
            f"{root}: holds other systems: {describe_difference(table, systems.id)}; "
            "choose another name for the store, or give the same data"
        )
    order = match_order(table, systems.id)
    energy = table.energy[order]
    changed = (energy != systems.energy) & ~(np.isnan(energy) & np.isnan(systems.energy))
    if changed.any():
        raise CacheError(
            f"{root}: {int(changed.sum())} of its systems have other energy labels than the ones given; "
            "choose another name for the store, or give the same labels"
        )
    known, given = plan.dataset.get(LABELS_SHA256), dataset.get(LABELS_SHA256)
    if known is not None and given is not None and known != given:
        raise CacheError(
            f"{root}: holds the same systems with other forces, tags or fixed atoms than the ones given "
            f"(labels {short(known)}, given {short(given)}); "
            "choose another name for the store, or give the same labels"
        )
    return order


def _write(path: Path, raw: bytes) -> None:
    make_folder(path.parent)
    write_file(path, raw, replace=True)
