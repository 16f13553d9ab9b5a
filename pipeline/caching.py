"""Stage one: the teacher looks at each system once, its signals rest in the store.

Three things overlap: a thread reads systems and builds neighbours, the teacher runs, a thread copies what it
gave to the host, checks it and writes it. Shards are done one after another; a finished one is never redone.
Processes that share the work share nothing but the store: jobs of an array, or the workers of `distributed`.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from molkd.cache_schema.fields import FieldSpec
from molkd.cache_schema.layout import PLAN
from molkd.cache_schema.manifest import finalize_if_complete
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.remote import is_url
from molkd.cache_schema.writer import Store
from molkd.pipeline.config import CacheConfig, IngestConfig
from molkd.pipeline.device import choose_device
from molkd.pipeline.encodings import asked_encodings, settle_encodings, warn_of_errors
from molkd.pipeline.errors import ConfigError, TeacherError
from molkd.pipeline.ingest import ingest
from molkd.pipeline.places import is_there, resolved
from molkd.pipeline.prefetch import Background
from molkd.pipeline.progress import Progress
from molkd.pipeline.scope import Scope, source_of
from molkd.pipeline.shard_output import Written
from molkd.pipeline.shard_work import (
    PREFETCH,
    Outcome,
    Stage,
    announce,
    compute_shard,
    missing_groups,
    missing_shards,
)
from molkd.pipeline.teacher_pass import TeacherPass
from molkd.pipeline.teachers.interface import Teacher
from molkd.pipeline.teachers.load import load_teacher

log = logging.getLogger(__name__)

ALL = "all"  # among the signals asked for: every one but those on edges and the vectors inside a model


@dataclass(frozen=True)
class CacheSummary:
    """What stage one did."""

    store: str
    teacher: str
    signals: dict[str, str]  # name -> encoding
    n_systems: int
    n_atoms: int
    n_computed: int  # systems computed in this call; the rest was there
    seconds: float
    bytes_written: int
    bad_systems: list[str] = field(default_factory=list)


def cache_teacher(
    config: CacheConfig,
    data: Path | str | None = None,
    *,
    energy_key: str | None = None,
    forces_key: str | None = None,
) -> CacheSummary:
    """Run the teacher over every system of the store that it has not seen, and store the signals.

    Parameters
    ----------
    data : structures that the store is to hold, put into it first; None (or the store): they are there
    energy_key, forces_key : names of the labels in `data`

    Raises
    ------
    ConfigError
        If a job of an array is to make the store, or there is no scheduler at the address.
    TeacherError
        If the teacher lacks a signal, or gives non-finite numbers for a system, which is named.
    ModelError
        If the store holds what the teacher was not made for: other elements, or cells that it ignores.
    CacheError
        If the store holds another teacher of this name, or cannot be written.
    """
    began = time.perf_counter()

    def fill_store() -> None:
        if data is not None:
            prepare_store(config.store, data, energy_key=energy_key, forces_key=forces_key)

    if config.worker is not None and not (config.store / PLAN).exists():
        is_given = data is not None and str(data) != str(config.store)
        raise ConfigError(
            f"{config.store}: no store yet, and jobs of an array would each make it; first run "
            f"kd ingest {data if is_given else 'DATA'} {config.store}, "
            f"then the array with kd cache-teacher {config.store}"
        )
    if config.workers is not None or config.scheduler is not None:
        from molkd.pipeline.distributed import cache_on_workers  # Dask takes half a second to import

        done = cache_on_workers(config, fill_store)
    else:
        done = _cache_here(config, fill_store)
    if not finalize_if_complete(done.store):
        log.info("%s: shards or other signals are unfinished, so no manifest yet", config.store)
    with Cache.open(config.store) as cache:
        if config.max_error is not None:
            warn_of_errors(cache, done.name, done.groups, config.max_error)
        return CacheSummary(
            store=str(config.store),
            teacher=done.name,
            signals={s: done.store.signal(group).encoding for s, group in done.groups.items()},
            n_systems=cache.n_systems,
            n_atoms=cache.n_atoms,
            n_computed=done.n_computed,
            seconds=time.perf_counter() - began,
            bytes_written=done.written.n_bytes,
            bad_systems=[source_of(cache, i) for i in sorted(done.written.bad_systems)],
        )


def _cache_here(config: CacheConfig, fill_store: Callable[[], None]) -> Outcome:
    """Do all missing shards, or those of this job of an array, in this process."""
    teacher = open_teacher(config)
    fill_store()
    stage = make_room(config, teacher)
    store, groups = stage.store, stage.groups
    shards = missing_shards(store, groups)
    if config.worker is not None:
        index, of = config.worker
        shards = [shard for shard in shards if shard % of == index]
    n_total = announce(store, groups, shards)
    n_computed, written = 0, Written()
    with Progress(n_total, "teacher", "system") as progress, Background("kd-write", PREFETCH) as writing:
        for shard in shards:
            # Asked anew each time: another process may have finished this shard meanwhile.
            wanted = missing_groups(store, groups, shard)
            n_systems = len(store.systems_of_shard(shard))
            if not wanted:
                progress.update(n_systems)
                continue
            compute_shard(stage, shard, wanted, writing, written, progress.update)
            n_computed += n_systems
    return Outcome(store, stage.name, groups, n_computed, written)


def make_room(config: CacheConfig, teacher: Teacher) -> Stage:
    """Make room in the store for what is asked of the teacher, the encodings settled.

    Raises
    ------
    ModelError, TeacherError, CacheError
        As `cache_teacher`.
    """
    cache = Cache.open(config.store)
    scope_of(teacher).check_store(cache)
    store = Store.open(config.store, mode="a")
    name = config.name or teacher.info.name
    specs = {s: teacher.signals[s] for s in asked_signals(teacher, config)}
    declared = {s: signal.encoding for s, signal in store.find_signals(name, specs).items()}
    asked = asked_encodings(specs, config, cache.n_atoms, declared)
    store.add_teacher(name, provenance(teacher))
    teacher_pass = TeacherPass(teacher, cache)
    settled = settle_encodings(teacher_pass, store, name, asked, config)
    groups = {s: store.add_signal(name, specs[s], f.encoding, f.codebook) for s, f in settled.items()}
    return Stage(config, store, teacher_pass, name, groups)


def asked_signals(teacher: Teacher, config: CacheConfig) -> list[str]:
    """Return the signals to store; `ALL` stands for those on systems and atoms but vectors of layers.

    The latter are three times as wide as scalars, and like features of edges they are asked for by name.

    Raises
    ------
    TeacherError
        If the teacher lacks one of them, naming those it has.
    """
    usual = [name for name, spec in teacher.signals.items() if spec.axis != "edge" and not _is_wide(spec)]
    named = [s for name in config.signals for s in (usual if name == ALL else [name])]
    unknown = [s for s in named if s not in teacher.signals]
    if unknown:
        raise TeacherError(
            f"{config.teacher}: gives no signal {', '.join(unknown)}; "
            f"it has {', '.join(sorted(teacher.signals))}"
        )
    return list(dict.fromkeys(named))


def _is_wide(spec: FieldSpec) -> bool:
    return spec.name.startswith("layer/") and spec.symmetry == "vector"


def prepare_store(
    store: Path, data: Path | str, *, energy_key: str | None = None, forces_key: str | None = None
) -> None:
    """Make sure that the store holds the structures of `data`; a store given as data is used as it is.

    Raises
    ------
    ConfigError
        If data that are no store are given without naming one, or keys of labels with a store.
    DataError, CacheError
        As `ingest`.
    """
    check_place(store, data, (energy_key, forces_key))
    if resolved(data) != store.resolve():
        ingest(IngestConfig(data=(data,), store=store, energy_key=energy_key, forces_key=forces_key))


def check_place(store: Path, data: Path | str, keys: tuple[str | None, str | None]) -> None:
    """Refuse data that name no store to go to, and keys where no file is read."""
    is_store = is_url(data) or (Path(data) / PLAN).exists()
    if is_there(data) and not is_store and resolved(data) == store.resolve():
        raise ConfigError(
            f"{data}: is not a store; name one that its structures and the signals go to, "
            f"for example kd cache-teacher {data} NAME.kdcache --teacher ..."
        )
    if is_store and any(keys):
        raise ConfigError(
            f"{data}: is a store, its labels were chosen when it was made; "
            "give --energy-key and --forces-key to kd ingest"
        )


def open_teacher(config: CacheConfig) -> Teacher:
    """Load the teacher and check that it gives every signal asked for."""
    device = choose_device(config.device)
    dtype = getattr(torch, config.precision)
    teacher = load_teacher(config.teacher, device=device, dtype=dtype, scale_file=config.scale_file)
    asked_signals(teacher, config)
    return teacher


def scope_of(teacher: Teacher) -> Scope:
    """Return what the teacher was made for."""
    return Scope(teacher.info.name, teacher.atomic_numbers, teacher.neighbor_rule)


def provenance(teacher: Teacher) -> dict[str, Any]:
    """Return what tells two teachers apart, or shows that they are the same."""
    info = teacher.info
    return {
        "name": info.name,
        "architecture": info.architecture,
        "weights_sha256": info.weights_sha256,
        "config": info.config,
        "taps": info.taps,
        "licence": info.licence,
        "citation": info.citation,
        "energy_reference": info.energy_reference,
        "units_inside": info.units_inside,
        "precision": str(teacher.dtype).removeprefix("torch."),
        "neighbor_rule": teacher.neighbor_rule.to_dict(),
        "code": f"molkd {version('molkd')}, torch {torch.__version__}",
        **info.extra,
    }
