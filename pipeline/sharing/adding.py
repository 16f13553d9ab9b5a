"""`kd cache add`: a store with more systems; the teacher looks at the new ones only."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from molkd.cache_schema.errors import CacheError
from molkd.cache_schema.layout import PLAN
from molkd.cache_schema.reader import Cache
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
        If a teacher or its name is missing, or a teacher is given though `store` holds no signals.
    CacheError
        If `out` is `store` or something else than this call makes; before the teacher runs.
    CacheError, DataError, ModelError, TeacherError
        As `ingest`, `cache_teacher` and `merge_stores`; what an unfinished call left is named then.
    """
    part = out.with_name(f"{out.stem}.adding{out.suffix}")
    if Path(store).resolve() in (out.resolve(), part.resolve()):
        raise CacheError(f"{out}: {store} is never changed; choose another name for the new store")
    with Cache.open(store, complete=True) as cache:
        name = _teacher_name(cache, teacher, name)
        before = cache.n_systems
        _is_done(out, cache)
        leftover = (part / PLAN).exists()
        try:
            ingest(make_config(IngestConfig, {**(reading or {}), "data": (data,), "store": part}))
            with Cache.open(part) as new:
                is_done = _is_done(out, cache, new)
            if name is not None and teacher is not None and not is_done:
                _declare(part, cache, name)
                cache_teacher(_config(part, cache, name, teacher, running or {}))
        except CacheError as error:
            if not leftover:
                raise
            raise type(error)(
                f"{error}. An unfinished kd cache add left {part}; if that was with other data or another "
                "store, remove it"
            ) from error
    summary = merge_stores([store, part], out, on_conflict=on_conflict)
    shutil.rmtree(part)
    return _summarize(summary, before)


def _teacher_name(cache: Cache, teacher: str | None, name: str | None) -> str | None:
    """Return the name of the teacher whose signals the new systems need; None if there are no signals."""
    names = [one for one, entry in cache.teachers.items() if entry.signals]
    if not names and teacher is not None:
        raise ConfigError(
            f"{cache.path}: holds no signals that --teacher could be run for; put the structures together "
            f"with kd ingest {cache.path} DATA OUT, then run kd cache-teacher OUT --teacher {teacher}"
        )
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


def _is_done(out: Path, *parts: Cache) -> bool:
    """Say whether the merge of these stores is there and complete; then nothing is computed.

    Parameters
    ----------
    parts : the store, and that of the new systems if it is there already

    Raises
    ------
    CacheError
        If something else is there.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if (out / PLAN).exists():
        with Cache.open(out) as merged:
            of = merged.dataset.get("merged_from")
            given = [one.fingerprint for one in parts]
            same_plan = all(one.plan.sha256 == merged.plan.sha256 for one in parts)
            if same_plan or (isinstance(of, list) and len(of) == 2 and of[: len(given)] == given):
                entries = [one for entry in merged.teachers.values() for one in entry.signals.values()]
                return bool(entries) and all(e.complete for e in entries)
    raise CacheError(
        f"{out}: exists, and is not {parts[0].path} with the systems given; choose another name, or remove it"
    )


def _declare(part: Path, cache: Cache, name: str) -> None:
    """Prepare the store of the new systems for the same teacher, signals and codebooks."""
    entry = cache.teachers[name]
    store = Store.open(part, "a")
    store.add_teacher(name, entry.provenance)
    for signal in (cache.signal(name, s) for s in entry.signals):
        book = None if signal.codebook is None else replace(signal.codebook, n_systems=0)  # fitted elsewhere
        store.add_signal(name, signal.spec, signal.encoding, book)


def _config(part: Path, cache: Cache, name: str, teacher: str, running: Mapping[str, Any]) -> CacheConfig:
    """Return how the teacher runs over the new systems: as it did over those of the store."""
    entry = cache.teachers[name]
    signals = {s: cache.signal(name, s) for s in entry.signals}
    config = {
        "store": part,
        "teacher": teacher,
        "name": name,
        "signals": list(signals),
        "encoding": [f"{s}={one.encoding}" for s, one in signals.items() if one.spec.unit == "1"],
        "precision": entry.provenance.get("precision", "float32"),
    }
    return make_config(CacheConfig, {**running, **config})


def _summarize(merged: MergeSummary, before: int) -> AddSummary:
    return AddSummary(
        store=merged.store,
        n_systems=merged.n_systems,
        n_new=merged.n_systems - before,
        signals=merged.signals,
        left_out=merged.left_out,
        bytes_written=merged.bytes_written,
    )
