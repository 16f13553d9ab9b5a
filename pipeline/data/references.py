"""Energy references per element, and the scale in which models see labels."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import ArrayLike, NDArray

from molkd.pipeline.errors import DataError

_log = logging.getLogger(__name__)

N_ELEMENTS = 119  # a column per atomic number, 0 unused
MIN_STD = 1e-6  # eV, eV/A; below, labels are equal up to rounding, and dividing would blow the rounding up
_ROWS_PER_BLOCK = 65536
_RANK_TOLERANCE = 1e-9  # compositions are whole numbers; smaller singular values are rounding of the QR

ScaleMode = Literal["energy", "forces", "none"]


def count_elements(atomic_numbers: NDArray[np.integer], n_atoms: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return the composition (S, 119) of systems given by concatenated atomic numbers (N,) and sizes (S,)."""
    system_idx = np.repeat(np.arange(len(n_atoms)), n_atoms)
    flat = np.bincount(system_idx * N_ELEMENTS + atomic_numbers, minlength=len(n_atoms) * N_ELEMENTS)
    return flat.reshape(len(n_atoms), N_ELEMENTS)


def fit_references(counts: NDArray[np.number], energies: ArrayLike) -> dict[int, float]:
    """Fit one energy per element, so that their sums come closest to the energies (least squares, float64).

    Where the compositions cannot tell all elements apart (water alone, for one), the solution closest to the
    mean energy per atom is taken and a warning logged: sums are still right for compositions like the fitted.

    Parameters
    ----------
    counts : (S, 119), atoms of each element
    energies : (S,), eV; NaN are left out

    Returns
    -------
    references : atomic number -> eV, for the elements that occur in a labelled system

    Raises
    ------
    DataError
        If no system has an energy.
    """
    target = np.asarray(energies, dtype=np.float64)
    labelled = np.isfinite(target)
    if not labelled.any():
        raise DataError(
            "energy references cannot be fitted, no system has an energy label. Give them, or do without."
        )
    elements = np.flatnonzero(counts[labelled].any(axis=0))
    mean_per_atom = target[labelled].sum() / counts[labelled].sum()
    # A QR factor over blocks of rows keeps memory small and, unlike the normal equations, all digits.
    factor = np.empty((0, len(elements) + 1))
    rows = np.flatnonzero(labelled)
    for begin in range(0, len(rows), _ROWS_PER_BLOCK):
        block = counts[np.ix_(rows[begin : begin + _ROWS_PER_BLOCK], elements)].astype(np.float64)
        residual = target[rows[begin : begin + _ROWS_PER_BLOCK]] - mean_per_atom * block.sum(axis=1)
        stacked = np.vstack([factor, np.column_stack([block, residual])])
        factor = np.asarray(np.linalg.qr(stacked, mode="r"))
    correction, _, rank, _ = np.linalg.lstsq(factor[:, :-1], factor[:, -1], rcond=_RANK_TOLERANCE)
    if rank < len(elements):
        _log.warning(
            "energy references: the %d systems tell only %d of %d elements apart; the rest is chosen closest "
            "to the mean of %.3f eV per atom. Give references if new compositions will be predicted.",
            len(rows),
            rank,
            len(elements),
            mean_per_atom,
        )
    return {int(z): float(mean_per_atom + c) for z, c in zip(elements, correction, strict=True)}


def sum_references(counts: NDArray[np.number], references: Mapping[int, float]) -> NDArray[np.float64]:
    """Return the reference energy (S,) in eV of each system; without any references it is zero.

    Raises
    ------
    DataError
        If references are given, but not for an element that occurs.
    """
    if not references:
        return np.zeros(len(counts))
    present = np.flatnonzero(counts.any(axis=0))
    missing = [chemical_symbols[z] for z in present if z not in references]
    if missing:
        raise DataError(
            f"no energy reference for {', '.join(missing)}; there are references for "
            f"{', '.join(chemical_symbols[z] for z in sorted(references))}. Fit them on data with "
            "these elements, or give them."
        )
    return counts.astype(np.float64) @ reference_table(references)


def reference_table(references: Mapping[int, float]) -> NDArray[np.float64]:
    """Return references as a table (119,) in eV by atomic number, zero where there is none."""
    table = np.zeros(N_ELEMENTS)
    for z, value in references.items():
        table[z] = value
    return table


