"""`kd cache add`: a store with more systems; the teacher looks at the new ones only."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from molkd.cache_schema.errors import CacheError
from molkd.cache_schema.layout import PLAN
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.signal import Signal
from molkd.cache_schema.writer import Store
from molkd.pipeline.caching import cache_teacher
from molkd.pipeline.config import CacheConfig, IngestConfig, make_config
from molkd.pipeline.errors import ConfigError
from molkd.pipeline.ingest import ingest
from molkd.pipeline.sharing.merging import MergeSummary, merge_stores


@dataclass(frozen=True)
class AddSummary:
    """What a store with more systems holds."""

    store: str
    n_systems: int
    n_new: int  # of the data given; the others were there
    signals: dict[str, str]
    left_out: list[str]
    bytes_written: int


def add_systems(
    store: str | Path,
    data: str | Path,
    out: Path,
    *,
    teacher: str | None = None,
    name: str | None = None,
    on_conflict: Literal["error", "first"] = "error",
    reading: Mapping[str, Any] | None = None,
    running: Mapping[str, Any] | None = None,
) -> AddSummary:
    """Write a store with the systems of another one and those of `data`.

    The order and the packing of a store never change, so the result is a new one. The new systems go to a
    store of their own beside it, NAME.adding.kdcache, where the teacher runs over them with the signals,
    encodings and codebooks of `store`; then both are merged, and it is removed. The same call continues.

    Parameters
    ----------
    teacher : as for `cache_teacher`; needed if `store` holds signals
    name : of the teacher in `store`, if it has several; the signals of others are left out
    reading : more settings of `IngestConfig`
    running : more settings of `CacheConfig`

    Raises
    ------
    ConfigError
        If a teacher or its name is missing.
    CacheError, DataError, ModelError, TeacherError
        As `ingest`, `cache_teacher` and `merge_stores`.
    """
    part = out.with_name(f"{out.stem}.adding{out.suffix}")
    with Cache.open(store, complete=True) as cache:
        name = _teacher_name(cache, teacher, name)
        before, fingerprint = cache.n_systems, cache.fingerprint
        entry = cache.teachers[name] if name is not None else None
        signals = {s: cache.signal(name, s) for s in entry.signals} if name is not None and entry else {}
        provenance = entry.provenance if entry else {}
    ingest(make_config(IngestConfig, {**(reading or {}), "data": (data,), "store": part}))
    if name is not None and teacher is not None and not _is_done(out, fingerprint, part):
        _declare(part, name, provenance, signals)
        features = [f"{s}={one.encoding}" for s, one in signals.items() if one.spec.unit == "1"]
        config = {
            "store": part,
            "teacher": teacher,
            "name": name,
            "signals": list(signals),
            "encoding": features,
        }
        cache_teacher(make_config(CacheConfig, {**(running or {}), **config}))
    summary = merge_stores([store, part], out, on_conflict=on_conflict)
    shutil.rmtree(part)
    return _summarize(summary, before)


def _teacher_name(cache: Cache, teacher: str | None, name: str | None) -> str | None:
    """Return the name of the teacher whose signals the new systems need; None if there are no signals."""
    names = [one for one, entry in cache.teachers.items() if entry.signals]
    if not names:
        return None
    if teacher is None:
        raise ConfigError(
            f"{cache.path}: holds signals of {', '.join(names)}; give --teacher to run it over the new "
            "systems too, or put structures alone together with kd ingest"
        )
    if name is None and len(names) > 1:
        raise ConfigError(
            f"{cache.path}: has the teachers {', '.join(names)}; say with --name which one it is"
        )
    if name is not None and name not in names:
        raise CacheError(f"{cache.path}: no teacher {name} with signals; it has {', '.join(names)}")
    return name or names[0]


def _is_done(out: Path, fingerprint: str, part: Path) -> bool:
    """Say whether the merge of these very stores is there and complete; then nothing is computed."""
    if not (out / PLAN).exists():
        return False
    with Cache.open(out) as merged, Cache.open(part) as new:
        entries = [one for entry in merged.teachers.values() for one in entry.signals.values()]
        made_of = merged.dataset.get("merged_from")
        return (
            made_of == [fingerprint, new.fingerprint] and bool(entries) and all(e.complete for e in entries)
        )


def _declare(part: Path, name: str, provenance: dict[str, Any], signals: Mapping[str, Signal]) -> None:
    """Prepare the store of the new systems for the same teacher, signals and codebooks."""
    store = Store.open(part, "a")
    store.add_teacher(name, provenance)
    for signal in signals.values():
        book = None if signal.codebook is None else replace(signal.codebook, n_systems=0)  # fitted elsewhere
        store.add_signal(name, signal.spec, signal.encoding, book)


def _summarize(merged: MergeSummary, before: int) -> AddSummary:
    return AddSummary(
        store=merged.store,
        n_systems=merged.n_systems,
        n_new=merged.n_systems - before,
        signals=merged.signals,
        left_out=merged.left_out,
        bytes_written=merged.bytes_written,
    )
