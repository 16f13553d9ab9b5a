"""The four OC20 metrics (energy MAE, force MAE, force cosine, EFwT) and their relatives, as streaming sums.

Definitions are those of OC20's S2EF evaluator, so that numbers compare with published ones: every metric is
one sum over all systems, atoms or components of the data set, divided by their count, never a mean of means.
"""

import math
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
from numpy.typing import NDArray

from molkd.pipeline.units import MILLI

EFWT_ENERGY = 0.02  # eV
EFWT_FORCE = 0.03  # eV/A, on every component of every free atom
_MIN_NORM = 1e-8  # eV/A; a shorter force counts as this long in a cosine, so that a zero force gives 0


@dataclass(frozen=True)
class MetricSpec:
    """How a metric stands in a report: key and title with unit, and which `Metrics` field times what."""

    key: str
    title: str
    field: str
    factor: float
    larger_is_better: bool = False
    decimals: int | None = None  # None: three significant digits


REPORTED = {
    m.key: m
    for m in (
        MetricSpec("energy_mae_meV", "energy MAE (meV)", "energy_mae", MILLI),
        MetricSpec("force_mae_meV_A", "force MAE (meV/Å)", "force_mae", MILLI),
        MetricSpec("force_cos", "force cosine", "force_cos", 1.0, larger_is_better=True, decimals=4),
        MetricSpec("efwt_percent", "EFwT (%)", "efwt", 100.0, larger_is_better=True, decimals=2),
    )
}


@dataclass(frozen=True)
class Metrics:
    """Results in eV and eV/A; NaN where nothing was labelled (count 0) or a prediction was not finite."""

    energy_mae: float  # eV
    energy_mae_per_atom: float  # eV, error of each system divided by its number of atoms
    force_mae: float  # eV/A, mean over the components of labelled free atoms
    force_rmse: float  # eV/A, over the same components
    force_cos: float  # mean over labelled free atoms of the cosine between predicted and labelled force
    force_magnitude_error: float  # eV/A, mean over the same atoms of the difference of the norms
    efwt: float  # share of systems within EFWT_ENERGY and EFWT_FORCE
    n_systems: int  # all that were seen
    n_energies: int  # with an energy label
    n_force_atoms: int  # free, with a force label
    n_efwt: int  # with an energy label and a force label on every free atom

    def to_report(self) -> dict[str, float | None]:
        """Return energy_mae_meV, force_mae_meV_A, force_cos, efwt_percent; None if nothing was labelled."""
        counts = {"energy_mae": self.n_energies, "efwt": self.n_efwt}
        return {
            m.key: m.factor * getattr(self, m.field) if counts.get(m.field, self.n_force_atoms) else None
            for m in REPORTED.values()
        }


@dataclass
class MetricSums:
    """Sums and counts in float64 that add up over batches, workers and ranks to the same `Metrics`."""

    energy_error: float = 0.0
    energy_error_per_atom: float = 0.0
    force_error: float = 0.0
    force_squared_error: float = 0.0
    force_cosine: float = 0.0
    force_magnitude_error: float = 0.0
    within_threshold: float = 0.0
    n_systems: float = 0.0
    n_energies: float = 0.0
    n_force_atoms: float = 0.0
    n_efwt: float = 0.0

    def update(
        self,
        *,
        energy_pred: NDArray[np.floating],
        energy_label: NDArray[np.floating],
        forces_pred: NDArray[np.floating],
        forces_label: NDArray[np.floating],
        system_idx: NDArray[np.integer],
        fixed: NDArray[np.bool_],
    ) -> None:
        """Add a batch of whole systems.

        A NaN label is missing and left out: a system with only an energy, or only forces, counts where it
        can. An atom's force counts if all three components are labelled and the atom is not fixed.

        Parameters
        ----------
        energy_pred, energy_label : (S,), eV
        forces_pred, forces_label : (N, 3), eV/A
        system_idx : (N,), which of the S systems an atom belongs to
        fixed : (N,), atoms held in place

        Notes
        -----
        The cosine of a zero force, predicted or labelled, is 0 and counts (OC20: norms are clipped at 1e-8).
        EFwT compares with "less than", on systems with an energy label, at least one free atom and a label on
        every free atom.
        """
        n_systems = len(energy_label)
        atoms_per_system = np.bincount(system_idx, minlength=n_systems)
        energy_error = np.abs(
            np.asarray(energy_pred, np.float64) - np.asarray(energy_label, np.float64)
        )  # (S,)
        has_energy = ~np.isnan(energy_label)
        free = ~np.asarray(fixed, bool)
        labelled = free & ~np.isnan(forces_label).any(axis=1)  # (N,)

        self.n_systems += n_systems
        self.n_energies += int(has_energy.sum())
        self.energy_error += float(energy_error[has_energy].sum())
        self.energy_error_per_atom += float(
            (energy_error / np.maximum(atoms_per_system, 1))[has_energy].sum()
        )
        self._update_forces(forces_pred[labelled], forces_label[labelled])

        force_error = np.abs(np.float64(forces_pred) - np.float64(forces_label)).max(
            axis=1, initial=0.0
        )  # (N,)
        within = labelled & (force_error < EFWT_FORCE)
        n_free = np.bincount(system_idx[free], minlength=n_systems)
        n_labelled = np.bincount(system_idx[labelled], minlength=n_systems)
        n_within = np.bincount(system_idx[within], minlength=n_systems)
        complete = has_energy & (n_free > 0) & (n_labelled == n_free)
        self.n_efwt += int(complete.sum())
        self.within_threshold += int((complete & (energy_error < EFWT_ENERGY) & (n_within == n_free)).sum())

    def _update_forces(self, pred: NDArray[np.floating], label: NDArray[np.floating]) -> None:
        pred, label = pred.astype(np.float64), label.astype(np.float64)
        error = pred - label  # (N, 3)
        pred_norm, label_norm = np.linalg.norm(pred, axis=1), np.linalg.norm(label, axis=1)
        cosine = (pred * label).sum(axis=1) / (
            np.maximum(pred_norm, _MIN_NORM) * np.maximum(label_norm, _MIN_NORM)
        )
        self.n_force_atoms += len(label)
        self.force_error += float(np.abs(error).sum())
        self.force_squared_error += float((error**2).sum())
        self.force_cosine += float(cosine.sum())
        self.force_magnitude_error += float(np.abs(pred_norm - label_norm).sum())

    def merge(self, other: Self) -> None:
        """Add the sums of another worker or rank."""
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))

    def result(self) -> Metrics:
        """Divide the sums by their counts."""
        return Metrics(
            energy_mae=_ratio(self.energy_error, self.n_energies),
            energy_mae_per_atom=_ratio(self.energy_error_per_atom, self.n_energies),
            force_mae=_ratio(self.force_error, 3 * self.n_force_atoms),
            force_rmse=math.sqrt(_ratio(self.force_squared_error, 3 * self.n_force_atoms)),
            force_cos=_ratio(self.force_cosine, self.n_force_atoms),
            force_magnitude_error=_ratio(self.force_magnitude_error, self.n_force_atoms),
            efwt=_ratio(self.within_threshold, self.n_efwt),
            n_systems=int(self.n_systems),
            n_energies=int(self.n_energies),
            n_force_atoms=int(self.n_force_atoms),
            n_efwt=int(self.n_efwt),
        )


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan
