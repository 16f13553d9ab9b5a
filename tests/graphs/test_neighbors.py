"""The neighbour rule against brute force over images, and hand-worked cases."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from molkd.pipeline.graphs.neighbors import NeighborRule, neighbor_list, neighbor_lists

RESOLUTION = 1e-6  # A, the rule's own


def brute_force(positions, cell, pbc, rule):
    """Every edge of the rule as (receiver, sender, shift...), by loops over images."""
    pbc = np.asarray(pbc) & rule.use_pbc
    spread = np.abs(positions[:, None] - positions[None]).sum(axis=2).max()
    reps = [0, 0, 0]
    for axis in range(3):
        if pbc[axis]:
            # |shift| * (length of the reciprocal vector)^-1 bounds the distance from below
            full = cell.copy()
            full[~pbc] = _complement(cell[pbc])
            height = 1 / np.linalg.norm(np.linalg.inv(full)[:, axis])
            reps[axis] = int(np.ceil((rule.cutoff + spread) / height))
    edges = {}
    for shift in itertools.product(*(range(-r, r + 1) for r in reps)):
        vectors = positions[None] + np.array(shift) @ cell - positions[:, None]
        lengths = np.round(np.linalg.norm(vectors, axis=2) / RESOLUTION).astype(int)
        for i, j in np.argwhere((lengths > 10_000) & (lengths <= round(rule.cutoff / RESOLUTION))):
            edges[(int(i), int(j), *shift)] = int(lengths[i, j])
    kept = []
    for i in range(len(positions)):
        mine = sorted((d, e) for e, d in edges.items() if e[0] == i)
        k = rule.max_neighbors
        if k is not None and len(mine) > k:
            if rule.tie_tolerance > 0:
                limit = np.rint(np.sqrt((mine[k][0] * RESOLUTION) ** 2 + rule.tie_tolerance) / RESOLUTION)
                mine = [m for m in mine if m[0] <= limit]
            else:
                mine = mine[:k]
        kept += [e for _, e in mine]
    if rule.symmetrize:
        half = [e for e in kept if e[1] < e[0] or (e[1] == e[0] and e[2:] < (0, 0, 0))]
        kept = half + [(e[1], e[0], -e[2], -e[3], -e[4]) for e in half]
    return sorted(kept)


def _complement(rows):
    """Unit vectors at right angles to the periodic rows, to make a full cell."""
    _, _, vt = np.linalg.svd(rows)
    return vt[len(rows) :]


def as_edges(edge_index, shifts):
    return [(int(i), int(j), *map(int, s)) for j, i, s in zip(*edge_index, shifts, strict=True)]


@st.composite
def systems(draw):
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    n_atoms = draw(st.integers(1, 5))
    pbc = np.array(draw(st.tuples(st.booleans(), st.booleans(), st.booleans())))
    grid = draw(st.booleans())  # a coarse grid is full of exact ties
    cell = rng.normal(size=(3, 3)) * draw(st.sampled_from([2.0, 5.0]))
    positions = rng.normal(size=(n_atoms, 3)) * draw(st.sampled_from([1.0, 6.0]))
    if grid:
        cell = np.diag(rng.integers(2, 5, size=3)).astype(float)
        positions = np.round(positions)
    if not pbc.any():
        cell = np.zeros((3, 3))
    elif draw(st.booleans()):
        cell[~pbc] = 0
    heights = 1 / np.linalg.norm(np.linalg.pinv(cell[pbc]), axis=0) if pbc.any() else np.ones(1)
    assume(heights.min() > 0.8)  # keeps the brute force short
    return positions, cell, pbc


rules = st.builds(
    NeighborRule,
    cutoff=st.sampled_from([2.0, 3.0, 3.7]),
    max_neighbors=st.sampled_from([None, 1, 3, 8]),
    tie_tolerance=st.sampled_from([0.0, 0.01]),
    symmetrize=st.booleans(),
    use_pbc=st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(system=systems(), rule=rules)
def test_equals_brute_force_in_canonical_order(system, rule):
    got = as_edges(*neighbor_list(*system, rule))
    assert got == brute_force(*system, rule)


@settings(max_examples=30, deadline=None)
@given(parts=st.lists(systems(), min_size=1, max_size=4), rule=rules)
def test_a_batch_is_its_systems_one_after_the_other(parts, rule):
    atoms_ptr = np.cumsum([0] + [len(p) for p, _, _ in parts])
    positions, cells, pbc = (np.concatenate([np.atleast_2d(p[k]) for p in parts]) for k in range(3))
    edge_index, shifts = neighbor_lists(positions, atoms_ptr, cells.reshape(-1, 3, 3), pbc, rule)
    alone = [neighbor_list(*p, rule) for p in parts]
    expected = np.concatenate(
        [e + begin for (e, _), begin in zip(alone, atoms_ptr[:-1], strict=True)], axis=1
    )
    np.testing.assert_array_equal(edge_index, expected)
    np.testing.assert_array_equal(shifts, np.concatenate([s for _, s in alone]))


def test_simple_cubic_shells():
    """6, 12 and 8 neighbors at 1, sqrt 2 and sqrt 3 lattice constants; the cutoff is inclusive."""
    cell, origin, pbc = np.eye(3) * 2.5, np.zeros((1, 3)), np.ones(3, bool)
    for cutoff, n_edges in ((2.499, 0), (2.5, 6), (2.5 * 2**0.5, 18), (2.5 * 3**0.5, 26)):
        edge_index, shifts = neighbor_list(origin, cell, pbc, NeighborRule(cutoff))
        assert edge_index.shape == (2, n_edges)
        assert shifts.shape == (n_edges, 3)


def test_tied_neighbors_are_cut_in_shift_order_or_kept_together():
    cell, origin, pbc = np.eye(3) * 2.5, np.zeros((1, 3)), np.ones(3, bool)
    _, shifts = neighbor_list(origin, cell, pbc, NeighborRule(2.6, max_neighbors=4))
    assert shifts.tolist() == [[-1, 0, 0], [0, -1, 0], [0, 0, -1], [0, 0, 1]]
    _, shifts = neighbor_list(origin, cell, pbc, NeighborRule(2.6, max_neighbors=4, tie_tolerance=0.01))
    assert len(shifts) == 6


def test_where_ties_stay_one_neighbor_more_is_kept():
    """OCP's rule: the limit is the first neighbor after the K nearest, and 0.01 A^2 behind its square."""
    rule = NeighborRule(9.0, max_neighbors=2, tie_tolerance=0.01)
    positions = np.zeros((6, 3))
    positions[1:, 0] = [1.0, 2.0, 3.0, 3.0015, 3.002]  # 9.009 and 9.012 A^2
    edge_index, _ = neighbor_list(positions, np.zeros((3, 3)), np.zeros(3, bool), rule)
    assert edge_index[0, edge_index[1] == 0].tolist() == [1, 2, 3, 4]


