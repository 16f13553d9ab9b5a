"""Signals on edges: a system has a row for each of its edges, and says how many and between which atoms."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.commit import rewrite_remedy
from molkd.cache_schema.errors import CacheError, IntegrityError
from molkd.cache_schema.fields import EDGE_INDEX, N_EDGES, FieldSpec
from molkd.cache_schema.plan import Systems
from molkd.cache_schema.runs import find_runs
from molkd.cache_schema.shard_reader import ArrayReader, FileCache
from molkd.cache_schema.shard_writer import ShardWriter
from molkd.cache_schema.state import GroupState


class EdgeShardWriter(ShardWriter):
    """Appends whole systems: their numbers of edges, and the rows of these edges."""

    def _known_rows(self) -> NDArray[np.int64]:
        return np.zeros(1, dtype=np.int64)  # grows with the systems that are written

    def _check(self, arrays: dict[str, NDArray[Any]], specs: dict[str, FieldSpec]) -> int:
        where = self._where
        self._check_shapes(arrays, specs, where)
        n_edges = np.asarray(arrays[N_EDGES.name])  # (n,)
        first = len(self._ptr) - 1
        last = first + len(n_edges)
        if last > len(self.systems):
            raise CacheError(f"{where}: {last} systems given, the shard has {len(self.systems)}")
        rows = {name: len(values) for name, values in arrays.items() if name != N_EDGES.name}
        if (n_edges < 0).any() or set(rows.values()) != {int(n_edges.sum())}:
            raise CacheError(f"{where}: {n_edges.sum()} edges in n_edges, but {rows}")
        n_atoms = np.repeat(self._n_atoms[first:last], n_edges)
        if not are_inside(arrays[EDGE_INDEX.name], n_atoms):
            raise CacheError(f"{where}: an edge between atoms that its system does not have")
        ends = self._ptr[-1] + np.cumsum(n_edges, dtype=np.int64)
        layout = self._group.layouts["values"]
        if len(ends) and ends[-1] > layout.rows_per_file:
            raise CacheError(
                f"{where}: {ends[-1]} edges, but the signal announced at most {layout.spec.max_per_atom} an "
                f"atom, which leaves room for {layout.rows_per_file}; the teacher has to announce more"
            )
        self._ptr = np.concatenate([self._ptr, ends])
        return int(n_edges.sum())

    def _check_bad(self, bad_systems: Collection[int]) -> set[int]:
        if any(i - self.systems.start >= len(self._ptr) - 1 for i in bad_systems):
            raise CacheError(f"{self._where}: a bad system is named with its own rows, or after them")
        return super()._check_bad(bad_systems)

    def _check_complete(self) -> None:
        n_written = len(self._ptr) - 1
        if n_written != len(self.systems):
            raise CacheError(
                f"{self._where}: {n_written} of {len(self.systems)} systems written; nothing is committed"
            )


class EdgeReader:
    """Reads the rows of a signal on edges by system."""

    def __init__(self, root: Path, state: GroupState, systems: Systems, files: FileCache) -> None:
        self._root, self._state, self._systems = root, state, systems
        self._arrays = {name: ArrayReader(root, state, name, files) for name in state.group.layouts}
        self._ptr: dict[int, NDArray[np.int64]] = {}  # shard -> where the edges of each of its systems begin

    def read(self, systems: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Return values as stored (E, ...), index (2, E), shift (E, 3) and n_edges (n,) of systems (n,).

        Atoms are numbered over all these systems one after the other.

        Raises
        ------
        CacheError
            If a shard is not committed.
        IntegrityError
            If bytes are damaged, or edges end at atoms that their system does not have.
        """
        begin, n_edges = np.empty(len(systems), np.int64), np.empty(len(systems), np.int64)
        shards = self._systems.shard[systems]
        rows_per_shard = self._state.group.layouts["values"].rows_per_file
        for shard in np.unique(shards):
            mine = np.flatnonzero(shards == shard)
            place = systems[mine] - self._systems.in_shard(int(shard)).start
            ptr = self._shard_ptr(int(shard))
            begin[mine] = int(shard) * rows_per_shard + ptr[place]
            n_edges[mine] = ptr[place + 1] - ptr[place]
        some = n_edges > 0  # a system without edges may seem to begin in the next shard
        runs = find_runs(begin[some], n_edges[some], rows_per_shard)
        arrays = {name: array.read(runs) for name, array in self._arrays.items() if name != N_EDGES.name}
        index, n_atoms = arrays[EDGE_INDEX.name], self._systems.n_atoms[systems]
        if not are_inside(index, np.repeat(n_atoms, n_edges)):
            raise IntegrityError(
                f"{self._root}: {self._state.group.name} has edges between atoms that their system does not "
                "have; kd cache verify names the shards"
            )
        first_atom = np.repeat(np.cumsum(n_atoms, dtype=np.int64) - n_atoms, n_edges)  # (E,)
        return arrays | {
            EDGE_INDEX.name: np.ascontiguousarray((index + first_atom[:, None]).T),
            N_EDGES.name: n_edges,
        }

    def _shard_ptr(self, shard: int) -> NDArray[np.int64]:
        if shard not in self._ptr:
            group, n_systems = self._state.group, len(self._systems.in_shard(shard))
            slots = group.layouts[N_EDGES.name].rows_per_file
            runs = find_runs(np.array([shard * slots]), np.array([n_systems]), slots)
            n_edges = self._arrays[N_EDGES.name].read(runs).astype(np.int64)
            rows = self._state.files[shard]["values"].rows
            if (n_edges < 0).any() or n_edges.sum() != rows:
                raise IntegrityError(
                    f"{self._root}: {N_EDGES.name} of shard {shard} of {group.name} does not add up to the "
                    f"{rows} edges of its record; {rewrite_remedy(group.name, shard)}"
                )
            self._ptr[shard] = np.concatenate([[0], np.cumsum(n_edges)])
        return self._ptr[shard]


def are_inside(index: NDArray[np.integer[Any]], n_atoms: NDArray[np.integer[Any]]) -> bool:
    """Say whether edges (E, 2) end at atoms of their system; `n_atoms` (E,) is its size."""
    return bool(((index >= 0) & (index < n_atoms[:, None])).all())
