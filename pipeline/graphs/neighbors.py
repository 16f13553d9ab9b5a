"""The neighbour rule, written once for both stages.

The rule works on distances rounded to 1e-6 A, so that neighbors which are equally far by symmetry stay
equally far in floating point. In this order:

1. candidates are all pairs with ``MIN_DISTANCE < d <= cutoff``, periodic images of an atom itself included;
   systems without periodic axes, or any system with ``use_pbc=False``, follow the same rule in open space;
2. every center keeps its nearest `max_neighbors`; equal distances are decided by (sender, shift) order,
   smallest first; with `tie_tolerance` everything that close behind the K-th neighbor stays as well;
3. `symmetrize` keeps of each pair only the edge whose sender has the lower index (an atom and its own image:
   the one whose first non-zero shift component is negative) and adds the mirrored edge.

Unlike fairchem, atoms outside the cell find all their neighbors, and molecules keep the nearest K rather
than the first K that a search tree meets. Positions are finite and periodic cells have a volume:
`molkd.pipeline.data` checks that before anything comes here.
"""

from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from vesin import NeighborList

MIN_DISTANCE = 0.01  # A; closer pairs are the atom itself, or two atoms on one spot
_RESOLUTION = 1e-6  # A
_Edges = tuple[NDArray[np.int64], NDArray[np.int32]]


@dataclass(frozen=True)
class NeighborRule:
    """Which pairs of atoms see each other. Recorded in the cache's manifest and in every model file."""

    cutoff: float  # A
    max_neighbors: int | None = None  # per center the nearest K; None keeps all
    tie_tolerance: float = 0.0  # A; > 0 also keeps everything this close behind the K-th neighbor
    symmetrize: bool = False  # OCP's PaiNN and GemNet-OC: the higher atom's list decides, edges are mirrored
    use_pbc: bool = True  # False ignores cell and pbc

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


def neighbor_list(
    positions: NDArray[np.floating], cell: NDArray[np.floating], pbc: NDArray[np.bool_], rule: NeighborRule
) -> _Edges:
    """Return edge_index (2, E) and shifts (E, 3) of one system.

    Parameters
    ----------
    positions : (N, 3), Angstrom
    cell : (3, 3), Angstrom, rows are lattice vectors
    pbc : (3,)
    rule : NeighborRule

    Returns
    -------
    edge_index : (2, E)
        Row 0 the sender, row 1 the receiver; sorted by receiver, sender, shift.
    shifts : (E, 3)
        Whole numbers of lattice vectors to the sender's image.
    """
    atoms_ptr = np.array([0, len(positions)])
    return neighbor_lists(positions, atoms_ptr, np.asarray(cell)[None], np.asarray(pbc)[None], rule)


def neighbor_lists(
    positions: NDArray[np.floating],
    atoms_ptr: NDArray[np.integer],
    cells: NDArray[np.floating],
    pbc: NDArray[np.bool_],
    rule: NeighborRule,
) -> _Edges:
    """Return edge_index (2, E), numbered over the whole batch, and shifts (E, 3) of concatenated systems.

    Only the search runs system by system; selecting and sorting is done once for all, which costs a few
    milliseconds for 32 molecules.

    Parameters
    ----------
    positions : (N, 3), Angstrom
    atoms_ptr : (S + 1,), where each system's atoms begin
    cells : (S, 3, 3), Angstrom
    pbc : (S, 3)
    rule : NeighborRule
    """
    edges, distances = _candidates(positions, atoms_ptr, cells, pbc, rule)
    if rule.max_neighbors is not None:
        edges, distances = _drop_far(edges, distances, rule.max_neighbors, rule.tie_tolerance)
    order = _canonical_order(edges)
    edges, distances = edges[order], distances[order]
    if rule.max_neighbors is not None:
        edges = edges[_nearest_mask(edges[:, 0], distances, rule.max_neighbors, rule.tie_tolerance)]
    if rule.symmetrize:
        edges = _symmetrized(edges)
        edges = edges[_canonical_order(edges)]
    return np.ascontiguousarray(edges[:, 1::-1].T), edges[:, 2:].astype(np.int32)