def test_higher_atom_decides_when_symmetrized():
    """On the line 0 - 1 -- 2, atom 2 wants 1 and atom 1 wants 0; atom 0's list is not asked."""
    positions = np.array([[0.0, 0, 0], [1.0, 0, 0], [2.5, 0, 0]])
    rule = NeighborRule(5.0, max_neighbors=1, symmetrize=True)
    edge_index, _ = neighbor_list(positions, np.zeros((3, 3)), np.zeros(3, bool), rule)
    assert edge_index.T.tolist() == [[1, 0], [0, 1], [2, 1], [1, 2]]


def test_coinciding_atoms_and_single_atoms_have_no_edges():
    nothing = np.zeros((3, 3)), np.zeros(3, bool)
    for positions in (np.zeros((1, 3)), np.array([[0.0, 0, 0], [0, 0, 0.01]])):
        edge_index, shifts = neighbor_list(positions, *nothing, NeighborRule(6.0, 5, symmetrize=True))
        assert edge_index.shape == (2, 0)
        assert shifts.shape == (0, 3)
        assert edge_index.dtype == np.int64


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_whole_cell_translations_of_single_atoms_only_move_shifts(dtype):
    rng = np.random.default_rng(3)
    cell, pbc = np.diag([4.0, 5.0, 6.0]), np.ones(3, bool)
    positions = (np.round(rng.random((4, 3)) * 64) / 16).astype(dtype)  # exact in float32, also after moving
    moves = rng.integers(-3, 4, size=(4, 3))
    rule = NeighborRule(4.5)
    (j, i), shifts = neighbor_list(positions, cell, pbc, rule)
    (j2, i2), shifts2 = neighbor_list((positions + moves @ cell).astype(dtype), cell, pbc, rule)
    moved = shifts - moves[j] + moves[i]
    assert sorted(as_edges((j, i), moved)) == sorted(as_edges((j2, i2), shifts2))


