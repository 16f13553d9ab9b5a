"""`kd cache plan` and `--dry-run`: what stage one will cost, before it is begun."""

import re
from pathlib import Path

import numpy as np

from molkd.cache_schema.layout import PLAN
from molkd.cache_schema.writer import Store
from molkd.pipeline.caching import asked_signals, check_place, declared_encodings, open_teacher, scope_of
from molkd.pipeline.config import CacheConfig
from molkd.pipeline.data.sources import open_source
from molkd.pipeline.encodings import asked_encodings
from molkd.pipeline.errors import ConfigError
from molkd.pipeline.forecast import Forecast, forecast

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
    """Price stage one without writing anything but a probe file that is removed again.

    Parameters
    ----------
    budget : bytes that the store may take; then what to store is proposed

    Raises
    ------
    ConfigError, DataError, ModelError, TeacherError
        What the real run would refuse, as far as a sample of the data shows it.
    """
    check_place(config.store, data, (energy_key, forces_key))
    teacher = open_teacher(config)
    source = open_source(data, energy_key=energy_key, forces_key=forces_key)
    try:
        rng = np.random.default_rng(0)
        chosen = rng.choice(len(source), size=min(len(source), _PROBE_SYSTEMS), replace=False)
        sample = [source.read(int(i)) for i in chosen]
        n_systems = len(source)
    finally:
        source.close()
    for system in sample:
        scope_of(teacher).check(system)
    specs = {s: teacher.signals[s] for s in asked_signals(teacher, config)}
    name = config.name or teacher.info.name
    n_atoms = round(n_systems * float(np.mean([system.n_atoms for system in sample])))
    is_new = not (config.store / PLAN).exists()
    declared = {} if is_new else declared_encodings(Store.open(config.store), name, specs)
    return forecast(
        config.store,
        teacher,
        sample,
        n_systems,
        asked_encodings(specs, config, n_atoms, declared),
        config,
        new_store=is_new,
        budget=budget,
    )


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
