"""One pass over a subset in random order: permuted blocks, shuffled within a window, cut into batches.

The store's order is random already, so this is as good as a full shuffle, and every block is one run of rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.errors import CacheError
from molkd.cache_schema.fields import SYSTEM_FIELDS
from molkd.cache_schema.layout import SCALE
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.shard_reader import ArrayReader

BLOCK_ATOMS = 16_384  # a checksum is that of 1,024 atoms: of longer blocks little is read in vain
WINDOW_BLOCKS = 8
WIDE_BYTES = 512  # where rows are as long as this a system is worth a read of its own
_PARTS = 16


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """The batches of one epoch for one rank; iterating gives stored indices (B,) batch by batch."""

    order: NDArray[np.int64]  # systems in the order they are used
    window_ptr: NDArray[np.int64]  # systems order[window_ptr[w]:window_ptr[w+1]] are read together
    batch_ptr: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.batch_ptr) - 1

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        return self.batches()

    def batches(self, start: int = 0) -> Iterator[NDArray[np.int64]]:
        """Yield the batches from number `start` on."""
        for begin, end in zip(self.batch_ptr[start:-1], self.batch_ptr[start + 1 :], strict=True):
            yield self.order[begin:end]

    @property
    def windows(self) -> list[NDArray[np.int64]]:
        """The systems that are read together."""
        return [self.order[b:e] for b, e in pairwise(self.window_ptr)]


def iterate_epoch(
    cache: Cache,
    *,
    subset: NDArray[np.bool_] | None = None,
    batch_size: int,
    seed: int,
    epoch: int,
    block_atoms: int = BLOCK_ATOMS,
    window_blocks: int = WINDOW_BLOCKS,
    rank: int = 0,
    world_size: int = 1,
    drop_last: bool = False,
) -> EpochPlan:
    """Plan an epoch; the same arguments give the same batches.

    Every system of the subset is used once, by one rank. All ranks have the same number of batches.

    Parameters
    ----------
    subset : (S,) mask over stored systems; all if None
    block_atoms : atoms read in one run, about
    window_blocks : blocks held in memory and shuffled together
    drop_last : leave out what does not fill a batch, so that all batches have `batch_size` systems

    Raises
    ------
    CacheError
        If sizes make no sense, there are fewer systems than ranks, or batches of one do not come out even.
    """
    if batch_size < 1 or block_atoms < 1 or window_blocks < 1 or not 0 <= rank < world_size:
        raise CacheError(
            f"batch size {batch_size}, block {block_atoms} atoms, window {window_blocks} blocks, "
            f"rank {rank} of {world_size}: sizes must be positive and the rank below the number of ranks"
        )
    chosen = np.arange(cache.n_systems) if subset is None else np.flatnonzero(_check_mask(cache, subset))
    if len(chosen) < world_size:
        raise CacheError(
            f"{cache.path}: {len(chosen)} systems for {world_size} ranks; each needs at least one"
        )
    if batch_size == 1 and len(chosen) % world_size and not drop_last:
        raise CacheError(
            f"{cache.path}: {len(chosen)} systems one by one on {world_size} ranks cannot give each rank the "
            "same number of batches; take a larger batch size, or drop the last ones"
        )
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    order, block_ptr = _permute_blocks(chosen, cache.system_n_atoms[chosen], block_atoms, generator)

    begin, end = (len(order) * r // world_size for r in (rank, rank + 1))
    inner = block_ptr[(block_ptr > begin) & (block_ptr < end)]
    block_ptr = np.concatenate([[begin], inner, [end]]) - begin
    window_ptr = np.append(block_ptr[:-1:window_blocks], block_ptr[-1])
    order = order[begin:end].copy()
    own = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, rank])))
    for first, last in pairwise(window_ptr):
        own.shuffle(order[first:last])
    counts = [len(chosen) * (r + 1) // world_size - len(chosen) * r // world_size for r in range(world_size)]
    return EpochPlan(order, window_ptr, _batch_ptr(end - begin, counts, batch_size, drop_last))


def _permute_blocks(
    chosen: NDArray[np.int64], n_atoms: NDArray[np.int32], block_atoms: int, generator: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut systems into blocks of about `block_atoms` and permute these; return systems and block borders."""
    middle = np.cumsum(n_atoms, dtype=np.int64) - n_atoms / 2
    block = (middle // block_atoms).astype(np.int64)
    begins = np.flatnonzero(np.diff(block, prepend=-1))
    blocks = np.split(chosen, begins[1:])
    permuted = [blocks[k] for k in generator.permutation(len(blocks))]
    return np.concatenate(permuted), np.cumsum([0, *(len(b) for b in permuted)])


def _batch_ptr(n: int, counts: list[int], batch_size: int, drop_last: bool) -> NDArray[np.int64]:
    if drop_last:
        return np.arange(min(counts) // batch_size + 1, dtype=np.int64) * batch_size
    n_batches = -(-max(counts) // batch_size)
    ptr = np.minimum(np.arange(n_batches + 1, dtype=np.int64) * batch_size, n)
    # Ranks differ by at most one system; where that is one batch, the last full batch gives one system away.
    if n_batches and ptr[-2] == n:
        ptr[-2] = n - 1
    return ptr


def _check_mask(cache: Cache, subset: NDArray[np.bool_]) -> NDArray[np.bool_]:
    if subset.shape != (cache.n_systems,) or subset.dtype != np.bool_:
        raise CacheError(
            f"{cache.path}: subset is {subset.dtype} {subset.shape}, expected bool {(cache.n_systems,)}"
        )
    return subset


def read_epoch(
    cache: Cache,
    plan: EpochPlan,
    *,
    fields: Sequence[str],
    teacher: str | None = None,
    signals: Sequence[str] = (),
    start_batch: int = 0,
    decode: bool = True,
) -> Iterator[tuple[NDArray[np.int64], dict[str, NDArray[Any]]]]:
    """Yield stored indices (B,) and arrays, as `Cache.read`, batch by batch from `start_batch` on.

    Narrow arrays are read by the window, at once and in stored order, and kept. Wide ones, where a system is
    a run of bytes long enough, are read batch by batch straight to their place: copied once. While one window
    is used the system is told to fetch the next, so that a disk works in long runs, whatever the batches.

    Parameters
    ----------
    decode : as `Cache.read`

    Raises
    ------
    CacheError, IntegrityError
        As `Cache.read`.
    """
    arrays = cache.arrays(fields, teacher, signals)
    wide = {name: array for name, array in arrays.items() if array.layout.row_bytes >= WIDE_BYTES}
    narrow = {name: array for name, array in arrays.items() if name not in wide}
    on_systems = [name for name in fields if name in SYSTEM_FIELDS]
    on_edges = [name for name in signals if f"teacher/{name}" not in arrays]
    ahead = _Ahead(plan, cache, narrow, wide)
    window = -1
    held: _Window | None = None
    for begin, end in zip(plan.batch_ptr[start_batch:-1], plan.batch_ptr[start_batch + 1 :], strict=True):
        parts = []
        place = int(begin)
        while place < end:
            if held is None or place >= plan.window_ptr[window + 1]:
                held = None  # let go of the old window before the next one is read
                window = int(np.searchsorted(plan.window_ptr, place, side="right")) - 1
                ahead.enter(window)
                systems = plan.order[plan.window_ptr[window] : plan.window_ptr[window + 1]]
                held = _Window(cache, systems, narrow)
            stop = min(int(end), int(plan.window_ptr[window + 1]))
            parts.append(held.take(plan.order[place:stop]))
            place = stop
        batch = plan.order[begin:end]
        ahead.use(place)
        out = parts[0] if len(parts) == 1 else {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
        out |= cache.read_arrays(batch, wide)
        out |= cache.read(batch, on_systems, teacher, on_edges, decode=False)
        yield batch, decoded(cache, teacher, signals, out) if decode else out


class _Ahead:
    """Announces the systems of the next window while one is used.

    Narrow arrays, which a window reads first and whole, are announced at once; wide ones a part after each
    share of the batches, so that they do not crowd out what is needed earlier.
    """

    def __init__(
        self,
        plan: EpochPlan,
        cache: Cache,
        narrow: Mapping[str, ArrayReader],
        wide: Mapping[str, ArrayReader],
    ) -> None:
        self._windows, self._ptr = plan.windows, plan.window_ptr
        self._cache, self._narrow, self._wide = cache, narrow, wide
        self._announced = -1  # the last window of which all is announced, or being so
        self._parts: list[NDArray[np.int64]] = []
        self._window = 0

    def enter(self, window: int) -> None:
        """Begin with a window: announce what of it has not been, and get the next one ready."""
        if self._announced != window:
            self._parts = [np.sort(self._windows[window])]
            self._cache.announce(self._parts[0], self._narrow)
        for part in self._parts:
            self._cache.announce(part, self._wide)
        self._window, self._announced = window, window + 1
        last = window + 1 == len(self._windows)
        following = np.empty(0, np.int64) if last else np.sort(self._windows[window + 1])
        self._cache.announce(following, self._narrow)
        self._parts = np.array_split(following, _PARTS)

    def use(self, place: int) -> None:
        """Announce as much of the next window as is used of this one, up to system `place` of the order."""
        begin, end = self._ptr[self._window], self._ptr[self._window + 1]
        left = int(_PARTS * (end - place) // max(end - begin, 1))
        while len(self._parts) > left:
            self._cache.announce(self._parts.pop(0), self._wide)


def decoded(
    cache: Cache, teacher: str | None, signals: Sequence[str], arrays: dict[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """Return arrays read with ``decode=False`` with the values of the signals, and without their scales."""
    if teacher is None:
        return arrays
    out = dict(arrays)
    for name in signals:
        stored = {"values": arrays[f"teacher/{name}"]}
        if f"teacher/{name}/{SCALE}" in out:
            stored[SCALE] = out.pop(f"teacher/{name}/{SCALE}")
        out[f"teacher/{name}"] = cache.signal(teacher, name).decode(stored)
    return out


class _Window:
    """Arrays of some systems in memory, in stored order."""

    def __init__(self, cache: Cache, systems: NDArray[np.int64], arrays: Mapping[str, ArrayReader]) -> None:
        self.systems = np.sort(systems)
        self.arrays = cache.read_arrays(self.systems, arrays)
        self.n_atoms = cache.system_n_atoms[self.systems].astype(np.int64)
        self.first_atom = np.cumsum(self.n_atoms, dtype=np.int64) - self.n_atoms
        self.on_atoms = {name for name, array in arrays.items() if array.layout.spec.axis == "atom"}

    def take(self, systems: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Return the arrays of some of them in the given order."""
        place = self.systems.searchsorted(systems)
        count = self.n_atoms[place]
        shift = self.first_atom[place] - (np.cumsum(count, dtype=np.int64) - count)
        rows: NDArray[np.int64] = np.arange(int(count.sum())) + shift.repeat(count)
        return {
            n: values.take(rows if n in self.on_atoms else place, axis=0) for n, values in self.arrays.items()
        }
