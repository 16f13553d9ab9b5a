"""What an evaluation gathers batch by batch in bounded memory: sums, points to plot, breakdowns, the tail."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from molkd.pipeline.data.system import System
from molkd.pipeline.evaluation.breakdown import GroupSums, check_kind
from molkd.pipeline.evaluation.metrics import MetricSums, system_terms
from molkd.pipeline.evaluation.result import Evaluation, Parity
from molkd.pipeline.evaluation.sample import RowSample
from molkd.pipeline.evaluation.tail import ErrorHistogram
from molkd.pipeline.evaluation.throughput import Throughput
from molkd.pipeline.evaluation.worst import WorstSystems

MAX_PARITY_ENERGIES = 5_000
MAX_PARITY_FORCES = 10_000  # atoms; three points each


class Collector:
    """Compares predictions with labels; the outcome does not depend on how systems were batched."""

    def __init__(self, seed: int, breakdowns: Sequence[str], worst: WorstSystems | None = None) -> None:
        self._sums = MetricSums()
        self._energies = RowSample(MAX_PARITY_ENERGIES, n_columns=3, seed=seed)
        self._forces = RowSample(MAX_PARITY_FORCES, n_columns=6, seed=seed + 1)
        self._groups = [GroupSums(check_kind(kind)) for kind in dict.fromkeys(breakdowns)]
        self._energy_errors, self._force_errors = ErrorHistogram(), ErrorHistogram()
        self._worst = WorstSystems() if worst is None else worst

    def add(
        self, systems: Sequence[System], energy_pred: NDArray[np.float64], forces_pred: NDArray[np.float64]
    ) -> None:
        """Add systems with their predicted energies (S,) in eV and forces (N, 3) in eV/A."""
        n_atoms = np.array([s.n_atoms for s in systems])
        energy_label = np.array([s.energy for s in systems], dtype=np.float64)  # (S,)
        forces_label = np.concatenate([s.forces for s in systems])  # (N, 3)
        fixed = np.concatenate([s.fixed for s in systems])  # (N,)
        of_systems, of_atoms = system_terms(
            energy_pred=energy_pred,
            energy_label=energy_label,
            forces_pred=forces_pred,
            forces_label=forces_label,
            system_idx=np.repeat(np.arange(len(systems)), n_atoms),
            fixed=fixed,
        )
        self._sums.add(of_systems)
        for group in self._groups:
            group.update(systems, of_systems, of_atoms)
        for system, energy, forces in zip(
            systems, energy_pred, split_atoms(forces_pred, systems), strict=True
        ):
            self._worst.add(system, float(energy), forces)

        has_energy = ~np.isnan(energy_label)
        has_forces = ~fixed & ~np.isnan(forces_label).any(axis=1)
        self._energies.add(np.stack([energy_pred, energy_label, n_atoms], axis=1)[has_energy])
        self._forces.add(np.concatenate([forces_pred, forces_label], axis=1)[has_forces])
        self._energy_errors.add(np.abs(energy_pred - energy_label)[has_energy])
        self._force_errors.add(np.abs(forces_pred - forces_label)[has_forces].ravel())

    def result(self, throughput: Throughput | None, weights_sha256: str, data_fingerprint: str) -> Evaluation:
        """Return all of it."""
        energy_rows, force_rows = self._energies.rows(), self._forces.rows()
        return Evaluation(
            metrics=self._sums.result(),
            systems_per_second=throughput.median if throughput else None,
            parity=Parity(
                energy_pred=energy_rows[:, 0],
                energy_label=energy_rows[:, 1],
                n_atoms=energy_rows[:, 2].astype(np.int64),
                forces_pred=force_rows[:, :3],
                forces_label=force_rows[:, 3:],
            ),
            weights_sha256=weights_sha256,
            data_fingerprint=data_fingerprint,
            throughput=throughput,
            breakdowns={group.kind: group.result() for group in self._groups},
            energy_tail=self._energy_errors.result(),
            force_tail=self._force_errors.result(),
            worst=self._worst.result(),
        )


def split_atoms(values: NDArray[np.float64], systems: Sequence[System]) -> list[NDArray[np.float64]]:
    """Cut an array over atoms (N, ...) into one a system."""
    return np.split(values, np.cumsum([s.n_atoms for s in systems])[:-1])
