"""The same system in several stores: keep one, prefer labels, refuse contradictions."""

import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.collecting import gather
from molkd.cache_schema.groups import ATOMS
from molkd.cache_schema.identity import ID_BYTES
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.regroup import Origins, pieces, read_rows
from molkd.pipeline.data.duplicates import resolve_duplicates
from molkd.pipeline.errors import DataError

log = logging.getLogger(__name__)

FORCE_TOLERANCE = 1e-5  # eV/A; the same calculation written with different numbers of digits
_MAX_SHOWN = 3


class _Names(Sequence[str]):
    """Names of systems for messages, made when they are needed."""

    def __init__(self, origins: Origins) -> None:
        self._origins = origins

    def __len__(self) -> int:
        return len(self._origins.index)

    def __getitem__(self, place: int) -> str:  # type: ignore[override]  # no slices
        cache, i = self._origins.caches[self._origins.cache[place]], int(self._origins.index[place])
        return f"{cache.path}: {cache.source_names[cache.source[i]]}#{cache.source_row[i]}"


def one_of_each(caches: tuple[Cache, ...], *, on_conflict: Literal["error", "first"]) -> tuple[Origins, int]:
    """Return every system of the stores once, from the store that has most labels, and how many are dropped.

    Raises
    ------
    DataError
        If labels, tags or fixed atoms of a system differ between stores, unless `on_conflict` is "first".
    """
    counts = [cache.n_systems for cache in caches]
    every = Origins(
        caches,
        np.repeat(np.arange(len(caches)), counts),
        np.concatenate([np.arange(n, dtype=np.int64) for n in counts]),
    )
    ids = gather(every, "id")
    _, group, size = np.unique(_keys(ids), return_inverse=True, return_counts=True)
    repeated = np.flatnonzero(size[group.reshape(-1)] > 1)
    has_forces = np.zeros(len(ids), dtype=bool)
    if len(repeated):
        has_forces[repeated] = _compare(every, repeated, group.reshape(-1), on_conflict)
    keep = resolve_duplicates(
        ids, gather(every, "energy"), has_forces, _Names(every), on_conflict=on_conflict
    )
    return Origins(caches, every.cache[keep], every.index[keep]), int((~keep).sum())


def _compare(
    every: Origins,
    repeated: NDArray[np.int64],
    group: NDArray[np.int64],
    on_conflict: Literal["error", "first"],
) -> NDArray[np.bool_]:
    """Return which of the repeated systems (n,) have forces; refuse what differs from the first equal one."""
    names = (ATOMS,) * len(every.caches)
    n_atoms = gather(every, "n_atoms").astype(np.int64)
    order = repeated[
        np.argsort(group[repeated], kind="stable")
    ]  # equal systems together, the first one first
    is_first = np.concatenate([[True], group[order][1:] != group[order][:-1]])
    first = order[np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))]  # (n,) of its group
    found: dict[int, bool] = {}
    differs: list[int] = []
    for part in pieces(np.arange(len(order)), n_atoms[order], every, names):
        ours = read_rows(every, names, order[part], decode=False)
        theirs = read_rows(every, names, first[part], decode=False)
        unequal = (np.abs(ours["forces"] - theirs["forces"]) > FORCE_TOLERANCE).any(axis=1)  # NaN: unknown
        unequal |= (ours["tags"] != theirs["tags"]) | (ours["fixed"] != theirs["fixed"])
        begin = np.cumsum(n_atoms[order[part]]) - n_atoms[order[part]]
        known = np.logical_or.reduceat(np.isfinite(ours["forces"]).any(axis=1), begin)
        found |= dict(zip(order[part].tolist(), known.tolist(), strict=True))
        differs += order[part][np.logical_or.reduceat(unequal, begin)].tolist()
    if differs:
        shown = "; ".join(_Names(every)[i] for i in differs[:_MAX_SHOWN])
        text = f"{len(differs)} systems have other forces, tags or fixed atoms elsewhere ({shown})"
        if on_conflict == "error":
            raise DataError(
                f"{text}; do not mix data of different methods, or let the first store count "
                "(--on-conflict first)"
            )
        log.warning("%s; the first store counts", text)
    return np.array([found[i] for i in repeated.tolist()])


def _keys(ids: NDArray[np.uint8]) -> NDArray[np.void]:
    keys: NDArray[np.void] = np.ascontiguousarray(ids).view(f"V{ID_BYTES}").reshape(-1)
    return keys


def places_of(ids: NDArray[np.uint8], others: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return for each id (n, 16) its row in `others` (m, 16), -1 if it is not there."""
    _, group = np.unique(_keys(np.concatenate([others, ids])), return_inverse=True)
    group = group.reshape(-1)
    row = np.full(int(group.max()) + 1, -1, dtype=np.int64)
    row[group[: len(others)]] = np.arange(len(others))
    places: NDArray[np.int64] = row[group[len(others) :]]
    return places
