"""Which teacher a run learns from, and which systems of the store it trains and validates on."""

import logging

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.reader import Cache
from molkd.pipeline.config import TrainConfig
from molkd.pipeline.data.lineage import knows_parents, root_ids
from molkd.pipeline.data.splits import split_mask
from molkd.pipeline.distill.objective import needed_signals
from molkd.pipeline.distill.statistics import labelled_systems
from molkd.pipeline.errors import CacheError, ConfigError, DataError

log = logging.getLogger(__name__)


def choose_teacher(cache: Cache, config: TrainConfig) -> str | None:
    """Return which teacher's signals the run reads, None if it needs none."""
    if not needed_signals(config.kd, pseudo_labels=config.pseudo_labels):
        return None
    return pick_teacher(cache, config.teacher)


def pick_teacher(cache: Cache, name: str | None) -> str:
    """Return the teacher of that name, or without a name the only one.

    Raises
    ------
    CacheError
        If there is none.
    ConfigError
        If there are several and none is named.
    """
    names = sorted(cache.teachers)
    if not names:
        raise CacheError(
            f"{cache.path}: no teacher in this store; run kd cache-teacher on it first, or take --kd none"
        )
    if name is not None and name not in names:
        raise CacheError(f"{cache.path}: no teacher {name}; it has {', '.join(names)}")
    if name is None and len(names) > 1:
        raise ConfigError(f"{cache.path}: several teachers ({', '.join(names)}); choose one with --teacher")
    return name or names[0]


def choose_systems(
    cache: Cache,
    config: TrainConfig,
    teacher: str | None,
    signals: tuple[str, ...],
    held_out: frozenset[bytes] = frozenset(),
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return masks (S,) of training and validation systems.

    Raises
    ------
    CacheError
        If a signal is unfinished.
    DataError
        If nothing is left to train on.
    """
    val = np.zeros(cache.n_systems, dtype=bool)
    if config.val is None and config.val_fraction:
        val = split_mask(root_ids(cache), config.val_fraction)  # what was made from a system is on its side
    train = usable_systems(cache, ~val, config, teacher, signals, held_out)
    if not train.any():
        raise DataError(f"{cache.path}: no system left to train on; lower --val-fraction or add systems")
    return train, val


def usable_systems(
    cache: Cache,
    wanted: NDArray[np.bool_],
    config: TrainConfig,
    teacher: str | None,
    signals: tuple[str, ...],
    held_out: frozenset[bytes],
) -> NDArray[np.bool_]:
    """Return which of the wanted systems (S,) can be trained on.

    Quarantined systems are left out, and so is everything that also stands in the validation or test data, or
    was made from what stands there.

    Raises
    ------
    CacheError
        If a signal is unfinished.
    DataError
        If labels are needed, and there are none.
    """
    train = wanted.copy()
    if held_out:
        train &= ~_held_out_with_copies(cache, train, held_out)
    if teacher is not None:
        for name in signals:
            entry = cache.teachers[teacher].signals.get(name)
            if entry is not None and not entry.complete:
                raise CacheError(
                    f"{cache.path}: signal {name} of {teacher} is unfinished, "
                    f"{len(entry.missing_shards)} shards are missing; "
                    "run the same kd cache-teacher command again, it continues"
                )
        bad = cache.bad_systems(teacher)
        if len(bad):
            train[bad] = False
            log.warning("%s: %d systems without finite teacher output are left out", cache.path, len(bad))
    if not config.kd and not config.pseudo_labels:
        n_before = int(train.sum())
        train = labelled_systems(cache, train)
        if n_before and not train.any():
            raise DataError(
                f"{cache.path}: no system has an energy or forces to train on; ingest with --energy-key, "
                "or learn from a teacher with --pseudo-labels or --kd vanilla1"
            )
        if n_left_out := n_before - int(train.sum()):
            log.info(
                "%s: %d systems without any label are left out: only a teacher could use them",
                cache.path,
                n_left_out,
            )
    return train


def _held_out_with_copies(
    cache: Cache, train: NDArray[np.bool_], held_out: frozenset[bytes]
) -> NDArray[np.bool_]:
    """Return which systems (S,) are held out, or were made from one that is."""
    met, made = (
        np.array([row.tobytes() in held_out for row in rows]) for rows in (cache.ids, root_ids(cache))
    )
    for where, what in (
        (met, "are in the validation or test data too"),
        (made & ~met, "were made from validation or test data"),
    ):
        if n := int((train & where).sum()):
            log.warning("%s: %d systems of the store %s: not trained on", cache.path, n, what)
    if not knows_parents(cache):
        log.warning(
            "%s: holds structures whose parents are not known: some may be copies of validation or test data",
            cache.path,
        )
    found: NDArray[np.bool_] = met | made
    return found
