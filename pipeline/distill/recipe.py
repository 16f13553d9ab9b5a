"""`--kd auto`: the losses a student learns with where nobody chose any, by what store and student have.

Chosen by benchmarks/recipes.py on three sets of molecules and one of slabs; figures in docs/benchmarks.md.
"""

import logging
from typing import Any

import numpy as np
import torch

from molkd.cache_schema.reader import Cache
from molkd.pipeline.config import KDTerm, TrainConfig
from molkd.pipeline.distill.systems import pick_teacher
from molkd.pipeline.models.registry import build_model

log = logging.getLogger(__name__)

_FEATURES = ("n2n", "v2v")  # losses on features, where both sides have them
_FADE = (0.0, 0.5)  # of these: they shape the features, and are not in the labels' way later
_LABELS = frozenset({"energy", "forces"})
_SLOPE = 3.0  # weight of `grad` over that of the labelled energies; 10 is at the cost of forces or energies
SIGNALS = ("energy", "forces", "node", "v2v")  # of a teacher, that the recipe may choose from


def automatic(cache: Cache, config: TrainConfig) -> TrainConfig:
    """Return the settings with the losses of the recipe in place of `kd`; each choice is logged.

    - `grad`, if the student's forces are direct and the teacher's are cached: its energy learns their slope,
      with three times the weight of the labelled energies.
    - `n2n` and `v2v`, where the cache has the signal and the student such features, with the weight `auto`,
      which fades to zero over the first half of the run.
    - pseudo-labels, if energies or forces are missing among the labels and the teacher has cached both.

    A store without a teacher is trained on with its labels alone. A signal of the teacher that is unfinished
    is chosen like a finished one, so that the run is refused rather than begun with less.

    Raises
    ------
    CacheError, ConfigError
        If the teacher is not there, or the store has several and none is chosen.
    """
    if not cache.teachers:
        log.info("kd auto: %s holds no teacher, the student learns from labels alone", cache.path)
        return config
    teacher = pick_teacher(cache, config.teacher)
    cached = cache.teachers[teacher].signals.keys()
    with torch.random.fork_rng(devices=[]):  # looked at only: the run makes its own
        model: Any = build_model(config.model)
    slope = KDTerm(name="grad", weight=_SLOPE * config.training.energy_weight or "auto")
    terms = [slope] if model.forces_from == "direct" and "forces" in cached else []
    features = (KDTerm.model_validate({"name": name, "fade": _FADE}) for name in _FEATURES)
    terms += [t for t in features if t.teacher_tap in cached and set(t.student_taps) <= set(model.signals)]
    pseudo_labels = config.pseudo_labels or (_lacks_labels(cache, config) and cached >= _LABELS)
    chosen = " ".join(f"--kd {term.text}" for term in terms) or "--kd none"
    log.info("kd auto: %s%s", chosen, " --pseudo-labels" if pseudo_labels else "")
    if config.kd and config.kd != tuple(terms):
        log.warning(
            "kd_auto is set: the losses under kd in the settings are not taken; leave it out to keep them"
        )
    return config.model_copy(update={"kd": tuple(terms), "pseudo_labels": pseudo_labels})


def _lacks_labels(cache: Cache, config: TrainConfig) -> bool:
    """Say whether a store that is trained on holds systems without an energy, or atoms without forces.

    Direct forces that neither labels nor the teacher teach would stay as random as they begin.
    """
    stores = [cache, *(Cache.open(mix.store) for mix in config.mix)]
    return any(np.isnan(store.energy).any() or _lacks_forces(store) for store in stores)


def _lacks_forces(cache: Cache) -> bool:
    forces = cache.fields["forces"]
    return forces.statistics is None or forces.statistics.count < 3 * forces.n_rows
