"""What is left out: atoms on top of each other, forces that no training should see, structures met before.

Contacts are measured against radii: two atoms are too close if their distance, periodic images included, is
less than a share of the sum of their covalent radii (ase.data). Chemical bonds are at 0.75 of it and above
(N2 0.77, C2H2 0.79, CO 0.79, H2 1.2), so that 0.6 leaves room for a strongly compressed bond.

Two structures of the same atoms in the same cell are near duplicates if no atom is displaced by more than a
threshold and the teacher's energies agree. In open space they are laid over each other first, by the rotation
and the shift that fit best; along periodic axes the shortest displacement counts.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from ase.data import covalent_radii
from ase.geometry import find_mic
from numpy.typing import NDArray
from vesin import NeighborList

from molkd.pipeline.augment.frame import Frame
from molkd.pipeline.data.system import System

SHORT, NOT_FINITE, LARGE = "short contacts", "teacher not finite", "forces too large"
DUPLICATE, NEAR = "duplicates", "near duplicates"


def shortest_contact(system: System) -> float:
    """Return the smallest distance over the sum of covalent radii, periodic images included; inf if alone.

    Only pairs nearer than that sum are looked for: beyond it the answer is inf, too.
    """
    radii = covalent_radii[system.atomic_numbers]  # (N,) A
    search = NeighborList(cutoff=float(2 * radii.max()), full_list=False, sorted=False)
    box = system.cell if system.pbc.any() else np.zeros((3, 3))
    i, j, distance = search.compute(system.positions, box, system.pbc, "ijd", copy=True)
    return float((distance / (radii[i] + radii[j])).min(initial=np.inf))


def without_contacts(frames: Iterable[Frame], min_contact: float, dropped: Counter[str]) -> list[Frame]:
    """Keep frames whose atoms are apart."""
    return _keep(frames, lambda f: SHORT if shortest_contact(f.system) < min_contact else "", dropped)


def within_forces(frames: Iterable[Frame], max_force: float, dropped: Counter[str]) -> list[Frame]:
    """Keep frames whose energy and forces are finite, and no force on a free atom above `max_force` eV/A."""

    def reason(frame: Frame) -> str:
        if not np.isfinite([frame.energy, frame.largest_force]).all():
            return NOT_FINITE
        return LARGE if frame.largest_force > max_force else ""

    return _keep(frames, reason, dropped)


def _keep(frames: Iterable[Frame], reason: Callable[[Frame], str], dropped: Counter[str]) -> list[Frame]:
    kept = []
    for frame in frames:
        why = reason(frame)
        if why:
            dropped[why] += 1
        else:
            kept.append(frame)
    return kept


@dataclass
class _Group:
    """Structures of the same atoms in the same cell."""

    positions: list[NDArray[np.float64]] = field(default_factory=list)  # (N, 3) A each
    energies: list[float] = field(default_factory=list)  # eV


@dataclass
class Met:
    """All structures kept so far."""

    min_displacement: float  # A; 0: only equal ids are duplicates
    min_energy_difference: float  # eV/atom
    ids: set[bytes] = field(default_factory=set)
    groups: dict[bytes, _Group] = field(default_factory=dict)

    def new_ones(self, frames: Iterable[Frame], dropped: Counter[str]) -> list[Frame]:
        """Keep what was not met, and remember it."""
        kept = []
        for frame in frames:
            if frame.system.id in self.ids:
                dropped[DUPLICATE] += 1
            elif self._is_near(frame):
                dropped[NEAR] += 1
            else:
                kept.append(frame)
                self.add(frame)
        return kept

    def add(self, frame: Frame) -> None:
        """Remember a structure."""
        self.ids.add(frame.system.id)
        if self.min_displacement > 0:
            group = self.groups.setdefault(_group_key(frame.system), _Group())
            group.positions.append(frame.system.positions)
            group.energies.append(frame.energy)

    def _is_near(self, frame: Frame) -> bool:
        group = self.groups.get(_group_key(frame.system)) if self.min_displacement > 0 else None
        if group is None:
            return False
        limit = self.min_energy_difference * frame.system.n_atoms
        alike = np.flatnonzero(np.abs(np.array(group.energies) - frame.energy) <= limit)
        if len(alike) == 0:
            return False
        others = np.stack([group.positions[k] for k in alike])
        return bool((largest_displacements(frame.system, others) <= self.min_displacement).any())


def _group_key(system: System) -> bytes:
    cell = np.round(system.cell, 4) + 0.0 if system.pbc.any() else np.zeros((3, 3))
    return system.atomic_numbers.tobytes() + cell.tobytes() + system.pbc.tobytes()


def largest_displacements(system: System, others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how far the farthest atom lies from where it is in each of `others` (S, N, 3), in Angstrom."""
    if system.pbc.any():
        difference = (others - system.positions).reshape(-1, 3)
        lengths = find_mic(difference, system.cell, system.pbc)[1].reshape(len(others), -1)
        return np.asarray(lengths.max(axis=1))
    here = system.positions - system.positions.mean(axis=0)
    there = others - others.mean(axis=1, keepdims=True)
    # Kabsch: the rotation that maximises the overlap, a reflection excluded by the sign of the last axis.
    u, _, vt = np.linalg.svd(np.einsum("sni,nj->sij", there, here))
    signs = np.ones((len(others), 3))
    signs[:, 2] = np.sign(np.linalg.det(u @ vt))
    turned = there @ ((u * signs[:, None, :]) @ vt)
    return np.asarray(np.linalg.norm(turned - here, axis=2).max(axis=1))
