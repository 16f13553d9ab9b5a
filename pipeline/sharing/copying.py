"""`kd cache copy`: a whole store or a part of it, as it is stored or in a narrower encoding."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from molkd.cache_schema.collecting import (
    Filling,
    create_from,
    declare,
    describe_labels,
    row_bytes,
    signal_of,
)
from molkd.cache_schema.encoding import encoding_for
from molkd.cache_schema.errors import CacheError
from molkd.cache_schema.groups import ATOMS
from molkd.cache_schema.manifest import finalize_if_complete
from molkd.cache_schema.overlay import OVERLAY
from molkd.cache_schema.publishing import PublishSummary
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.regroup import Origins, fill_group
from molkd.cache_schema.remote import is_url, publish
from molkd.cache_schema.signal import Signal
from molkd.cache_schema.state import require_complete
from molkd.cache_schema.writer import Store
from molkd.pipeline.encoding_options import parse_encodings
from molkd.pipeline.progress import Progress
from molkd.pipeline.sharing.selection import Selection

log = logging.getLogger(__name__)

NO_SIGNALS = "none"  # among the signals asked for: structures and labels only
# What a store says about the very systems that it was made of; of some of them other figures hold.
_COUNTS = ("n_duplicates_dropped", "n_with_energy", "n_with_forces")


@dataclass(frozen=True)
class CopySummary:
    """What a copy holds, and what this call did."""

    store: str
    n_systems: int
    n_atoms: int
    signals: dict[str, str]  # teacher/signal -> encoding
    encoded_anew: list[str]
    bytes_written: int
    seconds: float


def copy_store(
    source: str | Path,
    target: Path,
    *,
    teacher: str | None = None,
    signals: Sequence[str] = (),
    selection: Selection | None = None,
    encoding: Sequence[str] = (),
) -> CopySummary:
    """Copy a store or a part of it; the same call again continues, finished shards are kept.

    Parameters
    ----------
    teacher : whose signals; None takes those of all
    signals : names of them, () all, `NO_SIGNALS` none
    selection : of the systems
    encoding : "int8" for all features or "node=int8", narrower than the stored one

    Raises
    ------
    CacheError
        If what is asked for is not there or not finished, or the target is another store.
    IntegrityError
        If the source is damaged, naming file and shard; nothing of that shard is committed.
    """
    began = time.perf_counter()
    if Path(source).resolve() == target.resolve():
        raise CacheError(f"{target}: is the store to be copied; choose another place")
    with Cache.open(source) as cache:
        wanted = wanted_signals(cache, teacher, signals)
        for group in (ATOMS, *wanted):
            state = cache.state(group)
            require_complete(state.root, state)
        names = {group.split("/", 2)[2] for group in wanted}
        general, named = parse_encodings(encoding, sorted(names))
        store, origins = _create(cache, target, selection or Selection())
        fillings = [Filling(ATOMS, origins, (ATOMS,), decode=False)]
        for group in wanted:
            _, owner, signal = group.split("/", 2)
            store.add_teacher(owner, cache.teachers[owner].provenance)
            wanted_encoding = encoding_of(cache.signal(owner, signal), named.get(signal), general)
            fillings.append(declare(store, owner, origins, (group,), wanted_encoding))
        n_bytes = fill(store, fillings, "copy")
    return CopySummary(
        store=str(target),
        n_systems=store.plan.packing.n_systems,
        n_atoms=store.plan.packing.n_atoms,
        encoded_anew=[signal_of(f.group) for f in fillings if f.decode],
        signals={signal_of(f.group): store.signal(f.group).encoding for f in fillings[1:]},
        bytes_written=n_bytes,
        seconds=time.perf_counter() - began,
    )


def send_store(source: str | Path, url: str) -> PublishSummary:
    """Publish a finished store as it is; the same call again sends what is missing.

    Raises
    ------
    CacheError, IntegrityError
        As `remote.publish`.
    """
    if is_url(source):
        raise CacheError(f"{source}: is on a server itself; copy it to a folder, then that one to {url}")
    if (Path(source) / OVERLAY).exists():
        raise CacheError(f"{source}: is an overlay; copy it to a folder, then that one to {url}")
    with Progress(0, "send", "byte") as progress:
        return publish(source, url, progress.advance_to)


def wanted_signals(cache: Cache, teacher: str | None, signals: Sequence[str]) -> list[str]:
    """Return the groups of the signals asked for.

    Raises
    ------
    CacheError
        If there is no such teacher, or no teacher has a signal of that name.
    """
    if teacher is not None and teacher not in cache.teachers:
        raise CacheError(f"{cache.path}: no teacher {teacher}; it has {', '.join(cache.teachers) or 'none'}")
    if tuple(signals) == (NO_SIGNALS,):
        return []
    owners = [teacher] if teacher is not None else list(cache.teachers)
    there = {(owner, name): None for owner in owners for name in cache.teachers[owner].signals}
    known = {name for _, name in there}
    unknown = [name for name in signals if name not in known]
    if unknown:
        raise CacheError(
            f"{cache.path}: no signal {', '.join(unknown)}; it has {', '.join(sorted(known)) or 'none'}"
        )
    return [f"teachers/{owner}/{name}" for owner, name in there if not signals or name in signals]


def fill(store: Store, fillings: Sequence[Filling], label: str) -> int:
    """Write what is missing in the groups, finish the store if that completes it, and return the bytes."""
    missing = {f.group: store.missing_shards(f.group) for f in fillings}
    n_systems = sum(len(store.systems_of_shard(s)) for shards in missing.values() for s in shards)
    n_bytes = 0
    with Progress(n_systems, label, "system") as progress:
        for f in fillings:
            n_bytes += fill_group(
                store, f.group, f.origins, f.names, decode=f.decode, on_systems=progress.update
            )
    if not finalize_if_complete(store):
        log.info("%s: other signals are unfinished, so no manifest yet", store.path)
    return n_bytes


def encoding_of(signal: Signal, named: str | None, general: str) -> str | None:
    """Return the encoding to take; the general one only where it is narrower."""
    if named is not None:
        return encoding_for(signal.spec, named)
    spec = signal.spec
    wanted = encoding_for(spec, general) if general else signal.encoding
    return wanted if row_bytes(spec, wanted) < row_bytes(spec, signal.encoding) else None


def _create(cache: Cache, target: Path, selection: Selection) -> tuple[Store, Origins]:
    plan = cache.plan
    everything = selection.is_everything
    chosen = np.arange(cache.n_systems) if everything else selection.apply(cache)
    everything = everything or len(chosen) == cache.n_systems
    origins = Origins((cache,), np.zeros_like(chosen), chosen)
    dataset: dict[str, Any] = cache.dataset
    if not everything:
        log.info("%d of %d systems: %s", len(chosen), cache.n_systems, selection.words())
        kept = {key: value for key, value in cache.dataset.items() if key not in _COUNTS}
        dataset = kept | describe_labels(origins) | {"chosen_from": cache.fingerprint}
    return create_from(
        target,
        origins,
        dataset=dataset,
        seed=plan.seed,
        rows_per_shard=plan.packing.rows_per_shard if everything else None,
    )
