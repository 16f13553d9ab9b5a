"""`kd cache merge`: one store of several: parts of a data set, other signals of the same systems, or both."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from molkd.cache_schema.collecting import (
    Filling,
    create_from,
    declare,
    describe_labels,
    row_bytes,
    signal_of,
)
from molkd.cache_schema.errors import CacheError
from molkd.cache_schema.groups import ATOMS
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.regroup import Origins
from molkd.cache_schema.teachers import identity
from molkd.cache_schema.writer import Store
from molkd.pipeline.data.lineage import PARENTS, merged_parents
from molkd.pipeline.encoding_options import parse_encodings
from molkd.pipeline.sharing.copying import NO_SIGNALS, encoding_of, fill, wanted_signals
from molkd.pipeline.sharing.duplicates import one_of_each, places_of

log = logging.getLogger(__name__)

_JOINED = ("licence", "citation")


@dataclass(frozen=True)
class MergeSummary:
    """What a merged store holds, and what it does not."""

    store: str
    n_systems: int
    n_atoms: int
    n_duplicates: int  # systems dropped because another store has them too
    signals: dict[str, str]  # teacher/signal -> encoding
    encoded_anew: list[str]
    left_out: list[str]  # signals that some systems do not have, and whose these are
    bytes_written: int
    seconds: float


def merge_stores(
    parts: Sequence[str | Path],
    target: Path,
    *,
    teacher: str | None = None,
    signals: Sequence[str] = (),
    encoding: Sequence[str] = (),
    on_conflict: Literal["error", "first"] = "error",
) -> MergeSummary:
    """Put the systems of several stores into one, with the signals that all of them have.

    A system that several stores hold is taken once. A signal goes along if every system has it in one store
    or another, from a teacher with the same weights. The same call again continues.

    Parameters
    ----------
    teacher : whose signals, whatever its name in other stores; None takes those of all
    signals, encoding : as `copy_store`; a signal named here must be there for every system
    on_conflict : what to do where labels of the same system differ

    Raises
    ------
    CacheError
        If teachers of one name differ, a signal asked for is missing somewhere, or the target is another
        store.
    DataError
        If labels of the same system differ.
    IntegrityError
        If a store is damaged, naming file and shard.
    """
    began = time.perf_counter()
    if target.resolve() in [Path(part).resolve() for part in parts]:
        raise CacheError(f"{target}: is one of the stores to be merged; choose another place")
    with ExitStack() as stack:
        caches = tuple(stack.enter_context(Cache.open(part)) for part in parts)
        for cache in caches:
            cache.require()
        offers = _offers(caches, teacher, signals)
        general, named = parse_encodings(encoding, sorted({signal for _, signal in offers}))
        chosen, n_duplicates = one_of_each(caches, on_conflict=on_conflict)
        store, origins = _create(target, caches, chosen)
        fillings = [Filling(ATOMS, origins, (ATOMS,) * len(caches), decode=False)]
        left_out = []
        for (owner, signal), groups in offers.items():
            source, missing = _cover(store, caches, groups)
            if missing and signal in signals:
                raise CacheError(
                    f"{owner}/{signal}: {missing}; run kd cache-teacher there with --signals {signal}, "
                    "or leave the signal out"
                )
            if missing:
                log.warning("left out: %s/%s, %s", owner, signal, missing)
                left_out.append(f"{owner}/{signal}: {missing}")
                continue
            names = tuple(groups[caches.index(cache)] for cache in source.caches)
            store.add_teacher(owner, source.caches[0].teachers[names[0].split("/")[1]].provenance)
            stored = [c.state(name).group.signal for c, name in zip(source.caches, names, strict=True)]
            widest = max(stored, key=lambda one: row_bytes(one.spec, one.encoding))
            asked = encoding_of(widest, named.get(signal), general)
            fillings.append(declare(store, owner, source, names, asked))
        n_bytes = fill(store, fillings, "merge")
    return MergeSummary(
        store=str(target),
        n_systems=store.plan.packing.n_systems,
        n_atoms=store.plan.packing.n_atoms,
        n_duplicates=n_duplicates,
        signals={signal_of(f.group): store.signal(f.group).encoding for f in fillings[1:]},
        encoded_anew=[signal_of(f.group) for f in fillings if f.decode],
        left_out=left_out,
        bytes_written=n_bytes,
        seconds=time.perf_counter() - began,
    )


def _offers(
    caches: Sequence[Cache], teacher: str | None, signals: Sequence[str]
) -> dict[tuple[str, str], dict[int, str]]:
    """Return (teacher, signal) -> number of each store that has it -> its group there."""
    if tuple(signals) == (NO_SIGNALS,):
        return {}
    offers: dict[tuple[str, str], dict[int, str]] = {}
    for k, owner, name in _owners(caches, teacher):
        for group in wanted_signals(caches[k], owner, ()):
            signal = group.split("/", 2)[2]
            if not signals or signal in signals:
                offers.setdefault((name, signal), {})[k] = group
    absent = [s for s in signals if s not in {signal for _, signal in offers}]
    if absent:
        raise CacheError(f"{_paths(caches)}: no signal {', '.join(absent)} in any of them")
    return offers


def _owners(caches: Sequence[Cache], teacher: str | None) -> Iterator[tuple[int, str, str]]:
    """Yield the number of a store, the name of a teacher there, and the name it gets.

    Teachers are the same if their weights and the like are. Then the name is the one asked for, or that in
    the first store; but two that one store tells apart stay two.
    """
    known: dict[str, str] = {}  # name -> identity
    if teacher is not None:
        holders = [cache for cache in caches if teacher in cache.teachers]
        if not holders:
            names = sorted({name for cache in caches for name in cache.teachers})
            raise CacheError(
                f"{_paths(caches)}: no teacher {teacher}; they have {', '.join(names) or 'none'}"
            )
        known[teacher] = identity(holders[0].teachers[teacher].provenance)
    for k, cache in enumerate(caches):
        taken = set(cache.teachers)
        for owner, entry in cache.teachers.items():
            own = identity(entry.provenance)
            same = [name for name, other in known.items() if other == own and name not in taken]
            name = same[0] if same and owner not in known else owner
            if teacher not in (None, name):
                continue
            if known.setdefault(name, own) != own:
                weights = str(entry.provenance.get("weights_sha256"))[:16]
                raise CacheError(
                    f"{cache.path}: its teacher {owner} is another one than {owner} in a store before "
                    f"(weights {weights}...); cache one of them under another name "
                    "(kd cache-teacher --name), or leave signals out (--signals none)"
                )
            taken.add(name)
            yield k, owner, name


def _create(target: Path, caches: tuple[Cache, ...], chosen: Origins) -> tuple[Store, Origins]:
    first = caches[0]
    same_plan = all(cache.plan.sha256 == first.plan.sha256 for cache in caches)
    dataset: dict[str, Any] = first.dataset
    if not same_plan:
        shared = {k: v for k, v in first.dataset.items() if all(c.dataset.get(k) == v for c in caches)}
        joined = {
            key: "; ".join(dict.fromkeys(str(c.dataset[key]) for c in caches if c.dataset.get(key)))
            for key in _JOINED
        }
        merged: dict[str, Any] = {"merged_from": [cache.fingerprint for cache in caches]}
        shared.pop(PARENTS, None)
        if parents := merged_parents(caches):
            merged[PARENTS] = parents
        dataset = shared | joined | describe_labels(chosen) | merged
        dataset.pop("n_duplicates_dropped", None)
    return create_from(
        target,
        chosen,
        dataset=dataset,
        seed=first.plan.seed,
        rows_per_shard=first.plan.packing.rows_per_shard if same_plan else None,
    )


def _cover(store: Store, caches: Sequence[Cache], groups: dict[int, str]) -> tuple[Origins, str]:
    """Return where each system's rows of a signal lie, and what is missing, in words."""
    n_systems = store.plan.packing.n_systems
    owner, index = np.full(n_systems, -1), np.full(n_systems, -1, dtype=np.int64)
    is_bad = np.zeros(n_systems, dtype=bool)
    for place, (k, group) in enumerate(groups.items()):
        cache, state = caches[k], caches[k].state(group)
        own = places_of(store.systems.id, cache.ids)  # (S,)
        there = own >= 0
        there[there] = ~np.isin(cache.systems.shard[own[there]], state.missing_shards)
        bad = np.isin(own, sorted(state.bad_systems))
        better = there & ((owner < 0) | (is_bad & ~bad))  # a store that did not give the system up
        owner[better], index[better], is_bad[better] = place, own[better], bad[better]
    used = [place for place in range(len(groups)) if (owner == place).any()]
    members = tuple(caches[k] for k in groups)
    renumber = np.full(len(groups) + 1, -1)  # the last one is of systems without
    renumber[used] = np.arange(len(used))
    origins = Origins(tuple(members[place] for place in used), renumber[owner], index)
    lacking = owner < 0
    if not lacking.any():
        return origins, ""
    have_no = [
        f"{n:,} of the systems of {cache.path}"
        for cache in caches
        if (n := int((places_of(store.systems.id[lacking], cache.ids) >= 0).sum()))
    ]
    return origins, f"missing for {' and '.join(have_no)}"


def _paths(caches: Sequence[Cache]) -> str:
    return ", ".join(str(cache.path) for cache in caches)
