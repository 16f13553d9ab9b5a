"""Rules that cached signals obey whatever the teacher: atoms add up to the energy, edges to e2n and v2v."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molkd.pipeline.deep_report import Compared

Arrays = dict[str, NDArray[Any]]
Bound = Callable[[NDArray[Any]], NDArray[np.float64]]  # how far stored values can be from what was given


def sum_rules(
    arrays: Arrays, bounds: Mapping[str, Bound], eps: float, *, v2v_is_sum: bool
) -> Iterator[Compared]:
    """Yield every rule that one system's signals can be put to.

    Parameters
    ----------
    arrays : of one system, as `Cache.read` gives it: positions, cell and the teacher's signals
    bounds : signal -> what its encoding may have changed
    eps : unit of rounding of the precision that the teacher computed in
    v2v_is_sum : whether the teacher's v2v is defined as a sum over edges (Eq. 6)
    """
    own = {name.removeprefix("teacher/"): values for name, values in arrays.items()}
    if {"energy", "atomic_energies"} <= own.keys():
        parts = own["atomic_energies"]
        allowed = 2 * eps * np.sqrt(len(parts)) * np.abs(parts).sum()
        yield Compared(
            "energy = sum of atomic_energies", own["energy"], parts.sum(keepdims=True), np.array([allowed])
        )
    if {"edge", "e2n"} <= own.keys():
        weights = np.ones((len(own["edge"]), 1))
        errors = np.zeros_like(weights)
        summed, allowed = _sum_at_receivers(own, bounds["edge"], weights, errors, eps)
        allowed = allowed[:, 0] + bounds["e2n"](own["e2n"])
        yield Compared("e2n = sum of edge", own["e2n"].astype(np.float64), summed[:, 0], allowed)
    if v2v_is_sum and {"edge", "v2v"} <= own.keys():
        unit, errors = _directions(own, eps)
        summed, allowed = _sum_at_receivers(own, bounds["edge"], unit, errors, eps)
        allowed += bounds["v2v"](own["v2v"])
        yield Compared("v2v = sum of edge x direction", own["v2v"].astype(np.float64), summed, allowed)


def _sum_at_receivers(
    own: Arrays,
    bound: Bound,
    weights: NDArray[np.float64],
    errors: NDArray[np.float64],
    eps: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return sums over incoming edges (N, W, C) of edge (E, C) times weights (E, W), and their error."""
    edge, receiver, n_atoms = own["edge"].astype(np.float64), own["edge/index"][1], len(own["positions"])
    n_edges = np.bincount(receiver, minlength=n_atoms)
    # Errors of each term: stored in so many bits, weights computed, and added up in the teacher's precision.
    relative = eps * (1 + np.sqrt(n_edges[receiver]))[:, None, None]
    stored = bound(own["edge"])[:, None]
    terms = weights[:, :, None] * edge[:, None]
    spread = np.abs(weights)[:, :, None] * stored + errors[:, :, None] * np.abs(edge)[:, None]
    sums, allowed = (np.zeros((n_atoms, *terms.shape[1:])) for _ in range(2))
    np.add.at(sums, receiver, terms)
    np.add.at(allowed, receiver, spread + relative * np.abs(terms))
    return sums, allowed


def _directions(own: Arrays, eps: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return unit vectors from sender to receiver (E, 3), and the error of computing them from positions."""
    sender, receiver = own["edge/index"]
    positions, cell = own["positions"].astype(np.float64), own["cell"][0].astype(np.float64)
    offset = own["edge/shift"].astype(np.float64) @ cell  # (E, 3)
    vector = positions[receiver] - positions[sender] - offset
    distance = np.linalg.norm(vector, axis=1, keepdims=True)  # (E, 1)
    size = np.abs(positions).max(axis=1)[sender] + np.abs(positions).max(axis=1)[receiver]
    error = 4 * eps * (size + np.abs(offset).sum(axis=1))[:, None] / distance
    return vector / distance, np.broadcast_to(error, vector.shape)
