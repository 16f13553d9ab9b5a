"""The teacher over batches of a store; batches that are too large for the device are halved."""

import logging
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molkd.cache_schema.reader import Cache
from molkd.pipeline.errors import TeacherError
from molkd.pipeline.graphs.batch import (
    BATCH_FIELDS,
    Batch,
    batch_from_arrays,
    edges_ptr,
    split_batch,
    to_device,
)
from molkd.pipeline.graphs.neighbors import NeighborRule
from molkd.pipeline.scope import source_of
from molkd.pipeline.teachers.interface import Teacher

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """One batch of consecutive systems of a shard."""

    indices: NDArray[np.int64]  # stored system indices
    batch: Batch
    n_atoms: NDArray[np.int64]

    @property
    def n_edges(self) -> int:
        """Number of edges E."""
        return self.batch.edge_index.shape[1]

    def split(self, borders: Sequence[int]) -> list["Work"]:
        """Return parts of it; borders begin with 0 and end with the number of systems."""
        if len(borders) == 2:
            return [self]
        batches = split_batch(self.batch, borders)
        cuts = [slice(*border) for border in pairwise(borders)]
        return [Work(self.indices[c], b, self.n_atoms[c]) for c, b in zip(cuts, batches, strict=True)]


def make_work(
    cache: Cache,
    indices: NDArray[np.int64],
    rule: NeighborRule,
    dtype: torch.dtype,
    max_atoms: int,
    max_edges: int,
) -> Iterator[Work]:
    """Cut consecutive systems into batches within budgets of atoms and edges; one system always fits."""
    n_atoms = cache.system_n_atoms[indices].astype(np.int64)
    begin = 0
    while begin < len(indices):
        fits = np.searchsorted(np.cumsum(n_atoms[begin:]), max_atoms, side="right")
        end = begin + max(int(fits), 1)
        yield from _split_by_edges(build_work(cache, indices[begin:end], rule, dtype), max_edges)
        begin = end


def _split_by_edges(work: Work, max_edges: int) -> list[Work]:
    """Fill up one part after the other, each with one system at least."""
    ends = edges_ptr(work.batch)[1:].numpy()  # (S,)
    borders, n_before = [0], 0
    while borders[-1] < len(ends):
        fits = int(np.searchsorted(ends, n_before + max_edges, side="right"))
        borders.append(max(fits, borders[-1] + 1))
        n_before = int(ends[borders[-1] - 1])
    return work.split(borders)


def build_work(cache: Cache, indices: NDArray[np.int64], rule: NeighborRule, dtype: torch.dtype) -> Work:
    """Read systems and build one batch of them."""
    arrays = cache.read(indices, BATCH_FIELDS)
    return Work(indices, batch_from_arrays(arrays, rule, dtype), arrays["n_atoms"].astype(np.int64))


class TeacherPass:
    """Computes signals of one piece of work after another and learns what the device can hold."""

    def __init__(self, teacher: Teacher, cache: Cache) -> None:
        self.teacher, self.cache = teacher, cache
        self._too_many_edges = math.inf  # so many did not fit before: halve at once instead of failing again

    def run(self, work: Work, signals: Collection[str]) -> Iterator[tuple[Work, dict[str, Tensor]]]:
        """Yield the work with its signals, in parts and in order if it does not fit in one.

        Raises
        ------
        TeacherError
            If a single system needs more memory than the device has.
        """
        is_single = len(work.indices) == 1
        if is_single or work.n_edges < self._too_many_edges:
            found = self._try(work, signals)
            if found is not None:
                yield work, found
                return
            if is_single:
                raise TeacherError(
                    f"{source_of(self.cache, int(work.indices[0]))}: {work.batch.n_atoms} atoms with "
                    f"{work.n_edges} edges need more memory than {self.teacher.device} has; "
                    "leave this system out, take a larger device, or --device cpu"
                )
            self._too_many_edges = min(self._too_many_edges, work.n_edges)
            log.warning(
                "%s is out of memory at %d atoms and %d edges, going on with half; lower --batch-edges",
                self.teacher.device, work.batch.n_atoms, work.n_edges,
            )  # fmt: skip
        n_systems = len(work.indices)
        for half in work.split((0, n_systems // 2, n_systems)):
            yield from self.run(half, signals)

    def _try(self, work: Work, signals: Collection[str]) -> dict[str, Tensor] | None:
        """Return the signals, None if they do not fit; what the failed attempt held is free then."""
        try:
            return self.teacher.compute(to_device(work.batch, self.teacher.device), signals)
        except torch.OutOfMemoryError:
            pass  # only after this block is the traceback gone, and with it what it keeps alive
        torch.cuda.empty_cache()
        return None
