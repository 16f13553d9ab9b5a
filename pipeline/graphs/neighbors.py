"""The neighbour rule, written once for both stages.

Neighbors which are equally far by symmetry must stay so in floating point, positions in float32 included; so
distances are compared in whole steps of `TIE_STEP`. In this order:

1. candidates are all pairs with ``MIN_DISTANCE < d <= cutoff`` (d to 1e-6 A), periodic images of an atom
   itself included; systems without periodic axes, or any system with ``use_pbc=False``, follow the same rule
   in open space;
2. every center keeps its nearest `max_neighbors`; equal distances are decided by (sender, shift) order,
   smallest first; with `tie_tolerance` the next one stays as well, and everything that close behind it in
   squared distance (OCP's rule);
3. `symmetrize` keeps of each pair only the edge whose sender has the lower index (an atom and its own image:
   the one whose first non-zero shift component is negative) and adds the mirrored edge.

Unlike fairchem, atoms outside the cell find all their neighbors, and molecules keep the nearest K rather
than the first K that a search tree meets. Positions are finite and periodic cells have a volume:
`molkd.pipeline.data` checks that before anything comes here.

Most of a plain search's time goes into edges that step 2 throws away again. So under a `max_neighbors` a
search begins with a radius that holds that many atoms in most solids, widens only until every center has its
K, and hands on only what the system keeps.
"""

import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from vesin import NeighborList

MIN_DISTANCE = 0.01  # A; closer pairs are the atom itself, or two atoms on one spot
TIE_STEP = 1e-4  # A; far above what float32 does to coordinates, far below any difference that matters
RESOLUTION = 1e-6  # A, of the cutoff
_ALL_PAIRS_MAX_ATOMS = 128  # open systems up to here: measuring all pairs beats one search each
_SPARSE_DENSITY = 0.015  # atoms/A^3, a fifth of a metal's: an adsorbate has most of its neighbors below it
_WIDENING = 1.2  # of the search radius, where that guess held too few
_Edges = tuple[NDArray[np.int64], NDArray[np.int32]]


@dataclass(frozen=True)
class NeighborRule:
    """Which pairs of atoms see each other. Recorded in the cache's manifest and in every model file."""

    cutoff: float  # A
    max_neighbors: int | None = None  # per center the nearest K; None keeps all
    tie_tolerance: float = 0.0  # A^2; > 0 keeps one neighbor more and what is this close behind it
    symmetrize: bool = False  # OCP's PaiNN and GemNet-OC: the higher atom's list decides, edges are mirrored
    use_pbc: bool = True  # False ignores cell and pbc

    @property
    def n_counted(self) -> int:
        """Which nearest neighbor sets the limit; OCP, where ties are kept, looks at the first after K."""
        return (self.max_neighbors or 0) + (self.tie_tolerance > 0)

    @property
    def max_edges_per_atom(self) -> int | None:
        """The most edges that a system can have, divided by its atoms; None if nothing limits them.

        Ties are taken to be no more than the neighbors in front of them.
        """
        if self.max_neighbors is None:
            return None
        n_nearest = 2 * self.n_counted if self.tie_tolerance > 0 else self.max_neighbors
        return n_nearest * (2 if self.symmetrize else 1)

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


class _Pairs(NamedTuple):
    """Directed edges in columns, in any order."""

    receiver: NDArray[np.int64]  # (E,)
    sender: NDArray[np.int64]  # (E,)
    shift: NDArray[np.int32]  # (E, 3)
    distance: NDArray[np.int64]  # (E,), in TIE_STEP

    def take(self, idx: NDArray[np.integer]) -> "_Pairs":
        """Return the edges at these places."""
        # ndarray.take, here and below: whole rows of `shift` come several times faster than by [...]
        return _Pairs(
            self.receiver.take(idx),
            self.sender.take(idx),
            self.shift.take(idx, axis=0),
            self.distance.take(idx),
        )


