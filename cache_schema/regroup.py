"""Rows of other stores into the shards of a new one, as stored or decoded; every chunk is checked."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.codebook import Codebook
from molkd.cache_schema.fields import ATOM_FIELDS, EDGE_INDEX, N_EDGES, FieldSpec
from molkd.cache_schema.groups import ATOMS, load_commit
from molkd.cache_schema.layout import split_signal_group
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.statistics import Moments, measure, n_channels
from molkd.cache_schema.writer import Store

_PIECE_BYTES = 4 << 20  # of values in memory at a time
_ATOM_BYTES = 32  # of all fields of an atom

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Origins:
    """Where each system of a new store comes from.

    Attributes
    ----------
    caches : the stores
    cache : (S,) for each system, in the new store's order, which of them
    index : (S,) its stored index there
    """

    caches: tuple[Cache, ...]
    cache: NDArray[np.int64]
    index: NDArray[np.int64]

    def in_each(self, systems: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield every store that some of the systems (n,) come from, and the places (m,) of these."""
        owner = self.cache[systems]
        for k in np.unique(owner):
            yield int(k), np.flatnonzero(owner == k)


def fill_group(
    store: Store,
    group: str,
    origins: Origins,
    names: Sequence[str],
    *,
    decode: bool = False,
    on_systems: Callable[[int], object] | None = None,
) -> int:
    """Write the missing shards of a group from other stores.

    Parameters
    ----------
    names : the group's name in each of the stores
    decode : read values and encode them anew; else rows go over as they are stored
    on_systems : called with the number of systems just written

    Returns
    -------
    int
        Bytes written.

    Raises
    ------
    CacheError
        If a store lacks a shard, or the disk is full.
    IntegrityError
        If stored bytes are damaged, naming file and shard.
    """
    n_bytes = 0
    for shard in store.missing_shards(group):
        systems = np.asarray(store.systems_of_shard(shard), dtype=np.int64)
        recorded = None if decode else _recorded_sums(store, shard, origins, names)
        with store.shard_writer(group, shard) as writer:
            for part in pieces(systems, store.systems.n_atoms, origins, names):
                bad = bad_systems(origins, names, part)
                rows = read_rows(origins, names, part, decode=decode)
                if decode:
                    writer.write(rows, bad)
                elif recorded is not None:
                    writer.write_narrowed(rows, recorded, bad)
                    recorded = {}  # those of the whole shard are in
                else:
                    writer.write_narrowed(rows, _carried_sums(store, group, part, rows, origins, names), bad)
                if on_systems is not None:
                    on_systems(len(part))
        n_bytes += writer.n_bytes
    return n_bytes


def read_rows(origins: Origins, names: Sequence[str], systems: NDArray[np.int64], *, decode: bool) -> Arrays:
    """Return the arrays of a group for some systems (n,), as `ShardWriter` takes them.

    Parameters
    ----------
    names : of the group in each store
    decode : give the values of a signal, without a scale

    Raises
    ------
    CacheError, IntegrityError
        As `Cache.read`.
    """
    parts = []
    for k, places in origins.in_each(systems):
        cache, index = origins.caches[k], origins.index[systems[places]]
        parts.append((places, _read(cache, names[k], index, decode=decode)))
    if len(parts) == 1:
        return parts[0][1][0]
    counts = {name: np.zeros(len(systems), np.int64) for name in parts[0][1][1]}  # rows of each system
    for places, (_, part_counts) in parts:
        for name, count in part_counts.items():
            counts[name][places] = count
    out: Arrays = {}
    for name, count in counts.items():
        begin = np.cumsum(count) - count
        first = parts[0][1][0][name]
        rows = np.empty((int(count.sum()), *first.shape[1:]), first.dtype)
        for places, (arrays, _) in parts:
            rows[ranges(begin[places], count[places])] = arrays[name]
        out[name] = rows
    return out