def _candidates(
    positions: NDArray[np.floating],
    atoms_ptr: NDArray[np.integer],
    cells: NDArray[np.floating],
    pbc: NDArray[np.bool_],
    rule: NeighborRule,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return edges (E, 5) = receiver, sender, shift, grouped by receiver, and distances (E,) in 1e-6 A."""
    cutoff = round(rule.cutoff / _RESOLUTION)
    search = NeighborList(cutoff=rule.cutoff + 2 * _RESOLUTION, full_list=True, sorted=True, n_threads=1)
    points = np.asarray(positions, dtype=np.float64)
    boxes = np.asarray(cells, dtype=np.float64)
    periodic = np.asarray(pbc, dtype=bool) & rule.use_pbc
    edges, lengths = [np.empty((0, 5), np.int64)], [np.empty(0)]
    for s, (begin, end) in enumerate(pairwise(atoms_ptr)):
        if begin == end:
            continue
        box = boxes[s] if periodic[s].any() else np.zeros((3, 3))
        pairs, shifts, d = search.compute(points[begin:end], box, periodic[s], "PSd")
        edges.append(np.concatenate([pairs.astype(np.int64) + begin, shifts], axis=1))
        lengths.append(d)
    rounded = np.rint(np.concatenate(lengths) / _RESOLUTION).astype(np.int64)
    inside = (rounded > round(MIN_DISTANCE / _RESOLUTION)) & (rounded <= cutoff)
    return np.concatenate(edges)[inside], rounded[inside]


def _drop_far(
    edges: NDArray[np.int64], distances: NDArray[np.int64], n_nearest: int, tie_tolerance: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Drop edges beyond each receiver's K-th distance (ties stay), before anything is sorted."""
    receiver = edges[:, 0]
    n_edges = np.bincount(receiver)
    if len(edges) == 0 or n_edges.max() <= n_nearest:
        return edges, distances
    column = np.arange(len(receiver)) - (np.cumsum(n_edges) - n_edges)[receiver]
    padded = np.full((len(n_edges), n_edges.max()), np.iinfo(np.int64).max)
    padded[receiver, column] = distances
    limit = np.partition(padded, n_nearest - 1, axis=1)[:, n_nearest - 1]  # (N,)
    near = distances - round(tie_tolerance / _RESOLUTION) <= limit[receiver]
    return edges[near], distances[near]


def _nearest_mask(
    receiver: NDArray[np.int64], distances: NDArray[np.int64], n_nearest: int, tie_tolerance: float
) -> NDArray[np.bool_]:
    """Mark the K nearest of each receiver among edges in canonical order; that order breaks ties."""
    n_edges = np.bincount(receiver)
    if tie_tolerance > 0 or len(receiver) == 0 or n_edges.max() <= n_nearest:
        return np.ones(len(receiver), dtype=bool)
    order = np.lexsort((distances, receiver))  # stable
    rank = np.arange(len(receiver)) - (np.cumsum(n_edges) - n_edges)[receiver[order]]
    mask = np.empty(len(receiver), dtype=bool)
    mask[order] = rank < n_nearest
    return mask


def _symmetrized(edges: NDArray[np.int64]) -> NDArray[np.int64]:
    """Keep one direction of every pair and mirror it (rule 3 above)."""
    receiver, sender, x, y, z = edges.T
    earlier = (x < 0) | ((x == 0) & ((y < 0) | ((y == 0) & (z < 0))))
    half = edges[(sender < receiver) | ((sender == receiver) & earlier)]
    mirrored = np.concatenate([half[:, 1::-1], -half[:, 2:]], axis=1)
    return np.concatenate([half, mirrored])


def _canonical_order(edges: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the order (E,) by receiver, sender and shift; one integer key sorts faster than 5 columns."""
    if len(edges) == 0:
        return np.empty(0, dtype=np.int64)
    low = edges.min(axis=0)
    span = edges.max(axis=0) - low + 1
    if np.prod(span.astype(np.float64)) > 2**62:
        return np.lexsort(edges.T[::-1])
    weights = np.append(np.cumprod(span[:0:-1])[::-1], 1)
    return np.argsort((edges - low) @ weights, kind="stable")
