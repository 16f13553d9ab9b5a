"""What a distillation loss is worth for a student that knows nothing, where the manifest does not tell it."""

import numpy as np
import torch
from numpy.typing import NDArray

from molkd.cache_schema.reader import Cache
from molkd.pipeline.config import STRUCTURE_LOSSES, KDTerm
from molkd.pipeline.distill.feature_losses import structure_loss
from molkd.pipeline.distill.losses import feature_loss
from molkd.pipeline.graphs.batch import BATCH_FIELDS, batch_from_arrays
from molkd.pipeline.graphs.neighbors import NeighborRule

_SAMPLE_ATOMS = 4000


def measured_start(
    term: KDTerm, cache: Cache, teacher: str, systems: NDArray[np.integer], rule: NeighborRule
) -> float:
    """Return a loss on features over the first systems, for a student to which all atoms are alike.

    For huber it knows the signal's mean. Atoms that are alike have distance zero in gsp, and neighbors that
    are alike have the same share in lsp.

    Parameters
    ----------
    systems : (S,) stored indices of what is trained on; their order is random, so a few are a fair sample
    rule : how the student finds neighbors
    """
    n_sample = 1 + int(np.searchsorted(np.cumsum(cache.system_n_atoms[systems]), _SAMPLE_ATOMS))
    relations = term.loss in STRUCTURE_LOSSES
    arrays = cache.read(systems[:n_sample], BATCH_FIELDS if relations else (), teacher, (term.teacher_tap,))
    values = arrays[f"teacher/{term.teacher_tap}"]
    target = torch.from_numpy(np.ascontiguousarray(values, np.float32))  # (N, C), (N, 3, C) or (E, C)
    if relations:
        batch = batch_from_arrays(arrays, rule)
        return float(structure_loss(term.loss, torch.zeros_like(target), target, batch))
    mean = torch.zeros(target.shape[-1])  # a head of vectors has no bias
    entry = cache.teachers[teacher].signals[term.teacher_tap]
    if entry.spec.symmetry == "invariant" and entry.statistics is not None:
        mean = torch.from_numpy(entry.statistics.mean.astype(np.float32))
    return float(feature_loss(mean.expand_as(target), target, term.loss, delta=term.delta))
