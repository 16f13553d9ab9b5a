"""The teacher's energy and forces of structures that are in no store yet."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from molkd.pipeline.data.system import System
from molkd.pipeline.errors import TeacherError
from molkd.pipeline.graphs.batch import batch_from_systems, to_device
from molkd.pipeline.probing import cut_by_atoms
from molkd.pipeline.teachers.interface import Teacher


class Seen(NamedTuple):
    """What a teacher says of one system."""

    energy: float  # eV
    forces: NDArray[np.float64]  # (N, 3) eV/A


class Looking(NamedTuple):
    """A teacher and the atoms and edges that a batch for it may have."""

    teacher: Teacher
    max_atoms: int
    max_edges: int

    def batches(self, systems: Sequence[System]) -> list[Sequence[System]]:
        """Cut systems into groups of no more than `max_atoms`, at least one system each."""
        return cut_by_atoms(systems, self.max_atoms) if systems else []

    def look(self, systems: Sequence[System]) -> list[Seen]:
        """Return energy and forces of every system, in order.

        Raises
        ------
        TeacherError
            If a single system needs more memory than the device has.
        """
        return [seen for part in self.batches(systems) for seen in self._look(part)]

    def _look(self, systems: Sequence[System]) -> list[Seen]:
        teacher = self.teacher
        batch = batch_from_systems(systems, teacher.neighbor_rule, teacher.dtype)
        n_edges = batch.edge_index.shape[1]
        found = None
        if n_edges <= self.max_edges or len(systems) == 1:
            try:
                found = teacher.compute(to_device(batch, teacher.device), ("energy", "forces"))
            except torch.OutOfMemoryError:
                if len(systems) == 1:
                    raise TeacherError(
                        f"{systems[0].source}: {batch.n_atoms} atoms with {n_edges} edges need more memory "
                        f"than {teacher.device} has; take smaller structures, or --device cpu"
                    ) from None
        if found is None:
            half = len(systems) // 2
            return [*self._look(systems[:half]), *self._look(systems[half:])]
        energies = found["energy"].double().cpu().numpy()
        forces = found["forces"].double().cpu().numpy()
        ends = np.cumsum([s.n_atoms for s in systems])
        return [Seen(float(e), f) for e, f in zip(energies, np.split(forces, ends[:-1]), strict=True)]


def largest_force(forces: NDArray[np.float64], fixed: NDArray[np.bool_]) -> float:
    """Return the largest norm of a force on a free atom in eV/A, 0 if all are fixed, NaN if one is NaN."""
    norms = np.linalg.norm(forces[~fixed], axis=1)
    return float(norms.max(initial=0.0)) if np.isfinite(norms).all() else float("nan")