def neighbor_lists(
    positions: NDArray[np.floating],
    atoms_ptr: NDArray[np.integer],
    cells: NDArray[np.floating],
    pbc: NDArray[np.bool_],
    rule: NeighborRule,
) -> _Edges:
    """Return edge_index (2, E), numbered over the whole batch, and shifts (E, 3) of concatenated systems.

    Small systems in open space are searched together, the others one by one; what they keep is sorted once
    for all.

    Parameters
    ----------
    positions : (N, 3), Angstrom
    atoms_ptr : (S + 1,), where each system's atoms begin
    cells : (S, 3, 3), Angstrom
    pbc : (S, 3)
    rule : NeighborRule
    """
    points = np.asarray(positions, dtype=np.float64)
    boxes = np.asarray(cells, dtype=np.float64)
    periodic = np.asarray(pbc, dtype=bool) & rule.use_pbc
    n_atoms = np.diff(atoms_ptr)
    together = ~periodic.any(axis=1) & (n_atoms <= _ALL_PAIRS_MAX_ATOMS)
    parts = [_search_together(points, atoms_ptr, together, rule)]
    for s, (begin, end) in enumerate(pairwise(atoms_ptr)):
        if not together[s]:
            found = _search_alone(points[begin:end], boxes[s], periodic[s], rule)
            parts.append(found._replace(receiver=found.receiver + begin, sender=found.sender + begin))
    pairs = _Pairs(
        receiver=np.concatenate([p.receiver for p in parts]),
        sender=np.concatenate([p.sender for p in parts]),
        shift=np.concatenate([p.shift for p in parts]),
        distance=np.concatenate([p.distance for p in parts]),
    )
    if rule.max_neighbors is not None and rule.tie_tolerance <= 0:
        pairs = _cut_ties(pairs, rule.max_neighbors)
    if rule.symmetrize:
        pairs = _symmetrized(pairs)
    pairs = pairs.take(canonical_order(pairs.receiver, pairs.sender, pairs.shift))
    return np.stack([pairs.sender, pairs.receiver]), pairs.shift


def _search_together(
    points: NDArray[np.float64], atoms_ptr: NDArray[np.integer], chosen: NDArray[np.bool_], rule: NeighborRule
) -> _Pairs:
    """Measure all pairs inside each chosen system at once, in open space."""
    n_atoms = np.diff(atoms_ptr) * chosen  # (S,)
    n_senders = np.repeat(n_atoms, np.diff(atoms_ptr))  # (N,), for each receiver
    first = np.repeat(atoms_ptr[:-1], np.diff(atoms_ptr))  # (N,)
    receiver = np.repeat(np.arange(len(points)), n_senders)  # (E,)
    begin = np.cumsum(n_senders) - n_senders
    sender = np.arange(len(receiver)) + np.repeat(first - begin, n_senders)
    squared = np.zeros(len(receiver))
    for axis in points.T:
        squared += (axis[sender] - np.repeat(axis, n_senders)) ** 2
    lengths = np.sqrt(squared)
    kept = np.flatnonzero(_is_inside(lengths, rule))
    receiver, distance = receiver[kept], _steps(lengths[kept])
    shift = np.zeros((len(kept), 3), dtype=np.int32)
    pairs = _Pairs(receiver, sender[kept], shift, distance)
    if rule.max_neighbors is None or n_atoms.max(initial=0) <= rule.max_neighbors:
        return pairs
    limits = _limits(receiver, distance, len(points), rule)
    return pairs.take(np.flatnonzero(distance <= limits[receiver]))


def _search_alone(
    points: NDArray[np.float64], box: NDArray[np.float64], periodic: NDArray[np.bool_], rule: NeighborRule
) -> _Pairs:
    """Search one system with cell lists, no wider than its K nearest neighbors need."""
    if not periodic.any():
        box = np.zeros((3, 3))
    radius = rule.cutoff
    if rule.max_neighbors is not None and (periodic.any() or len(points) > rule.max_neighbors):
        radius = min(radius, (3 * rule.max_neighbors / (4 * np.pi * _SPARSE_DENSITY)) ** (1 / 3))
    while True:
        # half of the edges, not sorted: doubling and grouping them here is faster
        search = NeighborList(cutoff=radius + 2 * RESOLUTION, full_list=False, sorted=False, n_threads=1)
        half, shift, lengths = search.compute(points, box, periodic, "PSd", copy=False)
        kept = np.flatnonzero(_is_inside(lengths, rule))  # (E/2,)
        i, j = half.take(kept, axis=0).astype(np.int64).T
        receiver = np.concatenate([i, j])  # (E,)
        distance = np.tile(_steps(lengths[kept]), 2)
        limits = _limits(receiver, distance, len(points), rule)
        if radius >= rule.cutoff or (limits.max(initial=0) + 1) * TIE_STEP <= radius:
            break
        radius = min(_WIDENING * radius, rule.cutoff)
    near = np.flatnonzero(distance <= limits.take(receiver))
    mirrored = near >= len(kept)
    shift = shift.take(kept.take(near - len(kept) * mirrored), axis=0)
    shift *= np.where(mirrored, -1, 1).astype(np.int32)[:, None]
    return _Pairs(receiver.take(near), np.concatenate([j, i]).take(near), shift, distance.take(near))