@pytest.mark.parametrize("max_neighbors", [None, 6])
@pytest.mark.parametrize("symmetrize", [False, True])
def test_small_open_large_open_and_periodic_systems_mix_in_one_batch(max_neighbors, symmetrize):
    """The three are searched in different ways; 150 atoms in open space go through cell lists."""
    rng = np.random.default_rng(5)
    rule = NeighborRule(3.0, max_neighbors, symmetrize=symmetrize)
    zero, nowhere = np.zeros((3, 3)), np.zeros(3, bool)
    slab = np.array([[4.0, 0, 0], [1.0, 5.0, 0], [0, 0, 9.0]]), np.array([True, True, False])
    parts = [
        (rng.random((9, 3)) * 3, zero, nowhere),
        (rng.random((7, 3)) * 4, *slab),
        (rng.random((0, 3)), zero, nowhere),
        (rng.random((150, 3)) * 11, zero, nowhere),
        (rng.random((1, 3)), zero, nowhere),
    ]
    atoms_ptr = np.cumsum([0] + [len(p) for p, _, _ in parts])
    positions, cells, pbc = (np.concatenate([np.atleast_2d(p[k]) for p in parts]) for k in range(3))
    got = as_edges(*neighbor_lists(positions, atoms_ptr, cells.reshape(-1, 3, 3), pbc, rule))
    expected = []
    for part, begin in zip(parts, atoms_ptr, strict=False):
        if len(part[0]):
            expected += [(i + begin, j + begin, *s) for i, j, *s in brute_force(*part, rule)]
    assert got == expected


def test_an_atom_far_above_a_dense_cluster_finds_its_neighbors_up_to_the_cutoff():
    """One center needs a wider search than all the others, one further off has fewer than K within reach."""
    grid = np.stack(np.meshgrid(*[np.arange(3.0)] * 3), axis=-1).reshape(-1, 3)
    positions = np.concatenate([grid, [[0.4, 0.3, 8.0]], [[0.1, 0.2, 13.5]]])
    cell, pbc = np.diag([0.0, 0.0, 40.0]), np.array([False, False, True])
    rule = NeighborRule(8.0, max_neighbors=12)
    got = neighbor_list(positions, cell, pbc, rule)
    assert as_edges(*got) == brute_force(positions, cell, pbc, rule)
    assert np.bincount(got[0][1]).tolist() == [12] * 28 + [1]


def test_atoms_millions_of_cells_apart_keep_the_canonical_order():
    """Their shifts are too large for one integer sort key."""
    cell, pbc = np.diag([4.0, 5.0, 6.0]), np.ones(3, bool)
    positions = np.array([[0.0, 0, 0], [1.0, 2.0, 0.5], [2.5, 1.0, 3.0], [3.0, 3.0, 1.5]])
    moves = np.array([[0, 0, 0], [10**6, -(10**6), 10**6], [-(10**6), 3, 10**6], [7, 10**6, -(10**6)]])
    rule = NeighborRule(4.5, max_neighbors=9, symmetrize=True)
    (j, i), shifts = neighbor_list(positions + moves @ cell, cell, pbc, rule)
    edges = as_edges((j, i), shifts)
    assert edges == sorted(edges)
    assert np.abs(shifts).max() > 10**6
    # undone, and without ties in the way: the lists of all neighbors are the same
    everything = NeighborRule(4.5)
    (j, i), shifts = neighbor_list(positions + moves @ cell, cell, pbc, everything)
    near = as_edges(*neighbor_list(positions, cell, pbc, everything))
    assert sorted(as_edges((j, i), shifts + moves[j] - moves[i])) == near
