"""Physical sense of one system, checked before anything is stored."""

import numpy as np
from numpy.typing import NDArray

from molkd.pipeline.data.system import System
from molkd.pipeline.errors import DataError

MIN_DISTANCE = (
    0.01  # A; closer atoms are one atom written twice, and direction vectors between them are noise
)
MAX_ATOMIC_NUMBER = 118
# A; in open space. No molecule is that long, in float32 its bonds are gone, and the search for neighbors
# (vesin 0.6) takes a number of cells beyond its bounds for zero: the process dies of a division.
MAX_EXTENT = 1e4
# Any direction does that no crystal plane is normal to: few atoms then share a projection.
_DIRECTION = np.array([0.3819660, 0.5411961, 0.7491364])
_DIRECTION /= np.linalg.norm(_DIRECTION)


def check_system(system: System) -> None:
    """Raise if a system cannot be one that a model should see.

    Raises
    ------
    DataError
        Listing all problems of the system: no atoms, impossible elements, positions or cell not finite, atoms
        of a molecule microns apart,
        lattice vectors that do not span the periodic directions, coinciding atoms, infinite labels.
    """
    problems = []
    numbers = system.atomic_numbers
    if system.n_atoms == 0:
        problems.append("it has no atoms")
    if ((numbers == 0) | (numbers > MAX_ATOMIC_NUMBER)).any():
        bad = sorted({int(z) for z in numbers if z == 0 or z > MAX_ATOMIC_NUMBER})
        problems.append(f"atomic numbers outside 1 to {MAX_ATOMIC_NUMBER}: {', '.join(map(str, bad))}")
    finite = np.isfinite(system.positions).all(axis=1)
    if not finite.all():
        problems.append(f"positions of atoms {_some(np.flatnonzero(~finite))} are NaN or infinite")
    elif not is_in_reach(system):
        problems.append(f"its atoms lie more than {MAX_EXTENT:g} A apart")
    cell_problem = _cell_problem(system.cell, system.pbc)
    if cell_problem:
        problems.append(cell_problem)
    elif finite.all() and system.n_atoms:
        pair = coinciding_atoms(system.positions, system.cell, system.pbc)
        if pair is not None:
            problems.append(f"atoms {pair[0]} and {pair[1]} are closer than {MIN_DISTANCE} A")
    if np.isinf(system.energy):
        problems.append("the energy label is infinite")
    if np.isinf(system.forces).any():
        problems.append("force labels are infinite")
    if problems:
        raise DataError(f"{system.source}: {'; '.join(problems)}. Correct the system or leave it out.")


def is_in_reach(system: System) -> bool:
    """Say whether positions are finite and, unless all axes are periodic, within MAX_EXTENT of each other."""
    positions = system.positions
    if system.n_atoms == 0 or not np.isfinite(positions).all():
        return system.n_atoms == 0
    return bool(system.pbc.all() or np.ptp(positions, axis=0).max() <= MAX_EXTENT)


def coinciding_atoms(
    positions: NDArray[np.float64], cell: NDArray[np.float64], pbc: NDArray[np.bool_]
) -> tuple[int, int] | None:
    """Return two atoms closer than MIN_DISTANCE, periodic images included, or None.

    Neighbor lists are built for many neighbors per atom; here there are none, and sorting the atoms along one
    direction is 10 to 100 times faster: only atoms next to each other in this order can coincide.

    Parameters
    ----------
    positions : (N, 3), Angstrom, finite
    cell : (3, 3), Angstrom; its periodic rows are linearly independent
    pbc : (3,)
    """
    points, owner = _with_border_images(positions, cell, pbc)
    projection = points @ _DIRECTION
    order = np.argsort(projection)
    points, owner, projection = points[order], owner[order], projection[order]
    for step in range(1, len(points)):
        near = np.flatnonzero(projection[step:] - projection[:-step] < MIN_DISTANCE)
        if len(near) == 0:
            return None  # farther neighbors in the order are farther along the direction, too
        separation = points[near + step] - points[near]
        hits = near[(separation**2).sum(axis=1) < MIN_DISTANCE**2]
        if len(hits):
            first, second = sorted((int(owner[hits[0]]), int(owner[hits[0] + step])))
            return first, second
    return None


def _with_border_images(
    positions: NDArray[np.float64], cell: NDArray[np.float64], pbc: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Wrap atoms into the cell and repeat those at its lower faces above the upper ones; also the owners."""
    owner = np.arange(len(positions))
    if not pbc.any():
        return positions, owner
    box = _completed(cell, pbc)
    inverse = np.linalg.inv(box)
    heights = 1.0 / np.linalg.norm(inverse, axis=0)  # (3,) A, distance between opposite faces
    fractional = positions @ inverse
    fractional[:, pbc] %= 1.0
    for axis in np.flatnonzero(pbc):
        lower = fractional[:, axis] * heights[axis] < MIN_DISTANCE
        images = fractional[lower]
        images[:, axis] += 1.0
        fractional = np.concatenate([fractional, images])
        owner = np.concatenate([owner, owner[lower]])
    return fractional @ box, owner


def _completed(cell: NDArray[np.float64], pbc: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the cell with the non-periodic rows replaced by unit vectors orthogonal to the periodic ones."""
    rows = cell[pbc]
    box = cell.copy()
    if len(rows) < 3:
        box[~pbc] = np.linalg.svd(rows)[2][len(rows) :]  # the null space of the periodic rows
    return box


def _cell_problem(cell: NDArray[np.float64], pbc: NDArray[np.bool_]) -> str | None:
    if not np.isfinite(cell).all():
        return "the cell is NaN or infinite"
    if not pbc.any():
        return None
    # The smallest singular value bounds the thickness of the cell from below.
    if np.linalg.svd(cell[pbc], compute_uv=False).min() < MIN_DISTANCE:
        axes = "".join(axis for axis, periodic in zip("abc", pbc, strict=True) if periodic)
        return f"it is periodic along {axes}, but these lattice vectors are zero or linearly dependent"
    return None


def _some(indices: NDArray[np.int64]) -> str:
    text = ", ".join(map(str, indices[:5]))
    return f"{text} and {len(indices) - 5} more" if len(indices) > 5 else text
