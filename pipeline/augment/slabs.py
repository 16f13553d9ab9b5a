"""Bulk crystals and slabs as in OC20: periodic along all axes, the lower part fixed, tags 0 and 1."""

import re
from collections.abc import Collection
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms
from ase.build import bulk as build_bulk
from ase.build import surface
from ase.constraints import FixAtoms
from ase.data import atomic_numbers, reference_states
from ase.formula import Formula

from molkd.pipeline.augment.frame import to_atoms
from molkd.pipeline.data.sources import open_source
from molkd.pipeline.errors import ConfigError

METALS = (
    "Al", "Sc", "Ti", "V", "Cr", "Fe", "Co", "Ni", "Cu", "Zn", "Y", "Zr", "Nb", "Mo", "Ru", "Rh", "Pd", "Ag",
    "Cd", "Hf", "Ta", "W", "Re", "Os", "Ir", "Pt", "Au",
)  # fmt: skip
_CUBIC_FACETS, _HEXAGONAL_FACETS = ((1, 1, 1), (1, 0, 0), (1, 1, 0)), ((0, 0, 1), (1, 0, 0))
_NEAREST = {
    "fcc": 2**-0.5,
    "bcc": 0.75**0.5,
    "hcp": 1.0,
    "diamond": 0.75**0.5 / 2,
}  # neighbours, in units of a
_MAX_LAYERS = 60
_LOWEST = 0.5  # A: the lowest layer is fixed, however thin a slab is
Miller = tuple[int, int, int]


class Bulk(NamedTuple):
    """A conventional cell of a crystal."""

    name: str
    atoms: Atoms

    @property
    def facets(self) -> tuple[Miller, ...]:
        """Low-index facets of the lattice."""
        a, b, _, alpha, beta, gamma = self.atoms.cell.cellpar()
        hexagonal = np.allclose([a, alpha, beta, gamma], [b, 90, 90, 120], atol=0.01)
        return _HEXAGONAL_FACETS if hexagonal else _CUBIC_FACETS


def read_bulks(names: Collection[str], known: Collection[int]) -> list[Bulk]:
    """Return the crystals that the user names; without names the metals among the `known` elements.

    Raises
    ------
    ConfigError
        If a name is none of an element, an alloy A3B or AB, or a file, or holds an element that is not known.
    """
    if not names:
        bulks = [named_bulk(symbol) for symbol in METALS if atomic_numbers[symbol] in known]
        if not bulks:
            raise ConfigError("the teacher knows no metal; name crystals of its elements with --bulk")
        return bulks
    bulks = [
        bulk for name in names for bulk in (_from_file(name) if Path(name).exists() else [named_bulk(name)])
    ]
    for one in bulks:
        require_known(one.name, one.atoms, known)
    return bulks


def require_known(name: str, atoms: Atoms, known: Collection[int]) -> None:
    """Refuse elements that the teacher was not made for."""
    strange = sorted({s for s, z in zip(atoms.symbols, atoms.numbers, strict=True) if z not in known})
    if strange:
        raise ConfigError(
            f"{name}: holds {', '.join(strange)}, which the teacher does not know; see kd teacher info"
        )


