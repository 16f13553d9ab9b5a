"""The further stores of a run (`mix`): opened, held against the main one, and told of in files."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.reader import Cache
from molkd.cache_schema.teachers import differences, identity
from molkd.pipeline.config import MixConfig, TrainConfig
from molkd.pipeline.data.lineage import root_ids
from molkd.pipeline.data.references import (
    N_ELEMENTS,
    LabelScale,
    fit_references,
    reference_table,
    sum_references,
)
from molkd.pipeline.distill.mixing import batch_counts, origin_weights
from molkd.pipeline.distill.statistics import LabelStatistics
from molkd.pipeline.distill.systems import usable_systems
from molkd.pipeline.errors import CacheError, DataError
from molkd.pipeline.sharing.duplicates import places_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TrainingStore:
    """A store, and what a run takes from it."""

    cache: Cache
    train: NDArray[np.bool_]  # (S,) systems to train on
    teacher: str | None
    mix: MixConfig | None = None  # None: the main store


def systems_a_batch(config: TrainConfig) -> tuple[int, ...]:
    """Return how many systems of a full batch the main store and each further one give."""
    return batch_counts(config.training.batch_size, [mix.share for mix in config.mix])


def open_mixed(
    config: TrainConfig,
    main: TrainingStore,
    val: NDArray[np.bool_],
    signals: tuple[str, ...],
    held_out: frozenset[bytes],
) -> tuple[TrainingStore, ...]:
    """Open the further stores; a system that stands in several is trained on once, in the first of them.

    Parameters
    ----------
    val : (S,) systems of the main store that are validated on
    signals : the teacher's signals that the run reads
    held_out : ids of other systems that must not be trained on

    Raises
    ------
    CacheError
        If a store has another teacher than the main one, or lacks a signal of it.
    ConfigError
        If the shares leave no system of a batch to the main store.
    DataError
        If nothing of a store is left to train on.
    """
    counts = systems_a_batch(config)
    weights = origin_weights(counts, [mix.weight for mix in config.mix])
    if config.mix:
        both = (main.cache.ids, root_ids(main.cache))
        held_out |= {row.tobytes() for rows in both for row in rows[val]}
    stores = [main]
    for k, mix in enumerate(config.mix, start=1):
        cache = Cache.open(mix.store)
        teacher = _same_teacher(cache, mix, main, signals)
        elsewhere = np.zeros(cache.n_systems, dtype=bool)
        for store in stores:
            elsewhere |= places_of(cache.ids, store.cache.ids[store.train]) >= 0
        if n := int(elsewhere.sum()):
            log.info("%s: %d systems stand in a store before it too: trained on there", cache.path, n)
        train = usable_systems(cache, ~elsewhere, config, teacher, signals, held_out)
        if not train.any():
            raise DataError(
                f"{cache.path}: nothing to mix in, every system stands in the main store or is held out; "
                "leave --mix out"
            )
        log.info(
            "%s: %d systems, %d of %d in a batch; its loss weight %.4g, that of the main store %.4g",
            cache.path,
            int(train.sum()),
            counts[k],
            sum(counts),
            weights[k],
            weights[0],
        )
        stores.append(TrainingStore(cache, train, teacher, mix))
    return tuple(stores[1:])


def _same_teacher(cache: Cache, mix: MixConfig, main: TrainingStore, signals: tuple[str, ...]) -> str | None:
    """Return the name that the main store's teacher has in a further store."""
    if main.teacher is None:
        return None
    ours = main.cache.teachers[main.teacher]
    if mix.teacher is not None and mix.teacher not in cache.teachers:
        raise CacheError(f"{cache.path}: no teacher {mix.teacher}; it has {_listed(cache.teachers)}")
    names = [mix.teacher] if mix.teacher else sorted(cache.teachers)
    same = [n for n in names if identity(cache.teachers[n].provenance) == identity(ours.provenance)]
    if not same:
        others = [f"{n}: {differences(ours.provenance, cache.teachers[n].provenance)}" for n in names]
        raise CacheError(
            f"{cache.path}: its teacher is not {main.teacher} of {main.cache.path} "
            f"({'; '.join(others) or 'it has none'}); run kd cache-teacher on it with the same teacher"
        )
    name = main.teacher if main.teacher in same else same[0]
    theirs = cache.teachers[name]
    for signal in signals:
        if signal not in theirs.signals:
            raise CacheError(
                f"{cache.path}: lacks signal {signal} of teacher {name}; "
                f"run kd cache-teacher again with --signals {signal} (it adds to the store)"
            )
        taps = [entry.provenance.get("taps", {}).get(signal) for entry in (ours, theirs)]
        specs = [entry.signals[signal].spec for entry in (ours, theirs) if signal in entry.signals]
        if taps[0] != taps[1] or specs[0] != specs[-1]:
            raise CacheError(
                f"{cache.path}: signal {signal} of teacher {name} is {taps[1]} {specs[-1].shape}, in "
                f"{main.cache.path} it is {taps[0]} {specs[0].shape}; cache both with the same code"
            )
    return name


def _listed(names: Sequence[str] | dict[str, Any]) -> str:
    return ", ".join(sorted(names)) or "none"


def add_references(
    scale: LabelScale, statistics: Sequence[LabelStatistics], config: TrainConfig
) -> LabelScale:
    """Give elements that only further stores hold an energy; everything of the main store's scale stays.

    The energy is fitted to what the other elements' references and the mean leave of labels, or of the
    teacher's energies where these stand in.

    Parameters
    ----------
    scale : of the main store
    statistics : of the further stores

    Raises
    ------
    DataError
        If references are given, but not for an element of a system with an energy; or if only further
        stores have energies.
    """
    counts = np.concatenate([np.zeros((0, N_ELEMENTS), np.int64), *(s.counts for s in statistics)])
    energies = np.concatenate([np.zeros(0), *(s.energies for s in statistics)])
    known = np.isin(np.arange(N_ELEMENTS), list(scale.references))
    rows = np.isfinite(energies) & counts[:, ~known].any(axis=1)
    asked = config.training.references
    if asked == "none" or not rows.any():
        return scale
    if asked != "fit":
        sum_references(counts[rows], scale.references)  # says which element lacks one
    if not scale.references:
        raise DataError(
            "--mix: only further stores have energies, and there is nothing to normalise them by; "
            "train on the store with energies, and mix in the other one"
        )
    residual = energies[rows] - counts[rows] @ reference_table(scale.references) - scale.energy_mean
    fitted = fit_references(np.where(known, 0, counts[rows]), residual)
    log.info("references of elements in further stores only: %s", {z: round(e, 3) for z, e in fitted.items()})
    return LabelScale(scale.energy_mean, scale.energy_std, scale.forces_std, scale.references | fitted)


def describe_mix(config: TrainConfig, mixed: Sequence[TrainingStore]) -> list[dict[str, Any]]:
    """Return what model file and metrics.json tell of the further stores."""
    counts = systems_a_batch(config)
    weights = origin_weights(counts, [mix.weight for mix in config.mix])
    return [
        {
            "store": Path(store.cache.path).name,
            "dataset_fingerprint": store.cache.fingerprint,
            "n_training_systems": int(store.train.sum()),
            "n_training_energies": int(np.isfinite(store.cache.energy[store.train]).sum()),
            "data": {k: v for k in ("licence", "citation") if (v := store.cache.dataset.get(k))},
            "systems_a_batch": n,
            "share": n / config.training.batch_size,
            "weight_ratio": mix.weight,
            "loss_weight": weight,
        }
        for mix, store, n, weight in zip(config.mix, mixed, counts[1:], weights[1:], strict=True)
    ]
