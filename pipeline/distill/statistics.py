"""What the labels of a store look like, for energy references, label scale and the start value of lambda."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.reader import Cache
from molkd.pipeline.data.references import N_ELEMENTS, LabelScale, count_elements, reference_table

_MAX_SYSTEMS = 100_000  # stored order is random, so the first ones are a fair sample
_CHUNK = 2_000


@dataclass(frozen=True)
class LabelStatistics:
    """Labels of up to 100,000 systems of a subset."""

    counts: NDArray[np.int64]  # (S, 119) atoms of each element
    energies: NDArray[np.float64]  # (S,) eV, NaN where missing
    forces_rms: float  # eV/A, over components of free atoms; NaN if there are none
    mean_force_norm: float  # eV/A, over free atoms
    elements: tuple[int, ...]  # atomic numbers that occur

    @property
    def n_energies(self) -> int:
        """Systems with an energy."""
        return int(np.isfinite(self.energies).sum())


def label_statistics(cache: Cache, subset: NDArray[np.bool_], teacher: str | None = None) -> LabelStatistics:
    """Read labels of the subset, or the teacher's energies and forces if `teacher` is given."""
    indices = np.flatnonzero(subset)[:_MAX_SYSTEMS]
    counts = np.zeros((len(indices), N_ELEMENTS), dtype=np.int64)
    energies = np.full(len(indices), np.nan)
    square_sum = norm_sum = 0.0
    n_free = 0
    signals = ("energy", "forces") if teacher else ()
    prefix = "teacher/" if teacher else ""
    for begin in range(0, len(indices), _CHUNK):
        part = indices[begin : begin + _CHUNK]
        arrays = cache.read(
            part, ("atomic_numbers", "energy", "forces", "fixed"), teacher=teacher, signals=signals
        )
        counts[begin : begin + len(part)] = count_elements(
            arrays["atomic_numbers"], cache.system_n_atoms[part]
        )
        energies[begin : begin + len(part)] = arrays[f"{prefix}energy"]
        forces = arrays[f"{prefix}forces"].astype(np.float64)
        forces = forces[np.isfinite(forces).all(axis=1) & ~arrays["fixed"].astype(bool)]
        square_sum += float((forces**2).sum())
        norm_sum += float(np.linalg.norm(forces, axis=1).sum())
        n_free += len(forces)
    return LabelStatistics(
        counts=counts,
        energies=energies,
        forces_rms=float(np.sqrt(square_sum / (3 * n_free))) if n_free else float("nan"),
        mean_force_norm=norm_sum / n_free if n_free else float("nan"),
        elements=tuple(int(z) for z in np.flatnonzero(counts.any(axis=0))),
    )


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
