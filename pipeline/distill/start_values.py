"""What a distillation loss is worth for a student that knows nothing, where the manifest does not tell it."""

import numpy as np
import torch
from numpy.typing import NDArray

from molkd.cache_schema.reader import Cache
from molkd.pipeline.config import KDTerm
from molkd.pipeline.distill.losses import feature_loss

_SAMPLE_ATOMS = 4000


def measured_start(term: KDTerm, cache: Cache, teacher: str, systems: NDArray[np.integer]) -> float:
    """Return a loss on features over the first systems, for a student that knows only the signal's mean.

    Parameters
    ----------
    systems : (S,) stored indices of what is trained on; their order is random, so a few are a fair sample
    """
    n_sample = 1 + int(np.searchsorted(np.cumsum(cache.system_n_atoms[systems]), _SAMPLE_ATOMS))
    values = cache.read(systems[:n_sample], (), teacher, (term.teacher_tap,))[f"teacher/{term.teacher_tap}"]
    target = torch.from_numpy(np.ascontiguousarray(values, np.float32))  # (N, C), (N, 3, C) or (E, C)
    mean = torch.zeros(target.shape[-1])  # a head of vectors has no bias
    entry = cache.teachers[teacher].signals[term.teacher_tap]
    if entry.spec.symmetry == "invariant" and entry.statistics is not None:
        mean = torch.from_numpy(entry.statistics.mean.astype(np.float32))
    return float(feature_loss(mean.expand_as(target), target, term.loss, delta=term.delta))