def named_bulk(name: str) -> Bulk:
    """Return an element in its structure at room temperature, A3B as L1_2 (Cu3Au) or AB as B2 (CsCl).

    Lattice constants of elements are ASE's; alloys get the mean distance of nearest neighbours in the
    elements, weighted by composition (close to Vegard's law).
    """
    counts = _composition(name)
    if len(counts) == 1:
        symbol = next(iter(counts))
        lattice = _lattice(symbol, name)[0]
        return Bulk(name, build_bulk(symbol) if lattice == "hcp" else build_bulk(symbol, cubic=True))
    total = sum(counts.values())
    nearest = sum(n * _nearest(symbol, name) for symbol, n in counts.items()) / total
    (few, _), (many, n_many) = sorted(counts.items(), key=lambda item: item[1])
    if n_many == 3:
        a = nearest / _NEAREST["fcc"]
        places = [[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
        return Bulk(name, Atoms([few, many, many, many], scaled_positions=places, cell=[a, a, a], pbc=True))
    a = nearest / _NEAREST["bcc"]
    places = [[0, 0, 0], [0.5, 0.5, 0.5]]
    return Bulk(name, Atoms([few, many], scaled_positions=places, cell=[a, a, a], pbc=True))


def _composition(name: str) -> dict[str, int]:
    try:
        counts: dict[str, int] = Formula(name).count()
    except ValueError:
        counts = {}
    if sorted(counts.values()) not in ([1], [1, 1], [1, 3]) or not set(counts) <= set(atomic_numbers):
        raise ConfigError(
            f"{name}: is no file, and no element (Cu) or alloy that can be built: A3B (Cu3Au) or AB (CuZn); "
            "give other crystals as files"
        )
    return counts


def _lattice(symbol: str, name: str) -> tuple[str, float]:
    state: dict[str, Any] = reference_states[atomic_numbers[symbol]] or {}
    if state.get("symmetry") not in _NEAREST or not state.get("a"):
        raise ConfigError(f"{name}: ASE has no simple lattice for {symbol}; give its crystal as a file")
    return str(state["symmetry"]), float(state["a"])


def _nearest(symbol: str, name: str) -> float:
    lattice, a = _lattice(symbol, name)
    return float(_NEAREST[lattice] * a)


def _from_file(name: str) -> list[Bulk]:
    with closing(open_source(name)) as source:
        systems = [source.read(k) for k in range(len(source))]
    for system in systems:
        if not system.pbc.all():
            raise ConfigError(f"{system.source}: is no crystal, it is not periodic along all axes")
    bulks = [Bulk(system.source, to_atoms(system)) for system in systems]
    for bulk in bulks:
        bulk.atoms.set_constraint()
    return bulks


def parse_facet(text: str) -> Miller:
    """Read Miller indices: 111, or 1,0,-1.

    Raises
    ------
    ConfigError
        If there are not three whole numbers, or all are zero.
    """
    parts = text.split(",") if "," in text else list(text)
    if len(parts) != 3 or not all(re.fullmatch(r"\s*-?\d+\s*", p) for p in parts) or not any(map(int, parts)):
        raise ConfigError(f"--facet {text}: write three Miller indices, not all zero: 111, or 1,0,-1")
    h, k, l = map(int, parts)  # noqa: E741  # the letters of Miller indices
    return h, k, l


def slab(
    bulk: Bulk, facet: Miller, *, min_lateral: float, min_thickness: float, vacuum: float, free_depth: float
) -> Atoms:
    """Cut a slab; the surface is along the first two lattice vectors, its normal along z.

    Parameters
    ----------
    min_lateral : A, smallest distance of an atom from its images along the surface
    min_thickness : A, of as many layers as it takes
    vacuum : A, between slabs
    free_depth : A below the topmost atom; what is deeper is fixed and has tag 0, the rest has tag 1
    """
    unit = surface(bulk.atoms, facet, 1, periodic=True)
    height = unit.get_volume() / np.linalg.norm(np.cross(unit.cell[0], unit.cell[1]))
    n_layers = int(np.clip(np.ceil(min_thickness / height - 1e-6), 1, _MAX_LAYERS))
    made: Atoms = surface(bulk.atoms, facet, n_layers, vacuum=vacuum / 2)
    a, b = made.cell[0], made.cell[1]
    area = np.linalg.norm(np.cross(a, b))
    widths = area / np.linalg.norm(b), area / np.linalg.norm(a)  # distances of a cell's opposite edges
    made = made.repeat([*(int(np.ceil(min_lateral / w - 1e-6)) for w in widths), 1])
    made.pbc = True
    heights = made.positions[:, 2]
    free = heights > max(heights.max() - free_depth, heights.min() + _LOWEST)
    made.set_tags(free.astype(int))
    made.set_constraint(FixAtoms(mask=~free))
    return made
