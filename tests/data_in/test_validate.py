"""check_system: every problem is named, and coinciding atoms are found where brute force finds them."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from molkd.pipeline.data.validate import MIN_DISTANCE, check_system, coinciding_atoms
from molkd.pipeline.errors import DataError


def test_good_systems(make_system):
    check_system(make_system())
    check_system(make_system(energy=np.nan, forces=np.full((3, 3), np.nan)))
    check_system(make_system(cell=np.diag([4.0, 4.0, 0.0]), pbc=np.array([True, True, False])))
    far = np.array([[0, 0, 0], [0, 0, 1], [2e4, 0, 2.0]])  # no matter how often it went through a cell
    check_system(make_system(positions=far, cell=np.eye(3) * 4.5, pbc=np.ones(3, bool)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"atomic_numbers": np.zeros(0, np.uint8), "positions": np.zeros((0, 3))}, "no atoms"),
        ({"atomic_numbers": np.array([8, 0, 119], np.uint8)}, "atomic numbers outside 1 to 118: 0, 119"),
        (
            {"positions": np.array([[0, 0, 0], [np.nan, 0, 1], [0, np.inf, 2]])},
            "positions of atoms 1, 2 are NaN",
        ),
        ({"positions": np.array([[0, 0, 0], [0, 0, 1], [0, 2e4, 0]])}, "atoms lie more than 10000 A apart"),
        ({"pbc": np.ones(3, bool)}, "periodic along abc, but these lattice vectors are zero"),
        ({"cell": np.ones((3, 3)), "pbc": np.ones(3, bool)}, "zero or linearly dependent"),
        ({"cell": np.diag([4.0, 4, 0]), "pbc": np.array([0, 1, 1], bool)}, "periodic along bc"),
        ({"cell": np.full((3, 3), np.nan)}, "the cell is NaN"),
        (
            {"positions": np.array([[0, 0, 0], [0, 0, 1], [0, 0, 1.005]])},
            "atoms 1 and 2 are closer than 0.01 A",
        ),
        ({"energy": np.inf}, "energy label is infinite"),
        ({"energy": -np.inf}, "energy label is infinite"),
        ({"forces": np.full((3, 3), np.inf)}, "force labels are infinite"),
    ],
)
def test_each_problem(make_system, changes, message):
    with pytest.raises(DataError, match=rf"water\.extxyz#0: .*{message}.*Correct the system"):
        check_system(make_system(**changes))


def test_all_problems_at_once(make_system):
    positions = np.array([[np.nan, 0, 0], [0, 0, 1], [0, 0, 2]])
    numbers = np.array([8, 1, 0], np.uint8)
    with pytest.raises(DataError, match=r"atomic numbers.*positions.*periodic.*energy"):
        check_system(
            make_system(atomic_numbers=numbers, positions=positions, pbc=np.ones(3, bool), energy=np.inf)
        )


def brute_force(positions, cell, pbc):
    """Smallest distance over pairs and images, for atoms at most two cells outside."""
    shifts = itertools.product(*(range(-5, 6) if p else (0,) for p in pbc))
    offsets = np.array(list(shifts)) @ cell
    vectors = positions[None, :, None] + offsets[None, None] - positions[:, None, None]  # (N, N, images, 3)
    distances = np.linalg.norm(vectors, axis=-1)
    for i, j in itertools.combinations_with_replacement(range(len(positions)), 2):
        values = distances[i, j][distances[i, j] > 0] if i == j else distances[i, j]
        if len(values) and values.min() < MIN_DISTANCE:
            yield i, j


@given(data=st.data())
def test_coinciding_atoms_against_brute_force(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    n_atoms = data.draw(st.integers(1, 6))
    pbc = np.array(data.draw(st.tuples(*[st.booleans()] * 3)))
    cell = np.diag(rng.uniform(1.0, 3.0, 3)) + rng.uniform(-0.5, 0.5, (3, 3))
    positions = rng.uniform(-1, 2, (n_atoms, 3)) @ cell
    if data.draw(st.booleans()):  # at the faces of the cell, where images matter
        positions = np.round(rng.uniform(-1, 2, (n_atoms, 3))) @ cell + rng.uniform(
            -0.001, 0.001, (n_atoms, 3)
        )
    if data.draw(st.booleans()):  # a copy, up to a lattice vector and a step around the limit
        step = rng.normal(size=3)
        step *= data.draw(st.sampled_from([0.0, 0.5, 0.99, 1.01, 3.0])) * MIN_DISTANCE / np.linalg.norm(step)
        shift = rng.integers(-1, 2, 3) * pbc
        positions = np.vstack([positions, positions[0] + shift @ cell + step])
    expected = set(brute_force(positions, cell, pbc))
    found = coinciding_atoms(positions, cell, pbc)
    assert (found in expected) if expected else found is None


def test_missing_lattice_vector_of_a_slab():
    cell = np.array([[3.0, 0, 0], [1.0, 3.0, 0], [0, 0, 0]])
    positions = np.array([[0.0, 0, 0], [4.0, 3.0, 0.0]])  # a + b apart
    assert coinciding_atoms(positions, cell, np.array([True, True, False])) == (0, 1)
    assert (
        coinciding_atoms(positions + np.array([[0, 0, 0], [0, 0, 1]]), cell, np.array([True, True, False]))
        is None
    )


def test_grid_with_many_equal_projections():
    grid = np.stack(np.meshgrid(*[np.arange(6.0)] * 3), axis=-1).reshape(-1, 3)
    assert coinciding_atoms(grid, 6 * np.eye(3), np.ones(3, bool)) is None
    assert coinciding_atoms(np.vstack([grid, grid[17] + 6]), 6 * np.eye(3), np.ones(3, bool)) == (17, 216)