@dataclass(frozen=True)
class LabelScale:
    """Normalised labels: ``(energy - references - energy_mean) / energy_std`` and ``forces / forces_std``.

    As in OCP, mean and std belong to the energy of a whole system, not of an atom.
    """

    energy_mean: float = 0.0  # eV
    energy_std: float = 1.0  # eV
    forces_std: float = 1.0  # eV/A
    references: dict[int, float] = field(default_factory=dict)  # atomic number -> eV

    def __post_init__(self) -> None:
        values = (self.energy_mean, self.energy_std, self.forces_std, *self.references.values())
        if not np.isfinite(values).all() or self.energy_std <= 0 or self.forces_std <= 0:
            raise DataError(
                f"a label scale needs finite numbers and positive standard deviations, found {self}."
            )

    def normalize_energy(
        self, energy: NDArray[np.floating], counts: NDArray[np.number]
    ) -> NDArray[np.float64]:
        """Return normalised energies (S,) of energies (S,) in eV and compositions (S, 119)."""
        return (
            np.asarray(energy, np.float64) - sum_references(counts, self.references) - self.energy_mean
        ) / (self.energy_std)

    def restore_energy(
        self, normalized: NDArray[np.floating], counts: NDArray[np.number]
    ) -> NDArray[np.float64]:
        """Return energies (S,) in eV of normalised ones."""
        scaled = np.asarray(normalized, np.float64) * self.energy_std
        return scaled + self.energy_mean + sum_references(counts, self.references)

    def normalize_forces(self, forces: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return normalised forces (N, 3) of forces in eV/A."""
        return np.asarray(forces, np.float64) / self.forces_std

    def restore_forces(self, normalized: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return forces (N, 3) in eV/A of normalised ones."""
        return np.asarray(normalized, np.float64) * self.forces_std

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; atomic numbers become strings."""
        return {
            "energy_mean": self.energy_mean,
            "energy_std": self.energy_std,
            "forces_std": self.forces_std,
            "references": {str(z): e for z, e in sorted(self.references.items())},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LabelScale":
        """Return the scale that `to_dict` wrote."""
        references = {int(z): float(e) for z, e in values["references"].items()}
        return cls(
            float(values["energy_mean"]), float(values["energy_std"]), float(values["forces_std"]), references
        )


def fit_label_scale(
    counts: NDArray[np.number],
    energies: ArrayLike,
    force_rms: float,
    mode: ScaleMode,
    references: Mapping[int, float] | Literal["fit", "none"] = "none",
) -> LabelScale:
    """Measure mean and standard deviation of the labels of training systems.

    Parameters
    ----------
    counts : (S, 119), compositions
    energies : (S,), eV; NaN are left out
    force_rms : root mean square of the force components, eV/A
    mode : "energy" takes the std of the referenced energies for both (OC20), "forces" takes `force_rms` for
        both, which also works where energies are few, "none" leaves labels as they are
    references : atomic number -> eV, subtracted before anything else; "fit" fits them to the energies, if any

    Raises
    ------
    DataError
        If the labels that `mode` needs are missing.
    """
    target = np.asarray(energies, dtype=np.float64)
    labelled = np.isfinite(target)
    if references == "fit":
        subtracted = fit_references(counts, target) if labelled.any() else {}
    else:
        subtracted = {} if references == "none" else dict(references)
    if mode == "none":
        return LabelScale(references=subtracted)
    referenced = target[labelled] - sum_references(counts[labelled], subtracted)
    if mode == "energy" and len(referenced) == 0:
        raise DataError(
            "labels cannot be scaled by energies, no system has one. Scale by forces, or not at all: "
            "training.normalization=forces, or none."
        )
    mean = float(referenced.mean()) if len(referenced) else 0.0
    std = float(referenced.std()) if mode == "energy" else float(force_rms)
    if not std > MIN_STD:
        what = (
            f"energies vary by {std:.1e} eV only"
            if mode == "energy"
            else "force labels are missing or all zero"
        )
        raise DataError(
            f"labels cannot be scaled by {mode}: {what}. Choose another: "
            "training.normalization is energy, forces or none."
        )
    return LabelScale(mean, std, std, subtracted)
