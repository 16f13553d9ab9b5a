"""The weights lambda of the distillation losses (Eq. 2), as given or from the scale of what is learnt."""

import logging
import math

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.reader import Cache
from molkd.pipeline.config import KDTerm, TrainConfig
from molkd.pipeline.data.references import LabelScale
from molkd.pipeline.distill.start_values import measured_start
from molkd.pipeline.distill.statistics import LabelStatistics, mean_atomic_energy
from molkd.pipeline.errors import CacheError, ConfigError
from molkd.pipeline.graphs.neighbors import NeighborRule

log = logging.getLogger(__name__)


def zero_model_loss(statistics: LabelStatistics, scale: LabelScale, config: TrainConfig) -> float:
    """Return L_0 (Eq. 1) of a model that always predicts zero, in normalised units."""
    known = np.isfinite(statistics.energies)
    normalised = scale.normalize_energy(statistics.energies[known], statistics.counts[known])
    energy = float(np.abs(normalised).mean()) if known.any() else 0.0
    forces = 0.0 if np.isnan(statistics.mean_force_norm) else statistics.mean_force_norm / scale.forces_std
    return config.training.energy_weight * energy + config.training.forces_weight * forces


def term_weight(
    term: KDTerm,
    cache: Cache,
    teacher: str | None,
    statistics: LabelStatistics,
    scale: LabelScale,
    config: TrainConfig,
    systems: NDArray[np.integer],
    rule: NeighborRule,
) -> float:
    """Lambda of Eq. 2: as given, or such that the term starts as large as the base loss.

    "Starts" means for a student that knows only the mean: the start of n2n with a linear head is the signal's
    variance, whatever its width or units.

    Parameters
    ----------
    systems : (S,) stored indices of what is trained on
    rule : how the student finds neighbors

    Raises
    ------
    CacheError
        If the signal is the same everywhere.
    ConfigError
        If the base loss is zero, so that it says nothing about the term's weight.
    """
    if term.weight == "balance":
        return math.nan  # measured before the first step, see `balance`
    if term.weight != "auto":
        return term.weight
    if term.name == "vanilla1" or teacher is None:
        return 1.0  # the same loss in the same units
    signal = term.signals[0]
    entry = cache.teachers[teacher].signals[signal]
    if term.name == "grad":
        start = statistics.mean_force_norm / scale.forces_std
    elif term.name == "vanilla2":
        start = mean_atomic_energy(cache, teacher, scale)
    elif term.loss == "cka":
        start = 1.0  # of unrelated features
    elif term.loss not in ("mse", "mae"):
        start = measured_start(term, cache, teacher, systems, rule)
    else:
        assert entry.statistics is not None  # complete signals have statistics
        variance = float(np.mean(entry.statistics.variance))
        start = variance if term.loss == "mse" else float(np.sqrt(variance))
    if not start > 0:
        raise CacheError(
            f"{cache.path}: signal {signal} of {teacher} is the same everywhere, nothing can be learnt "
            f"from it; drop --kd {term.label}, or give its weight as a number"
        )
    weight = zero_model_loss(statistics, scale, config) / start
    if not weight > 0:
        raise ConfigError(
            f"--kd {term.label}: auto makes the term as large as the loss on labels, which is zero here (see "
            "training.energy_weight and training.forces_weight, or labels are missing); give its weight as a "
            "number"
        )
    log.info("lambda(%s) = %.4g: the term starts as large as the base loss", term.label, weight)
    return weight
