"""What the labels of a store look like, for energy references, label scale and the start value of lambda."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.reader import Cache
from molkd.pipeline.data.references import N_ELEMENTS, LabelScale, count_elements, reference_table

_MAX_SYSTEMS = 100_000  # stored order is random, so the first ones are a fair sample
_RARE = 100  # systems that are read for every element, wherever they stand
_CHUNK = 2_000


@dataclass(frozen=True)
class LabelStatistics:
    """What a subset is trained on, of about 100,000 systems with every element among them."""

    counts: NDArray[np.int64]  # (S, 119) atoms of each element
    energies: NDArray[np.float64]  # (S,) eV, NaN where missing
    forces_rms: float  # eV/A, over components of free atoms; NaN if there are none
    mean_force_norm: float  # eV/A, over free atoms
    elements: tuple[int, ...]  # atomic numbers that occur anywhere in the subset
    n_labelled_forces: int  # free atoms whose force is a label, not the teacher's

    @property
    def n_energies(self) -> int:
        """Systems with an energy."""
        return int(np.isfinite(self.energies).sum())


def label_statistics(
    cache: Cache, subset: NDArray[np.bool_], teacher: str | None = None, signals: tuple[str, ...] = ()
) -> LabelStatistics:
    """Read the labels of a subset.

    Parameters
    ----------
    teacher, signals : where a label is missing the teacher's stands for it, as far as `signals` hold energy
        (or atomic_energies) and forces; the teacher's forces only count where no force is labelled at all
    """
    counts, energies = [], []
    labelled, taught = _ForceSums(), _ForceSums()
    kept_per_element = np.zeros(N_ELEMENTS, dtype=np.int64)
    n_kept = 0
    indices = np.flatnonzero(subset)
    for begin in range(0, len(indices), _CHUNK):
        part = indices[begin : begin + _CHUNK]
        numbers = cache.read(part, ("atomic_numbers",))["atomic_numbers"]
        composition = count_elements(numbers, cache.system_n_atoms[part])
        rare = composition[:, kept_per_element < _RARE].any(axis=1)
        chosen = rare | (n_kept + np.arange(len(part)) < _MAX_SYSTEMS)
        if not chosen.any():
            continue
        part, composition = part[chosen], composition[chosen]
        kept_per_element += (composition > 0).sum(axis=0)
        arrays = cache.read(part, ("energy", "forces", "fixed"), teacher=teacher, signals=signals)
        counts.append(composition)
        energies.append(_energies(arrays, cache.system_n_atoms[part]))
        free = ~arrays["fixed"].astype(bool)
        labelled.add(arrays["forces"], free)
        if "teacher/forces" in arrays:
            taught.add(arrays["teacher/forces"], free)
        n_kept += len(part)
    forces = labelled if labelled.n_atoms else taught
    return LabelStatistics(
        counts=np.concatenate(counts),
        energies=np.concatenate(energies),
        forces_rms=forces.rms,
        mean_force_norm=forces.mean_norm,
        elements=tuple(int(z) for z in np.flatnonzero(kept_per_element)),
        n_labelled_forces=labelled.n_atoms,
    )


@dataclass
class _ForceSums:
    n_atoms: int = 0
    squares: float = 0.0
    norms: float = 0.0

    def add(self, forces: NDArray[np.floating], free: NDArray[np.bool_]) -> None:
        known = forces[np.isfinite(forces).all(axis=1) & free].astype(np.float64)
        self.n_atoms += len(known)
        self.squares += float((known**2).sum())
        self.norms += float(np.linalg.norm(known, axis=1).sum())

    @property
    def rms(self) -> float:
        return float(np.sqrt(self.squares / (3 * self.n_atoms))) if self.n_atoms else float("nan")

    @property
    def mean_norm(self) -> float:
        return self.norms / self.n_atoms if self.n_atoms else float("nan")


def _energies(arrays: dict[str, NDArray[Any]], n_atoms: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return labels, and the teacher's energies where there are none and the teacher's were read."""
    labels: NDArray[np.float64] = arrays["energy"]
    if "teacher/energy" in arrays:
        taught = arrays["teacher/energy"]
    elif "teacher/atomic_energies" in arrays:
        taught = np.add.reduceat(arrays["teacher/atomic_energies"], np.cumsum(n_atoms) - n_atoms)
    else:
        return labels
    return np.where(np.isfinite(labels), labels, taught)


def mean_atomic_energy(cache: Cache, teacher: str, scale: LabelScale) -> float:
    """Return the mean absolute value of the teacher's atomic energies in normalised units, from a sample."""
    sample = np.arange(min(cache.n_systems, _CHUNK))
    arrays = cache.read(sample, ("atomic_numbers",), teacher=teacher, signals=("atomic_energies",))
    table = reference_table(scale.references)
    share = np.repeat(scale.energy_mean / cache.system_n_atoms[sample], cache.system_n_atoms[sample])
    residual = arrays["teacher/atomic_energies"] - table[arrays["atomic_numbers"]] - share
    return float(np.nanmean(np.abs(residual))) / scale.energy_std


def labelled_systems(cache: Cache, subset: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which systems of the subset have an energy or any force label, (S,)."""
    labelled = subset & np.isfinite(cache.energy)
    rest = np.flatnonzero(subset & ~labelled)
    for begin in range(0, len(rest), _CHUNK):
        part = rest[begin : begin + _CHUNK]
        forces = cache.read(part, ("forces",))["forces"]
        sizes = cache.system_n_atoms[part]
        known = np.isfinite(forces).all(axis=1)
        labelled[part] = np.add.reduceat(known, np.cumsum(sizes) - sizes) > 0
    return labelled
