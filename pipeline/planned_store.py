"""The store that signals are to go to: as it is, or as it is going to be."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.fields import FieldSpec
from molkd.cache_schema.layout import CHUNK_ROWS, choose_rows_per_shard, pack, signal_group
from molkd.cache_schema.signal import Signal
from molkd.cache_schema.teachers import require_same
from molkd.cache_schema.untrusted import n_bytes_below
from molkd.cache_schema.writer import Store
from molkd.pipeline.encodings import CHOOSE
from molkd.pipeline.errors import CacheError


@dataclass(frozen=True)
class PlannedStore:
    """What is in a store, and room for what is not."""

    path: Path
    n_systems: NDArray[np.int64]  # (P,) of each shard
    n_atoms: NDArray[np.int64]  # (P,)
    systems_per_shard: int  # places that a shard has on the system axis
    n_bytes: int = 0  # what it takes already; 0 if there is no store yet
    declared: Mapping[str, Signal] = field(default_factory=dict)
    missing: Mapping[str, list[int]] = field(default_factory=dict)  # declared signal -> shards that it lacks

    @property
    def is_new(self) -> bool:
        """Whether structures and labels have to be written too."""
        return not self.n_bytes

    def shards_to_do(self, signal: str) -> list[int]:
        """Return the shards that a signal lacks."""
        return self.missing.get(signal, list(range(len(self.n_atoms))))

    def is_stored(self, signal: str) -> bool:
        """Say whether a part of the signal is stored; then its encoding cannot change any more."""
        return len(self.shards_to_do(signal)) < len(self.n_atoms)

    def rows(self, shards: list[int], edges_per_atom: float) -> dict[str, float]:
        """Return the rows that so many shards take on each axis, filled up to whole chunks."""
        atoms = self.n_atoms[shards]
        return {
            "system": len(shards) * self.systems_per_shard,
            "atom": float(_whole_chunks(atoms).sum()),
            "edge": float(_whole_chunks(atoms * edges_per_atom).sum()),
        }

    def settle(self, specs: Mapping[str, FieldSpec], asked: Mapping[str, str]) -> dict[str, str]:
        """Return signal -> encoding as the store will have it, `CHOOSE` where that is still to be found.

        Raises
        ------
        CacheError
            If values of a signal are stored with another shape or encoding than asked for.
        """
        settled = dict(asked)
        for name, known in self.declared.items():
            if asked[name] == CHOOSE:
                settled[name] = known.encoding
            if self.is_stored(name) and not known.same_as(specs[name], settled[name]):
                raise CacheError(
                    f"{self.path}: {name} is stored as {known.encoding} {known.spec.shape}, asked for "
                    f"{settled[name]} {specs[name].shape}; ask for what is stored, or give the teacher "
                    "another name (--name)"
                )
        return settled


def find_store(store: Store, teacher: str, provenance: dict[str, Any], signals: list[str]) -> PlannedStore:
    """Return what a store holds of a teacher's signals.

    Raises
    ------
    CacheError
        If the store knows another teacher of this name.
    """
    if teacher in store.teachers:
        require_same(store.path, teacher, provenance)
    declared = store.find_signals(teacher, signals)
    systems, n_shards = store.systems, store.plan.n_shards
    return PlannedStore(
        path=store.path,
        n_systems=np.bincount(systems.shard, minlength=n_shards),
        n_atoms=_sums(systems.shard, systems.n_atoms),
        systems_per_shard=store.plan.packing.systems_per_shard,
        n_bytes=n_bytes_below(store.path),
        declared=declared,
        missing={s: store.missing_shards(signal_group(teacher, s)) for s in declared},
    )


def future_store(path: Path, n_atoms: NDArray[np.int32]) -> PlannedStore:
    """Return the store that systems of these sizes (S,) will make."""
    packing, places = pack(n_atoms, choose_rows_per_shard(n_atoms))
    return PlannedStore(
        path=path,
        n_systems=np.bincount(places.shard),
        n_atoms=_sums(places.shard, n_atoms),
        systems_per_shard=packing.systems_per_shard,
    )


def _sums(shard: NDArray[np.int32], n_atoms: NDArray[np.int32]) -> NDArray[np.int64]:
    return np.bincount(shard, weights=n_atoms).astype(np.int64)


def _whole_chunks(rows: NDArray[Any]) -> NDArray[np.float64]:
    return np.ceil(rows / CHUNK_ROWS) * CHUNK_ROWS
