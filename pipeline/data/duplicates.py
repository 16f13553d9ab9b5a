"""The same structure met twice: keep one, prefer labels, refuse contradictions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.identity import ID_BYTES
from molkd.pipeline.errors import DataError

ENERGY_TOLERANCE = 1e-6  # eV; the same calculation written with different numbers of digits
_N_SHOWN = 5


@dataclass(frozen=True)
class DuplicateReport:
    """What was left out; goes into the store's provenance."""

    n_same: int  # copies with the same labels, or with none on either side
    n_unlabelled: int  # copies with fewer labels than the one kept

    @property
    def n_dropped(self) -> int:
        """Number of systems left out."""
        return self.n_same + self.n_unlabelled


def resolve_duplicates(
    ids: NDArray[np.uint8],
    energies: NDArray[np.float64],
    has_forces: NDArray[np.bool_],
    sources: Sequence[str],
) -> tuple[NDArray[np.bool_], DuplicateReport]:
    """Choose one system of each content id: the one with most labels, among equals the first.

    Parameters
    ----------
    ids : (S, 16), content ids
    energies : (S,), eV, NaN where missing
    has_forces : (S,), whether force labels exist
    sources : S names for messages

    Returns
    -------
    keep_mask : (S,)
    report : counts of what was left out

    Raises
    ------
    DataError
        If systems of one id have different energies, or one has only the energy and the other only forces.
    """
    rows = np.ascontiguousarray(ids, dtype=np.uint8).reshape(-1, ID_BYTES)
    keep = np.ones(len(rows), dtype=bool)
    keys = rows.view(f"V{ID_BYTES}").reshape(-1)
    order = np.argsort(keys, kind="stable")  # equal ids together, each group in file order
    begins = np.flatnonzero(np.concatenate([[True], keys[order][1:] != keys[order][:-1]]))
    sizes = np.diff(np.append(begins, len(rows)))
    n_same = n_unlabelled = 0
    conflicts: list[str] = []
    for begin, size in zip(begins[sizes > 1], sizes[sizes > 1], strict=True):
        group = order[begin : begin + size]
        has_energy = np.isfinite(energies[group])
        labels = 2 * has_energy + has_forces[group]  # 3 both, 2 energy, 1 forces, 0 none
        conflict = _conflict(energies[group], has_energy, has_forces[group])
        if conflict is not None:
            first, second = (group[i] for i in conflict)
            conflicts.append(
                " and ".join(f"{sources[i]} ({_labels(energies[i], has_forces[i])})" for i in (first, second))
            )
            continue
        chosen = int(np.argmax(labels))
        keep[group] = False
        keep[group[chosen]] = True
        n_fewer = int((labels < labels[chosen]).sum())
        n_unlabelled += n_fewer
        n_same += size - 1 - n_fewer
    if conflicts:
        more = f" and {len(conflicts) - _N_SHOWN} more" if len(conflicts) > _N_SHOWN else ""
        raise DataError(
            f"structures that occur twice with different labels: {'; '.join(conflicts[:_N_SHOWN])}{more}. Remove "
            "one of each pair, or do not mix data of different reference methods."
        )
    return keep, DuplicateReport(n_same=int(n_same), n_unlabelled=n_unlabelled)


def _conflict(
    energies: NDArray[np.float64], has_energy: NDArray[np.bool_], has_forces: NDArray[np.bool_]
) -> tuple[int, int] | None:
    """Return two members of a group whose labels cannot be reconciled, or None."""
    labelled = np.flatnonzero(has_energy)
    if len(labelled):
        off = np.abs(energies[labelled] - energies[labelled[0]]) > ENERGY_TOLERANCE
        if off.any():
            return int(labelled[0]), int(labelled[np.argmax(off)])
    if has_energy.any() and has_forces.any() and not (has_energy & has_forces).any():
        return int(np.argmax(has_energy)), int(
            np.argmax(has_forces)
        )  # keeping one would lose the other's labels
    return None


def _labels(energy: float, has_forces: bool) -> str:
    return (
        f"{f'{energy:.6f} eV' if np.isfinite(energy) else 'no energy'}, {'' if has_forces else 'no '}forces"
    )
