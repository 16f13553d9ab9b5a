"""Validation and test data: read once before the first step, checked, and never trained on."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from molkd.cache_schema.reader import Cache
from molkd.pipeline.config import TrainConfig
from molkd.pipeline.data.sources import open_source
from molkd.pipeline.data.store_source import StoreSource
from molkd.pipeline.data.system import System
from molkd.pipeline.data.validate import check_system
from molkd.pipeline.distill.student import Setup
from molkd.pipeline.scope import Scope

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """What the files of validation and test data hold."""

    ids: frozenset[bytes]  # of all their systems
    val: tuple[System, ...]  # those of the validation file
    examples: tuple[System, ...]  # of the test files: one with each element, one that is periodic


def read_held_out(config: TrainConfig) -> HeldOut:
    """Read the validation and test files.

    Raises
    ------
    DataError
        If a file cannot be read or a system of it makes no sense.
    """
    ids: set[bytes] = set()
    val = tuple(read_systems(config.val, config)) if config.val else ()
    examples: dict[int | str, System] = {}
    for path in config.test.values():
        for system in read_systems(path, config):
            ids.add(system.id)
            kinds = [*np.unique(system.atomic_numbers).tolist(), *(["periodic"] if system.pbc.any() else [])]
            for kind in kinds:
                examples.setdefault(kind, system)
    return HeldOut(frozenset(ids | {s.id for s in val}), val, tuple(examples.values()))


def read_systems(path: Path | str, config: TrainConfig) -> Iterator[System]:
    """Yield the systems of a file, each checked."""
    source = open_source(path, energy_key=config.energy_key, forces_key=config.forces_key)
    try:
        for index in range(len(source)):
            system = source.read(index)
            check_system(system)
            yield system
    finally:
        source.close()


def validation_systems(cache: Cache, setup: Setup, config: TrainConfig, held_out: HeldOut) -> list[System]:
    """Return what is held out and has a label: without one it cannot tell a good student from a bad one.

    Raises
    ------
    ModelError
        If a system to validate or test on is nothing that this student is made for.
    """
    systems: Iterable[System] = held_out.val
    if config.val is None:
        store = StoreSource(cache)
        systems = [store.read(int(i)) for i in np.flatnonzero(setup.val)]
    scope = Scope(config.student, setup.potential.elements, setup.potential.neighbor_rule)
    for system in (*systems, *held_out.examples):
        scope.check(system)
    labelled = [s for s in systems if np.isfinite(s.energy) or np.isfinite(s.forces[~s.fixed]).any()]
    if not labelled:
        log.info("no labelled system is held out: the last weights are kept as the best ones")
    return labelled
