"""The edges of the teacher in stage two: e2e compares features edge by edge, so both need the same edges."""

import json
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.reader import Cache
from molkd.pipeline.errors import ConfigError
from molkd.pipeline.graphs.neighbors import NeighborRule, canonical_order, neighbor_lists

log = logging.getLogger(__name__)

_SAMPLE_ATOMS = 1000
_ROUNDING = 1e-3  # A, of float32 positions

Arrays = dict[str, NDArray[Any]]


def sorted_edges(arrays: Arrays) -> Arrays:
    """Return the arrays with the teacher's edges and their features in the order of a batch."""
    index, shift = arrays["teacher/edge/index"], arrays["teacher/edge/shift"]
    order = canonical_order(index[1], index[0], shift)
    if np.array_equal(order, np.arange(len(order))):
        return arrays
    return arrays | {
        "teacher/edge": arrays["teacher/edge"].take(order, axis=0),
        "teacher/edge/index": index.take(order, axis=1),
        "teacher/edge/shift": shift.take(order, axis=0),
    }


def teacher_config(cache: Cache, teacher: str | None) -> Mapping[str, Any]:
    """Return the teacher's settings under their own names; nothing if its provenance has none."""
    return cache.teachers[teacher].provenance.get("config") or {} if teacher else {}


def require_rule(arrays: Arrays, rule: NeighborRule, settings: Mapping[str, Any]) -> None:
    """Refuse sorted edges of a teacher that are not those which `rule` finds in the same systems.

    Parameters
    ----------
    settings : the teacher's, from `teacher_config`, for the message

    Raises
    ------
    ConfigError
        With the settings that would make the student's edges the teacher's.
    """
    index, shift = _own_edges(arrays, rule)
    if np.array_equal(index, arrays["teacher/edge/index"]) and np.array_equal(
        shift, arrays["teacher/edge/shift"]
    ):
        return
    raise ConfigError(
        f"--kd e2e: this student's edges (cutoff {rule.cutoff:g} A, {rule.max_neighbors} neighbors) are not "
        f"the teacher's; {_how_to_match(rule, settings)}, or take n2n, e2n or v2v"
    )


def _how_to_match(rule: NeighborRule, settings: Mapping[str, Any]) -> str:
    if settings.get("enforce_max_neighbors_strictly") is False:
        return (
            "the teacher keeps ties beyond max_neighbors (enforce_max_neighbors_strictly: false); take a "
            "PaiNN, which is trained on the teacher's edges"
        )
    own = {"cutoff": rule.cutoff, "max_neighbors": rule.max_neighbors, "use_pbc": rule.use_pbc}
    others = {k: v for k in own if (v := settings.get(k)) is not None and v != own[k]}
    if not others:
        return "set model.cutoff and model.max_neighbors as the teacher has them"
    options = [f"--set model.{name}={json.dumps(value)}" for name, value in others.items()]
    follow = " and ".join(f"model.{name}_aint" for name in others if name != "use_pbc")
    return f"give it {' '.join(options)}" + (f" with {follow} no smaller" if follow else "")


def refuse_ties(rule: NeighborRule, student: str) -> None:
    """Refuse a student that picks its edges itself and keeps ties beyond its limit of neighbors.

    Its tolerance is a length, that of a `NeighborRule` a squared one, so no rule finds the same edges.

    Raises
    ------
    ConfigError
        With the setting that makes the limit strict.
    """
    if rule.tie_tolerance:
        raise ConfigError(
            f"--kd e2e: {student} keeps ties beyond max_neighbors, so its edges cannot be compared with "
            "the teacher's beforehand; give it --set model.enforce_max_neighbors_strictly=true, or take n2n, "
            "e2n or v2v"
        )


def check_reach(
    cache: Cache, systems: NDArray[np.integer], teacher: str, rule: NeighborRule, student: str
) -> None:
    """Refuse a student that ends before the teacher's edges do, and log how the graphs of both differ.

    Parameters
    ----------
    systems : (S,) stored indices of what is trained on; a sample of them is read
    rule : the student's own, which it follows in validation and use
    student : its name, for messages

    Raises
    ------
    ConfigError
        If an edge of the teacher is longer than the student's cutoff.
    """
    n_sample = 1 + int(np.searchsorted(np.cumsum(cache.system_n_atoms[systems]), _SAMPLE_ATOMS))
    arrays = cache.read(systems[:n_sample], ("positions", "cell", "pbc"), teacher, ("edge",))
    longest = _lengths(arrays).max(initial=0)
    if longest > rule.cutoff + _ROUNDING:
        cutoff = teacher_config(cache, teacher).get("cutoff")
        reach = f"have a cutoff of {cutoff:g} A" if cutoff else f"are up to {longest:.2f} A long"
        raise ConfigError(
            f"--kd e2e: edges of teacher {teacher} {reach}, {student} ends at {rule.cutoff:g} A; give it "
            f"--set model.cutoff={cutoff or np.ceil(longest):g}, or take n2n, e2n or v2v"
        )
    of_teacher = _edge_set(arrays["teacher/edge/index"], arrays["teacher/edge/shift"])
    own = _edge_set(*_own_edges(arrays, rule))
    n_atoms = int(arrays["n_atoms"].sum())
    log.info(
        "e2e: training runs on the teacher's edges, %.1f an atom; validation and use on the student's own, "
        "%.1f an atom",
        len(of_teacher) / n_atoms,
        len(own) / n_atoms,
    )
    if of_teacher != own:
        log.warning(
            "e2e: %.1f %% of the student's own edges are not among the teacher's, and %.1f %% the other way "
            "round; cutoff and max_neighbors as the teacher has them would make them the same",
            100 * len(own - of_teacher) / max(len(own), 1),
            100 * len(of_teacher - own) / max(len(of_teacher), 1),
        )


def _own_edges(arrays: Arrays, rule: NeighborRule) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    atoms_ptr = np.concatenate([[0], np.cumsum(arrays["n_atoms"])]).astype(np.int64)
    return neighbor_lists(arrays["positions"], atoms_ptr, arrays["cell"], arrays["pbc"], rule)


def _lengths(arrays: Arrays) -> NDArray[np.float64]:
    """Return the lengths (E,) of the teacher's edges in Angstrom."""
    (sender, receiver), shift = arrays["teacher/edge/index"], arrays["teacher/edge/shift"]
    positions = arrays["positions"].astype(np.float64)
    cell = np.repeat(arrays["cell"].astype(np.float64), arrays["teacher/edge/n_edges"], axis=0)  # (E, 3, 3)
    offset = np.einsum("ei,eij->ej", shift, cell)
    lengths: NDArray[np.float64] = np.linalg.norm(positions[sender] + offset - positions[receiver], axis=1)
    return lengths


def _edge_set(index: NDArray[np.integer], shift: NDArray[np.integer]) -> set[tuple[int, ...]]:
    return set(map(tuple, np.column_stack([index.T, shift]).tolist()))
