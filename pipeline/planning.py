"""`kd cache plan` and `--dry-run`: what stage one will cost, before it is begun."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.identity import ID_BYTES
from molkd.cache_schema.layout import PLAN, SUFFIX
from molkd.cache_schema.remote import is_url
from molkd.cache_schema.writer import Store
from molkd.pipeline.caching import asked_signals, check_place, open_teacher, provenance, scope_of
from molkd.pipeline.config import CacheConfig
from molkd.pipeline.data.sources import Source, open_source
from molkd.pipeline.data.store_source import StoreSource
from molkd.pipeline.data.system import System
from molkd.pipeline.encodings import asked_encodings
from molkd.pipeline.errors import CacheError, ConfigError
from molkd.pipeline.forecast import Forecast, forecast
from molkd.pipeline.places import resolved, short_name
from molkd.pipeline.planned_store import find_store, future_store

_PROBE_SYSTEMS = 256
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def plan_teacher(
    config: CacheConfig,
    data: Path | str,
    *,
    energy_key: str | None = None,
    forces_key: str | None = None,
    budget: int | None = None,
) -> Forecast:
    """Price what is left of stage one; nothing is written but a file beside the store, removed at once.

    Parameters
    ----------
    budget : bytes that the store may take; then what to store is proposed

    Raises
    ------
    ConfigError, DataError, ModelError, TeacherError, CacheError
        What the real run would refuse, as far as a sample of the data shows it.
    """
    check_place(config.store, data, (energy_key, forces_key))
    teacher = open_teacher(config)
    source = open_source(data, energy_key=energy_key, forces_key=forces_key)
    try:
        rng = np.random.default_rng(0)
        chosen = rng.choice(len(source), size=min(len(source), _PROBE_SYSTEMS), replace=False)
        sample = [source.read(int(i)) for i in chosen]
        for system in sample:
            scope_of(teacher).check(system)
        specs = {s: teacher.signals[s] for s in asked_signals(teacher, config)}
        if (config.store / PLAN).exists():
            store = Store.open(config.store)
            if resolved(data) != config.store.resolve():
                _require_systems(store, sample)
            name = config.name or teacher.info.name
            target = find_store(store, name, provenance(teacher), list(specs))
        else:
            target = future_store(config.store, _n_atoms(source, sample))
    finally:
        source.close()
    declared = {s: signal.encoding for s, signal in target.declared.items()}
    asked = asked_encodings(specs, config, int(target.n_atoms.sum()), declared)
    return forecast(target, teacher, sample, target.settle(specs, asked), config, budget=budget)


def _n_atoms(source: Source, sample: Sequence[System]) -> NDArray[np.int32]:
    """Return the atoms (S,) of every system; of files, where nobody knows, those of the sample repeated."""
    if isinstance(source, StoreSource):
        return source.cache.system_n_atoms
    return np.resize(np.array([system.n_atoms for system in sample], dtype=np.int32), len(source))


def _require_systems(store: Store, sample: Sequence[System]) -> None:
    """Refuse a store that holds other systems than those to be put into it."""
    ids = np.frombuffer(b"".join(system.id for system in sample), f"V{ID_BYTES}")
    known = np.isin(ids, np.ascontiguousarray(store.systems.id).view(ids.dtype))
    if not known.all():
        raise CacheError(
            f"{store.path}: holds other systems, {sample[int(np.argmin(known))].source} is not among them; "
            "name another store"
        )


def usual_store(data: Path | str) -> Path:
    """Return where signals would go if no store is named: to `data`, or else to the current folder."""
    if not is_url(data) and (Path(data) / PLAN).exists():
        return Path(data)
    return Path(short_name(data if is_url(data) else Path(data).resolve()) + SUFFIX)


def parse_bytes(text: str) -> int:
    """Return the bytes that "500GB", "1.5 TB" or "20000" stand for; units are powers of 1000.

    Raises
    ------
    ConfigError
        If it is none of these.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)b?", text.strip().lower())
    if found is None:
        raise ConfigError(f"{text}: is no size; write it as 500GB, 1.5TB or 200MB")
    return round(float(found[1]) * _UNITS[found[2]])
