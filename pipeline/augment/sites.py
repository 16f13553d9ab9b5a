"""Where on a slab an adsorbate can sit, from the Voronoi cells of the topmost atoms.

On top is over an atom; a bridge is between two atoms whose cells share an edge; a hollow is a corner of
cells, equally far from the three or more atoms around it. A hollow amid an equilateral triangle is called hcp
if an atom of the second layer is beneath, else fcc.
"""

from typing import NamedTuple

import numpy as np
from ase import Atoms
from numpy.typing import NDArray
from scipy.spatial import Voronoi

_TOP = 0.5  # A below the highest atom: still the top layer
_SAME = 0.1  # A: sites nearer than that are one, edges of cells shorter than that are corners
_BENEATH = 0.4  # A sideways: an atom is under a site


class Site(NamedTuple):
    """A place in the plane of the surface."""

    kind: str  # ontop, bridge, fcc, hcp, hollow
    xy: NDArray[np.float64]  # (2,) A


def find_sites(slab: Atoms) -> list[Site]:
    """Return the sites of a slab whose surface spans the first two lattice vectors.

    Of sites that a shift of the slab onto itself carries into each other one is returned.
    """
    heights = slab.positions[:, 2]
    top = heights > heights.max() - _TOP
    plane = np.asarray(slab.cell[:2, :2])
    images = [i * plane[0] + j * plane[1] for i in (-2, -1, 0, 1, 2) for j in (-2, -1, 0, 1, 2)]
    points = np.concatenate([slab.positions[top, :2] + shift for shift in images])
    cells = Voronoi(points)
    found = [("ontop", xy) for xy in slab.positions[top, :2]]
    for (i, j), corners in zip(cells.ridge_points, cells.ridge_vertices, strict=True):
        if min(corners) >= 0 and np.linalg.norm(np.subtract(*cells.vertices[corners])) > _SAME:
            found.append(("bridge", (points[i] + points[j]) / 2))
    below = slab[~top]
    for corner in cells.vertices:
        distance = np.linalg.norm(points - corner, axis=1)
        around = points[distance < distance.min() + _SAME]
        found.append((_hollow(below, corner, plane) if _is_equilateral(around) else "hollow", corner))
    return _in_one_cell(found, plane, _own_shifts(slab, plane))


def _own_shifts(slab: Atoms, plane: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the shifts in the plane (T, 2), zero among them, that carry a slab onto itself."""
    rarest = min(set(slab.numbers), key=lambda z: (slab.numbers == z).sum())
    level = (slab.numbers == rarest) & (np.abs(slab.positions[:, 2] - _first(slab, rarest)[2]) < _SAME)
    shifts = slab.positions[level, :2] - _first(slab, rarest)[:2]
    return np.stack([shift for shift in shifts if _carries_onto_itself(slab, shift, plane)])


def _first(slab: Atoms, number: int) -> NDArray[np.float64]:
    return np.asarray(slab.positions[int(np.flatnonzero(slab.numbers == number)[0])])


def _carries_onto_itself(slab: Atoms, shift: NDArray[np.float64], plane: NDArray[np.float64]) -> bool:
    moved = slab.positions + np.append(shift, 0.0)
    apart = slab.positions[None] - moved[:, None]
    apart[..., :2] = lateral_vectors(apart[..., :2], plane)
    same = (np.linalg.norm(apart, axis=-1) < _SAME) & (slab.numbers[None] == slab.numbers[:, None])
    return bool(same.any(axis=1).all())


def _is_equilateral(around: NDArray[np.float64]) -> bool:
    return len(around) == 3 and bool(
        np.ptp(np.linalg.norm(around - np.roll(around, 1, axis=0), axis=1)) < _SAME
    )


def _hollow(below: Atoms, xy: NDArray[np.float64], plane: NDArray[np.float64]) -> str:
    if len(below) == 0:
        return "fcc"
    sideways = lateral_vectors(below.positions[:, :2] - xy, plane)
    beneath = below.positions[np.linalg.norm(sideways, axis=1) < _BENEATH, 2]
    second = below.positions[:, 2].max()
    return "hcp" if len(beneath) and beneath.max() > second - _TOP else "fcc"


def lateral_vectors(vectors: NDArray[np.float64], plane: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the shortest images of vectors (..., 2) in the lattice `plane` (2, 2)."""
    wrapped = vectors - np.round(vectors @ np.linalg.inv(plane)) @ plane
    shifts = np.array([i * plane[0] + j * plane[1] for i in (-1, 0, 1) for j in (-1, 0, 1)])
    images = wrapped[..., None, :] + shifts
    nearest = np.linalg.norm(images, axis=-1).argmin(axis=-1)
    return np.asarray(np.take_along_axis(images, nearest[..., None, None], axis=-2)[..., 0, :])


def _in_one_cell(
    found: list[tuple[str, NDArray[np.float64]]], plane: NDArray[np.float64], shifts: NDArray[np.float64]
) -> list[Site]:
    """Keep one image of each site, those in the cell at the origin, in the order found."""
    sites: list[Site] = []
    for kind, xy in found:
        fraction = xy @ np.linalg.inv(plane)
        if (fraction < -0.5).any() or (fraction > 1.5).any():
            continue  # an image far away; at the rim of the points cells are cut off
        place = (fraction % 1.0) @ plane
        images = [s.xy + shifts - place for s in sites if s.kind == kind]
        if (
            not images
            or (np.linalg.norm(lateral_vectors(np.concatenate(images), plane), axis=1) > _SAME).all()
        ):
            sites.append(Site(kind, place))
    return sites