def pieces(
    systems: NDArray[np.int64],
    n_atoms: NDArray[np.integer[Any]],
    origins: Origins,
    names: Sequence[str],
) -> Iterator[NDArray[np.int64]]:
    """Cut systems (n,) so that the values of a piece take a bounded amount of memory.

    Parameters
    ----------
    n_atoms : (S,) of all systems of `origins`
    names : of the group in each store
    """
    per_atom = float(_ATOM_BYTES)
    for cache, name in zip(origins.caches, names, strict=True):
        state = cache.state(name)
        if name != ATOMS:
            spec = state.group.signal.spec
            rows = sum(files["values"].rows for files in state.files.values()) / cache.n_atoms
            per_atom = max(per_atom, rows * float(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize)
    ends = np.cumsum(n_atoms[systems], dtype=np.int64) * per_atom
    piece = ((ends - 1) // _PIECE_BYTES).astype(np.int64)
    borders = [0, *(np.flatnonzero(np.diff(piece)) + 1).tolist(), len(systems)]
    for begin, end in pairwise(borders):
        yield systems[begin:end]


def bad_systems(origins: Origins, names: Sequence[str], systems: NDArray[np.int64]) -> list[int]:
    """Return those of the systems (n,) that were given up in the store they come from."""
    bad: list[int] = []
    for k, places in origins.in_each(systems):
        given_up = sorted(origins.caches[k].state(names[k]).bad_systems)
        bad += systems[places][np.isin(origins.index[systems[places]], given_up)].tolist()
    return sorted(bad)


def carried_codebook(origins: Origins, codebooks: Sequence[Codebook]) -> Codebook:
    """Return the codebook that all stores share; behind its first systems none was fitted to.

    Parameters
    ----------
    codebooks : of each store, the same but for the number of systems
    """
    n_fitted = np.array([book.n_systems for book in codebooks])
    fitted = np.flatnonzero(origins.index < n_fitted[origins.cache])
    return replace(codebooks[0], n_systems=int(fitted[-1]) + 1 if len(fitted) else 0)


def ranges(begin: NDArray[np.int64], count: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the numbers [begin, begin + count) of every run, one run after the other."""
    shift = begin - (np.cumsum(count) - count)
    rows: NDArray[np.int64] = np.arange(int(count.sum())) + np.repeat(shift, count)
    return rows


def _read(
    cache: Cache, group: str, index: NDArray[np.int64], *, decode: bool
) -> tuple[Arrays, dict[str, NDArray[np.int64]]]:
    """Return arrays of a group, and how many rows each of the systems (n,) has in them."""
    n_atoms = cache.system_n_atoms[index].astype(np.int64)
    if group == ATOMS:
        arrays = cache.read(index, tuple(ATOM_FIELDS))
        del arrays["n_atoms"]
        return arrays, dict.fromkeys(arrays, n_atoms)
    teacher, signal = split_signal_group(group)
    read = cache.read(index, (), teacher, (signal,), decode=decode)
    arrays = {
        name.removeprefix(f"teacher/{signal}/"): rows for name, rows in read.items() if name != "n_atoms"
    }
    arrays["values"] = arrays.pop(f"teacher/{signal}")
    axis = cache.signal(teacher, signal).spec.axis
    if axis != "edge":
        return arrays, dict.fromkeys(arrays, n_atoms if axis == "atom" else np.ones_like(n_atoms))
    n_edges = arrays[N_EDGES.name].astype(np.int64)
    first_atom = np.repeat(np.cumsum(n_atoms) - n_atoms, n_edges)  # (E,)
    arrays[EDGE_INDEX.name] = (arrays[EDGE_INDEX.name].T - first_atom[:, None]).astype(EDGE_INDEX.dtype)
    arrays[N_EDGES.name] = n_edges.astype(N_EDGES.dtype)
    counts = dict.fromkeys(arrays, n_edges) | {N_EDGES.name: np.ones_like(n_edges)}
    return arrays, counts


def _recorded_sums(
    store: Store, shard: int, origins: Origins, names: Sequence[str]
) -> Mapping[str, Moments] | None:
    """Return the sums of a shard, by array, that a store of the same plan has committed.

    None if its systems come from several stores, or if there is no record, as in the mirror of a URL.
    """
    owner = origins.cache[store.systems_of_shard(shard)]
    cache, name = origins.caches[owner[0]], names[owner[0]]
    if cache.plan.sha256 != store.plan.sha256 or (owner != owner[0]).any():
        return None
    state = cache.state(name)
    commit = load_commit(state.root, cache.plan, state.group, shard)
    return None if commit is None else commit.moments


def _carried_sums(
    store: Store,
    group: str,
    systems: NDArray[np.int64],
    rows: Arrays,
    origins: Origins,
    names: Sequence[str],
) -> dict[str, Moments]:
    """Return sums over rows as stored, by array; their errors are a share of those that the stores know."""
    states = [cache.state(name) for cache, name in zip(origins.caches, names, strict=True)]
    signal = None if group == ATOMS else store.signal(group)
    carried = {}
    for name, layout in states[0].group.layouts.items():
        if layout.values is None:
            continue
        known = Moments.empty(layout.values)
        for state in states:
            known.merge(state.moments[name])
        values = rows[name] if signal is None else signal.decode(rows)
        held_out = None
        if signal is not None and signal.codebook is not None:
            n_atoms = store.systems.n_atoms[systems]
            count = {
                "system": np.ones_like(n_atoms),
                "atom": n_atoms,
                "edge": rows.get(N_EDGES.name, n_atoms),
            }
            held_out = np.repeat(systems >= signal.codebook.n_systems, count[layout.values.axis])
        carried[name] = _with_errors_of(known, values, held_out, layout.values)
    return carried


def _with_errors_of(
    known: Moments, values: NDArray[Any], held_out: NDArray[np.bool_] | None, spec: FieldSpec
) -> Moments:
    """Return sums over rows (n, *shape) as stored, their errors a share of the known ones."""
    if not len(values):
        return Moments.empty(spec)
    keep = np.isfinite(values).reshape(len(values), -1).all(axis=1)
    sums = measure(values, values, keep, None, n_channels(spec))
    if known.count:
        sums.error_max_abs = known.error_max_abs
        sums.error_sum_squares = known.error_sum_squares * (int(sums.count) / known.count)
    if held_out is not None and known.held_out_count:
        sums.held_out_count = int((keep & held_out).sum()) * (values[0].size // n_channels(spec))
        sums.held_out_error_max_abs = known.held_out_error_max_abs
        share = sums.held_out_count / known.held_out_count
        sums.held_out_error_sum_squares = known.held_out_error_sum_squares * share
    return sums