def _steps(lengths: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return lengths in Angstrom as whole multiples of `TIE_STEP`."""
    return np.rint(lengths / TIE_STEP).astype(np.int64)


def _is_inside(lengths: NDArray[np.float64], rule: NeighborRule) -> NDArray[np.bool_]:
    """Mark the candidates (rule 1 above)."""
    distance = np.rint(lengths / RESOLUTION)
    return (distance > round(MIN_DISTANCE / RESOLUTION)) & (distance <= round(rule.cutoff / RESOLUTION))


def _limits(
    receiver: NDArray[np.int64], distance: NDArray[np.int64], n_atoms: int, rule: NeighborRule
) -> NDArray[np.int64]:
    """Return how far each atom looks (N,), in steps: to its last neighbor and ties, or to the cutoff."""
    n_steps = math.ceil(rule.cutoff / TIE_STEP) + 1
    limits = np.full(n_atoms, n_steps)
    if rule.max_neighbors is None:
        return limits
    n_edges = np.bincount(receiver, minlength=n_atoms)
    enough = n_edges >= rule.n_counted
    span = n_steps + 1
    ranked = np.sort(receiver * span + distance)  # plain integers sort several times faster than two columns
    last = np.cumsum(n_edges) - n_edges + rule.n_counted - 1
    limits[enough] = ranked[last[enough]] % span
    if rule.tie_tolerance > 0:
        squared = (limits[enough] * TIE_STEP) ** 2 + rule.tie_tolerance
        limits[enough] = _steps(np.sqrt(squared))
    return limits


def _cut_ties(pairs: _Pairs, n_nearest: int) -> _Pairs:
    """Of a receiver's equally far last neighbors keep the first by (sender, shift), K neighbors in all."""
    n_edges = np.bincount(pairs.receiver)
    if n_edges.max(initial=0) <= n_nearest:
        return pairs
    farthest = np.zeros(len(n_edges), dtype=np.int64)
    np.maximum.at(farthest, pairs.receiver, pairs.distance)
    crowded = n_edges > n_nearest
    tied = np.flatnonzero(crowded[pairs.receiver] & (pairs.distance == farthest[pairs.receiver]))
    edges = pairs.take(tied)
    tied = tied[canonical_order(edges.receiver, edges.sender, edges.shift)]
    receiver = pairs.receiver[tied]
    n_tied = np.bincount(receiver, minlength=len(n_edges))
    n_left = np.cumsum(n_tied)[receiver] - np.arange(len(tied))  # 1 at the last of a receiver's tied edges
    surplus = tied[n_left <= (n_edges - n_nearest)[receiver]]
    kept = np.ones(len(pairs.receiver), dtype=bool)
    kept[surplus] = False
    return pairs.take(np.flatnonzero(kept))


def _symmetrized(pairs: _Pairs) -> _Pairs:
    """Keep one direction of every pair and mirror it (rule 3 above)."""
    x, y, z = pairs.shift.T
    earlier = (x < 0) | ((x == 0) & ((y < 0) | ((y == 0) & (z < 0))))
    own_image = pairs.sender == pairs.receiver
    half = pairs.take(np.flatnonzero((pairs.sender < pairs.receiver) | (own_image & earlier)))
    return _Pairs(
        receiver=np.concatenate([half.receiver, half.sender]),
        sender=np.concatenate([half.sender, half.receiver]),
        shift=np.concatenate([half.shift, -half.shift]),
        distance=np.tile(half.distance, 2),
    )


def canonical_order(
    receiver: NDArray[np.integer], sender: NDArray[np.integer], shift: NDArray[np.integer]
) -> NDArray[np.int64]:
    """Return the order (E,) of edges by receiver (E,), sender (E,) and shift (E, 3)."""
    columns = [receiver, sender, *shift.T]  # in one integer key, which sorts faster
    key, n_keys = np.zeros(len(receiver), dtype=np.int64), 1.0
    for column in columns:
        low, high = int(column.min(initial=0)), int(column.max(initial=0))
        n_keys *= high - low + 1
        if n_keys > 2**62:
            return np.lexsort(columns[::-1])
        key = key * (high - low + 1) + (column - low)
    return np.argsort(key)
