"""Finish a store by folding all commits into one sealed file, and describe what it holds."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from molkd.cache_schema.files import write_error, write_file
from molkd.cache_schema.groups import ATOMS, teacher_provenance
from molkd.cache_schema.jsonfile import seal
from molkd.cache_schema.layout import FORMAT, MANIFEST
from molkd.cache_schema.mirror import mirror_of, shown_place
from molkd.cache_schema.reader import Cache, SignalEntry
from molkd.cache_schema.remote import local_root
from molkd.cache_schema.state import MANIFEST_KIND, GroupState, load_group, read_log, require_complete
from molkd.cache_schema.untrusted import n_bytes_below
from molkd.cache_schema.writer import Store


def finalize(store: Store) -> Path:
    """Fold all commits into manifest.json; running it again, or after new signals, replaces the file.

    Returns
    -------
    Path
        Of the manifest.

    Raises
    ------
    CacheError
        If a group is not complete, naming its missing shards.
    """
    root, plan = store.path, store.plan
    groups: dict[str, Any] = {}
    for name in store.groups:
        state = read_log(root, plan, load_group(root, plan, store.systems, name))
        require_complete(root, state)
        groups[name] = group_entry(state)
    document = {
        "kind": MANIFEST_KIND,
        "format": FORMAT,
        "plan_sha256": plan.sha256,
        "fingerprint": plan.fingerprint,
        "teachers": {name: teacher_provenance(root, name) for name in store.teachers},
        "groups": groups,
    }
    raw = seal(document)
    path = root / MANIFEST
    try:
        if not path.is_file() or path.stat().st_size != len(raw) or path.read_bytes() != raw:
            write_file(path, raw, replace=True)
    except OSError as error:
        raise write_error(path, error, len(raw)) from error
    return path


def finalize_if_complete(store: Store) -> bool:
    """Write the manifest unless some group still lacks shards, whoever is writing them; return whether."""
    if any(store.missing_shards(group) for group in store.groups):
        return False
    finalize(store)
    return True


def group_entry(state: GroupState) -> dict[str, Any]:
    """Return what the manifest says about a finished group."""
    arrays = {}
    for name in state.group.layouts:
        entry: dict[str, Any] = {"shards": [state.files[k][name].to_json() for k in sorted(state.files)]}
        if name in state.moments:
            entry["sums"] = state.moments[name].to_json()
        arrays[name] = entry
    return {
        "arrays": arrays,
        "bad_systems": sorted(state.bad_systems),
        "weights_sha256": state.group.weights_sha256,
        "metadata": state.group.metadata,
    }


def info(path: str | Path) -> dict[str, Any]:
    """Describe a store in plain JSON values.

    Raises
    ------
    CacheError, IntegrityError
        As `Cache.open`.
    """
    root = local_root(path)
    mirror = mirror_of(root)
    with Cache.open(root) as cache:
        packing = cache.plan.packing
        n_bytes = n_bytes_below(root) if mirror is None else mirror.expected.n_bytes
        return {
            "path": shown_place(root),
            "format": FORMAT,
            "fingerprint": cache.fingerprint,
            "systems": packing.n_systems,
            "atoms": packing.n_atoms,
            "systems_with_energy": int((cache.energy == cache.energy).sum()),  # NaN differs from itself
            "shards": packing.n_shards,
            "rows_per_shard": packing.rows_per_shard,
            "finished": all(entry.complete for entry in _entries(cache)),
            "bytes": n_bytes,
            "bytes_per_atom": n_bytes / packing.n_atoms,
            "overlay_of": shown_place(place) if (place := cache.state(ATOMS).root) != root else "",
            "dataset": cache.dataset,
            "sources": list(cache.source_names),
            "fields": {name: _describe(entry, cache) for name, entry in cache.fields.items()},
            "teachers": {
                name: {
                    "provenance": teacher.provenance,
                    "bad_systems": cache.bad_systems(name).tolist(),
                    "signals": {signal: _describe(entry, cache) for signal, entry in teacher.signals.items()},
                }
                for name, teacher in cache.teachers.items()
            },
        }


def _entries(cache: Cache) -> Iterator[SignalEntry]:
    yield from cache.fields.values()
    for teacher in cache.teachers.values():
        yield from teacher.signals.values()


def _describe(entry: SignalEntry, cache: Cache) -> dict[str, Any]:
    spec = entry.spec
    described = {
        "axis": spec.axis,
        "shape": list(spec.shape),
        "unit": spec.unit,
        "symmetry": spec.symmetry,
        "encoding": entry.encoding,
        "complete": entry.complete,
        "missing_shards": len(entry.missing_shards),
        "rows": entry.n_rows,
        "bytes": entry.n_bytes,
        "bytes_per_atom": entry.n_bytes / cache.n_atoms,
    }
    if entry.statistics is not None and entry.statistics.count:
        described |= {
            "mean": float(entry.statistics.mean.mean()),
            "rms": float((entry.statistics.rms**2).mean() ** 0.5),
            # About the mean, of vectors about zero: what --max-error is relative to.
            "deviation": entry.deviation,
            "max_abs": entry.max_abs,
            "error_max_abs": entry.error_max_abs,
            "error_rms": entry.error_rms,
            # What a student that meets the stored values exactly has as MSE against the teacher's.
            "loss_floor": entry.error_rms**2,
        }
    if entry.held_out_error_rms == entry.held_out_error_rms:  # NaN differs from itself
        described |= {
            "held_out_error_max_abs": entry.held_out_error_max_abs,
            "held_out_error_rms": entry.held_out_error_rms,
        }
    return described
