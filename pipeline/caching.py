"""Stage one: the teacher looks at each system once, its signals rest in the store.

Three things overlap: a thread reads systems and builds neighbours, the teacher runs, a thread copies what it
gave to the host, checks it and writes it. Shards are done one after another; a finished one is never redone.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from molkd.cache_schema.fields import FieldSpec
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.writer import Store
from molkd.pipeline.config import CacheConfig
from molkd.pipeline.device import choose_device
from molkd.pipeline.errors import DataError, TeacherError
from molkd.pipeline.graphs.batch import Batch, make_batch, to_device
from molkd.pipeline.graphs.neighbors import NeighborRule
from molkd.pipeline.teachers.interface import Teacher
from molkd.pipeline.teachers.load import load_teacher

log = logging.getLogger(__name__)

_FIELDS = ("atomic_numbers", "positions", "tags", "fixed", "cell", "pbc")
_NARROW = {"energy": "fp64", "forces": "fp32", "atomic_energies": "fp64"}  # labels keep their precision
_BATCH_ATOMS = {"cpu": 1024, "cuda": 16_384}
_BATCH_EDGES = {"cpu": 60_000, "cuda": 1_000_000}
_PREFETCH = 3


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


@dataclass(frozen=True)
class Work:
    """One batch of consecutive systems of a shard."""

    indices: NDArray[np.int64]  # stored system indices
    batch: Batch
    n_atoms: NDArray[np.int64]


def cache_teacher(config: CacheConfig) -> CacheSummary:
    """Run the teacher over every system of the store that it has not seen, and store the signals.

    Raises
    ------
    TeacherError
        If the teacher lacks a signal or an element, or gives non-finite numbers for a system, which is named.
    CacheError
        If the store holds another teacher of this name, or cannot be written.
    """
    began = time.perf_counter()
    teacher = open_teacher(config)
    cache = Cache.open(config.store)
    check_elements(teacher, cache)
    store = Store.open(config.store, mode="a")
    name = config.name or teacher.info.name
    encodings = {signal: _NARROW.get(signal, config.encoding) for signal in config.signals}
    store.add_teacher(name, provenance(teacher))
    for signal, encoding in encodings.items():
        store.add_signal(name, teacher.signals[signal], encoding)
    groups = {signal: f"teachers/{name}/{signal}" for signal in config.signals}
    missing = {signal: set(store.missing_shards(group)) for signal, group in groups.items()}
    shards = sorted(set().union(*missing.values()))
    if not shards:
        log.info("%s: every shard of %s is there, nothing to do", config.store, ", ".join(groups))
    n_computed, n_bytes, bad = 0, 0, list[int]()
    n_systems = sum(len(store.systems_of_shard(s)) for s in shards)
    with tqdm(total=n_systems, desc="teacher", unit="system", disable=None) as progress:
        for shard in shards:
            wanted = {signal: group for signal, group in groups.items() if shard in missing[signal]}
            bad += _cache_shard(teacher, cache, store, shard, wanted, config, progress.update)
            n_computed += len(store.systems_of_shard(shard))
    if store.complete():
        store.finalize()
    return CacheSummary(
        store=str(config.store),
        teacher=name,
        signals=encodings,
        n_systems=cache.n_systems,
        n_atoms=cache.n_atoms,
        n_computed=n_computed,
        seconds=time.perf_counter() - began,
        bytes_written=n_bytes,
        bad_systems=[cache.source_of(i) for i in bad],
    )


def open_teacher(config: CacheConfig) -> Teacher:
    """Load the teacher and check that it gives every signal asked for."""
    device = choose_device(config.device)
    teacher = load_teacher(config.teacher, device=device, dtype=getattr(torch, config.precision))
    unknown = [s for s in config.signals if s not in teacher.signals]
    if unknown:
        raise TeacherError(
            f"{config.teacher}: gives no signal {', '.join(unknown)}; it has {', '.join(sorted(teacher.signals))}"
        )
    return teacher


def check_elements(teacher: Teacher, cache: Cache) -> None:
    """Refuse a store with an element the teacher does not know, before any work."""
    step = 10_000
    for begin in range(0, cache.n_systems, step):
        part = np.arange(begin, min(begin + step, cache.n_systems))
        numbers = cache.read(part, ("atomic_numbers",))["atomic_numbers"]
        unknown = sorted(set(np.unique(numbers).tolist()) - teacher.atomic_numbers)
        if unknown:
            atom = int(np.flatnonzero(numbers == unknown[0])[0])
            system = int(np.searchsorted(np.cumsum(cache.system_n_atoms[part]), atom, side="right"))
            raise TeacherError(
                f"{cache.source_of(int(part[system]))}: element with atomic number {unknown[0]}, which "
                f"{teacher.info.name} does not know; leave such systems out, or take another teacher"
            )
