"""The four OC20 metrics (energy MAE, force MAE, force cosine, EFwT) and their relatives, as streaming sums.

Definitions are those of OC20's S2EF evaluator, so that numbers compare with published ones: every metric is
one sum over all systems, atoms or components of the data set, divided by their count, never a mean of means.
"""

import math
from dataclasses import dataclass, fields
from typing import Self, TypedDict, Unpack

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

    @classmethod
    def of(cls, terms: NDArray[np.float64]) -> Self:
        """Return the sums that a row (T,) in the order of `TERMS` holds."""
        return cls(**dict(zip(TERMS, terms.tolist(), strict=True)))

    def add(self, terms: NDArray[np.float64]) -> None:
        """Add systems, from their terms (S, T) in the order of `TERMS`."""
        self.merge(type(self).of(terms.sum(axis=0)))

    def update(self, **batch: Unpack["LabelledBatch"]) -> None:
        """Add a batch of whole systems, see `system_terms`."""
        self.add(system_terms(**batch)[0])

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


TERMS = tuple(f.name for f in fields(MetricSums))  # T columns: what each system or atom adds to the sums


class LabelledBatch(TypedDict):
    """Predictions beside labels of S whole systems with N atoms."""

    energy_pred: NDArray[np.floating]  # (S,) eV
    energy_label: NDArray[np.floating]  # (S,) eV
    forces_pred: NDArray[np.floating]  # (N, 3) eV/A
    forces_label: NDArray[np.floating]  # (N, 3) eV/A
    system_idx: NDArray[np.integer]  # (N,), which of the S systems an atom belongs to
    fixed: NDArray[np.bool_]  # (N,), atoms held in place


def system_terms(**batch: Unpack[LabelledBatch]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what each system (S, T) and each atom (N, T) adds to the sums.

    A NaN label is missing and left out: a system with only an energy, or only forces, counts where it can. An
    atom's force counts if all three components are labelled and the atom is not fixed. The terms of atoms are
    those of forces, the rest are zero.

    Notes
    -----
    The cosine of a zero force, predicted or labelled, is 0 and counts (OC20: norms are clipped at 1e-8). EFwT
    compares with "less than", on systems with an energy label, at least one free atom and a label on every
    free atom.
    """
    system_idx, energy_label = batch["system_idx"], np.asarray(batch["energy_label"], np.float64)
    forces_pred = np.asarray(batch["forces_pred"], np.float64)
    forces_label = np.asarray(batch["forces_label"], np.float64)
    n_systems = len(energy_label)
    n_atoms = np.bincount(system_idx, minlength=n_systems)
    free = ~np.asarray(batch["fixed"], bool)
    labelled = free & ~np.isnan(forces_label).any(axis=1)  # (N,)
    of_atoms = np.zeros((len(forces_label), len(TERMS)))
    of_forces = _force_terms(forces_pred[labelled], forces_label[labelled])
    of_systems = np.zeros((n_systems, len(TERMS)))
    for name, values in of_forces.items():
        of_atoms[labelled, TERMS.index(name)] = values
        of_systems[:, TERMS.index(name)] = np.bincount(system_idx[labelled], values, n_systems)

    energy_error = np.abs(np.asarray(batch["energy_pred"], np.float64) - energy_label)  # (S,)
    has_energy = ~np.isnan(energy_label)
    largest = np.abs(forces_pred - forces_label).max(axis=1, initial=0.0)  # (N,) eV/A
    n_free, n_labelled, n_within = (
        np.bincount(system_idx[mask], minlength=n_systems)
        for mask in (free, labelled, labelled & (largest < EFWT_FORCE))
    )
    complete = has_energy & (n_free > 0) & (n_labelled == n_free)
    others = {
        "energy_error": np.where(has_energy, energy_error, 0.0),
        "energy_error_per_atom": np.where(has_energy, energy_error / np.maximum(n_atoms, 1), 0.0),
        "within_threshold": complete & (energy_error < EFWT_ENERGY) & (n_within == n_free),
        "n_systems": 1.0,
        "n_energies": has_energy,
        "n_efwt": complete,
    }
    for name, column in others.items():
        of_systems[:, TERMS.index(name)] = column
    return of_systems, of_atoms


def _force_terms(pred: NDArray[np.float64], label: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Return what each of N labelled free atoms adds, from its forces (N, 3)."""
    error = pred - label
    pred_norm, label_norm = np.linalg.norm(pred, axis=1), np.linalg.norm(label, axis=1)
    norms = np.maximum(pred_norm, _MIN_NORM) * np.maximum(label_norm, _MIN_NORM)
    return {
        "force_error": np.abs(error).sum(axis=1),
        "force_squared_error": (error**2).sum(axis=1),
        "force_cosine": (pred * label).sum(axis=1) / norms,
        "force_magnitude_error": np.abs(pred_norm - label_norm),
        "n_force_atoms": np.ones(len(label)),
    }


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan
