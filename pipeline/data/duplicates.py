"""The same structure met twice: keep one, prefer labels, refuse contradictions."""

import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.identity import ID_BYTES
from molkd.pipeline.errors import DataError

_log = logging.getLogger(__name__)

ENERGY_TOLERANCE = 1e-6  # eV; the same calculation written with different numbers of digits
_N_SHOWN = 5


def resolve_duplicates(
    ids: NDArray[np.uint8],
    energies: NDArray[np.float64],
    has_forces: NDArray[np.bool_],
    sources: Sequence[str],
    on_conflict: Literal["error", "first"] = "error",
) -> NDArray[np.bool_]:
    """Choose one system of each content id: the one with most labels, among equals the first.

    Parameters
    ----------
    ids : (S, 16), content ids
    energies : (S,), eV, NaN where missing
    has_forces : (S,), whether force labels exist
    sources : S names for messages
    on_conflict : what to do if labels contradict each other: refuse, or go on as if they did not

    Returns
    -------
    keep_mask : (S,)

    Raises
    ------
    DataError
        If systems of one id have different energies, or one has only the energy and the other only forces,
        unless `on_conflict` is "first".
    """
    rows = np.ascontiguousarray(ids, dtype=np.uint8).reshape(-1, ID_BYTES)
    keep = np.ones(len(rows), dtype=bool)
    if len(rows) == 0:
        return keep
    keys = rows.view(f"V{ID_BYTES}").reshape(-1)
    order = np.argsort(keys, kind="stable")  # equal ids together, each group in the order given
    begins = np.flatnonzero(np.concatenate([[True], keys[order][1:] != keys[order][:-1]]))
    sizes = np.diff(np.append(begins, len(rows)))
    n_fewer_labels = 0
    conflicts: list[str] = []
    for begin, size in zip(begins[sizes > 1], sizes[sizes > 1], strict=True):
        group = order[begin : begin + size]
        has_energy = np.isfinite(energies[group])
        n_labels = 2 * has_energy + has_forces[group]  # 3 both, 2 energy, 1 forces, 0 none
        conflict = _conflict(energies[group], has_energy, has_forces[group])
        if conflict is not None:
            pair = (group[i] for i in conflict)
            conflicts.append(
                " and ".join(f"{sources[i]} ({_describe(energies[i], has_forces[i])})" for i in pair)
            )
        keep[group] = False
        keep[group[np.argmax(n_labels)]] = True
        n_fewer_labels += int((n_labels < n_labels.max()).sum())
    if conflicts:
        _report(conflicts, on_conflict)
    if n_fewer_labels:
        _log.info("%d of the duplicates had fewer labels than the system kept", n_fewer_labels)
    return keep


def _conflict(
    energies: NDArray[np.float64], has_energy: NDArray[np.bool_], has_forces: NDArray[np.bool_]
) -> tuple[int, int] | None:
    """Return two members of a group whose labels cannot be reconciled, or None."""
    labelled = np.flatnonzero(has_energy)
    if len(labelled):
        differs = np.abs(energies[labelled] - energies[labelled[0]]) > ENERGY_TOLERANCE
        if differs.any():
            return int(labelled[0]), int(labelled[np.argmax(differs)])
    if has_energy.any() and has_forces.any() and not (has_energy & has_forces).any():
        return int(np.argmax(has_energy)), int(np.argmax(has_forces))  # either choice would lose labels
    return None


def _report(conflicts: list[str], on_conflict: Literal["error", "first"]) -> None:
    more = f"; and {len(conflicts) - _N_SHOWN} more" if len(conflicts) > _N_SHOWN else ""
    text = f"structures that occur twice with different labels: {'; '.join(conflicts[:_N_SHOWN])}{more}"
    if on_conflict == "error":
        raise DataError(
            f"{text}. Remove one of each pair, do not mix data of different reference methods, or let the "
            "first one count (on_conflict: first)."
        )
    _log.warning("%s. The first one with most labels counts.", text)


def _describe(energy: float, has_forces: bool) -> str:
    energy_text = f"{energy:.6f} eV" if np.isfinite(energy) else "no energy"
    return f"{energy_text}, {'' if has_forces else 'no '}forces"
