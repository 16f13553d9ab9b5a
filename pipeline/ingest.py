"""Structures and labels into a store: scan once for ids, plan the shards, then write them one by one."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.creation import LABELS_SHA256
from molkd.cache_schema.identity import ID_BYTES, labels_digest, labels_fingerprint
from molkd.cache_schema.manifest import finalize_if_complete
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.writer import Store, create_store
from molkd.pipeline.config import IngestConfig
from molkd.pipeline.data.duplicates import resolve_duplicates
from molkd.pipeline.data.lineage import PARENTS, parents_of_stores
from molkd.pipeline.data.sources import Source, open_sources
from molkd.pipeline.data.store_source import StoreSource
from molkd.pipeline.data.system import System
from molkd.pipeline.data.validate import check_system
from molkd.pipeline.errors import DataError
from molkd.pipeline.progress import Progress

log = logging.getLogger(__name__)

_READ_SYSTEMS = 10_000  # at a time


@dataclass(frozen=True)
class IngestSummary:
    """What a store holds after `ingest`, as the store itself says."""

    store: str
    n_systems: int
    n_atoms: int
    n_with_energy: int
    n_with_forces: int
    n_duplicates: int  # dropped from the data given
    n_shards: int
    fingerprint: str


@dataclass
class _Table:
    """One row a system, in the order of the input."""

    ids: list[bytes]
    n_atoms: list[int]
    energy: list[float]
    has_forces: list[bool]
    labels: list[bytes]  # hashes
    cell: list[NDArray[np.floating]]
    pbc: list[NDArray[np.bool_]]
    source: list[int]
    source_row: list[int]
    names: list[str]


def ingest(config: IngestConfig) -> IngestSummary:
    """Write the systems of `config.data` to `config.store`; the same call again continues or does nothing.

    Raises
    ------
    DataError
        If a file or a system cannot be used; nothing is written before every system has been checked.
    CacheError
        If the store exists and holds other systems, or these with other labels, tags or fixed atoms.
    """
    paths = [*config.data, *config.drop_labels]
    if not paths:
        raise DataError("no data given; name at least one file or folder of structures")
    sources = open_sources(paths, energy_key=config.energy_key, forces_key=config.forces_key)
    unlabelled = set(range(len(config.data), len(paths)))
    try:
        table = _scan(sources, unlabelled, require_labels=config.require_labels)
        keep, n_duplicates = _without_duplicates(table, config.on_conflict)
        stores = {str(p): s.cache for p, s in zip(paths, sources, strict=True) if isinstance(s, StoreSource)}
        parents = parents_of_stores(stores) | (config.parents or {})
        store = _create(config, table, keep, paths, n_duplicates, parents)
        _write_shards(store, sources, unlabelled, table, keep)
        finalize_if_complete(store)
    finally:
        for source in sources:
            source.close()
    return _summarize(store, n_duplicates)


def _summarize(store: Store, n_duplicates: int) -> IngestSummary:
    with Cache.open(store.path) as cache:
        return IngestSummary(
            store=str(store.path),
            n_systems=cache.n_systems,
            n_atoms=cache.n_atoms,
            n_with_energy=int(np.isfinite(cache.energy).sum()),
            n_with_forces=_count_with_forces(cache),
            n_duplicates=n_duplicates,
            n_shards=cache.plan.n_shards,
            fingerprint=cache.fingerprint,
        )


def _count_with_forces(cache: Cache) -> int:
    if LABELS_SHA256 in cache.dataset:  # made here: the count was taken from the very labels of the hash
        return int(cache.dataset["n_with_forces"])
    count = 0
    for begin in range(0, cache.n_systems, _READ_SYSTEMS):
        part = np.arange(begin, min(begin + _READ_SYSTEMS, cache.n_systems))
        known = np.isfinite(cache.read(part, ("forces",))["forces"]).any(axis=1)
        begins = np.concatenate([[0], np.cumsum(cache.system_n_atoms[part])[:-1]])
        count += int(np.logical_or.reduceat(known, begins).sum())
    return count


def _scan(sources: Sequence[Source], unlabelled: set[int], *, require_labels: bool) -> _Table:
    table = _Table([], [], [], [], [], [], [], [], [], [])
    total = sum(len(s) for s in sources)
    if total == 0:
        raise DataError(f"{', '.join(str(s.path) for s in sources)}: no systems inside; nothing to store")
    with Progress(total, "scan", "system") as progress:
        for k, source in enumerate(sources):
            for row in range(len(source)):
                system = _read(source, row, keep_labels=k not in unlabelled)
                check_system(system)
                if require_labels and k not in unlabelled and not np.isfinite(system.energy):
                    raise DataError(
                        f"{system.source}: no energy, and labels were required; "
                        "name its key with --energy-key, or give the file to --drop-labels"
                    )
                _append(table, system, k, row)
                progress.update()
    return table


def _append(table: _Table, system: System, source: int, row: int) -> None:
    table.ids.append(system.id)
    table.n_atoms.append(system.n_atoms)
    table.energy.append(system.energy)
    table.has_forces.append(bool(np.isfinite(system.forces).any()))
    table.labels.append(_labels_of(system))
    table.cell.append(system.cell)
    table.pbc.append(system.pbc)
    table.source.append(source)
    table.source_row.append(row)
    table.names.append(system.source)


def _labels_of(system: System) -> bytes:
    return labels_digest(system.energy, system.forces, system.tags, system.fixed)


def _read(source: Source, row: int, *, keep_labels: bool) -> System:
    system = source.read(row)
    if keep_labels:
        return system
    return System(
        atomic_numbers=system.atomic_numbers,
        positions=system.positions,
        cell=system.cell,
        pbc=system.pbc,
        energy=float("nan"),
        forces=np.full_like(system.forces, np.nan),
        tags=system.tags,
        fixed=system.fixed,
        source=system.source,
    )


def _without_duplicates(
    table: _Table, on_conflict: Literal["error", "first"]
) -> tuple[NDArray[np.int64], int]:
    """Return the rows to keep and how many were dropped."""
    keep = resolve_duplicates(
        _id_array(table.ids),
        np.array(table.energy),
        np.array(table.has_forces),
        table.names,
        on_conflict=on_conflict,
    )
    rows = np.flatnonzero(keep)
    n_dropped = len(table.ids) - len(rows)
    if n_dropped:
        log.info("%d duplicates dropped, labelled ones kept", n_dropped)
    return rows, n_dropped


def _create(
    config: IngestConfig,
    table: _Table,
    keep: NDArray[np.int64],
    paths: Sequence[Path | str],
    n_duplicates: int,
    parents: dict[str, Any],
) -> Store:
    energy, ids = np.array(table.energy)[keep], _id_array(table.ids)[keep]
    return create_store(
        config.store,
        ids=ids,
        n_atoms=np.array(table.n_atoms)[keep],
        energy=energy,
        cell=np.stack(table.cell)[keep],
        pbc=np.stack(table.pbc)[keep],
        source=np.array(table.source)[keep],
        source_row=np.array(table.source_row)[keep],
        source_names=[str(p) for p in paths],
        dataset={
            "licence": config.licence,
            "citation": config.citation,
            "n_with_energy": int(np.isfinite(energy).sum()),
            "n_with_forces": int(np.array(table.has_forces)[keep].sum()),
            "n_duplicates_dropped": n_duplicates,
            LABELS_SHA256: labels_fingerprint(ids, [table.labels[i] for i in keep]),
            "units": {"energy": "eV", "positions": "A", "forces": "eV/A"},
            **({"augmentation": config.augmentation} if config.augmentation else {}),
            **({PARENTS: parents} if parents else {}),
        },
        seed=config.seed,
        rows_per_shard=config.shard_atoms,
    )


def _write_shards(
    store: Store, sources: Sequence[Source], unlabelled: set[int], table: _Table, keep: NDArray[np.int64]
) -> None:
    missing = store.missing_shards("atoms")
    if missing and len(missing) < store.plan.n_shards:
        log.info(
            "continuing: %d of %d shards are there", store.plan.n_shards - len(missing), store.plan.n_shards
        )
    assert store.input_index is not None
    n_systems = sum(len(store.systems_of_shard(shard)) for shard in missing)
    with Progress(n_systems, "write", "system") as progress:
        for shard in missing:
            with store.shard_writer("atoms", shard) as writer:
                for index in store.systems_of_shard(shard):
                    # Rows of this scan: the call that made the store may have named other files first.
                    i = int(keep[store.input_index[index]])
                    writer.write(_reread(table, i, sources, unlabelled))
                    progress.update()


def _reread(
    table: _Table, i: int, sources: Sequence[Source], unlabelled: set[int]
) -> dict[str, NDArray[Any]]:
    """Return the arrays of a scanned system; what has changed since is refused."""
    k = table.source[i]
    system = _read(sources[k], table.source_row[i], keep_labels=k not in unlabelled)
    if system.id != table.ids[i] or _labels_of(system) != table.labels[i]:
        raise DataError(f"{system.source}: changed while it was being read; run the command again")
    return {
        "atomic_numbers": system.atomic_numbers,
        "positions": system.positions,
        "forces": system.forces,
        "tags": system.tags,
        "fixed": system.fixed,
    }


def _id_array(ids: Sequence[bytes]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(ids), dtype=np.uint8).reshape(-1, ID_BYTES)
