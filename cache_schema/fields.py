"""Every array the format knows: name, axis, trailing shape, dtype, unit and symmetry."""

from dataclasses import dataclass
from typing import Literal

Axis = Literal["system", "atom", "edge"]
Symmetry = Literal["invariant", "vector", "none"]


@dataclass(frozen=True)
class FieldSpec:
    """One array: a row of `shape` and `dtype` per system, per atom or per directed edge."""

    name: str
    axis: Axis
    shape: tuple[int, ...]  # trailing shape of one row, () for a number
    dtype: str  # numpy dtype in memory
    unit: str  # "eV", "A", "eV/A" or "1"
    symmetry: Symmetry = "invariant"
    max_per_atom: int = 0  # on the edge axis: no system has more than so many edges times its atoms


# What a store of structures and labels holds; a missing label is NaN.
SYSTEM_FIELDS = {
    f.name: f
    for f in (
        FieldSpec("energy", "system", (), "float64", "eV"),
        FieldSpec("cell", "system", (3, 3), "float32", "A", "vector"),
        FieldSpec("pbc", "system", (3,), "bool", "1"),
    )
}
ATOM_FIELDS = {
    f.name: f
    for f in (
        FieldSpec("atomic_numbers", "atom", (), "uint8", "1"),
        FieldSpec("positions", "atom", (3,), "float32", "A", "vector"),
        FieldSpec("forces", "atom", (3,), "float32", "eV/A", "vector"),
        FieldSpec("tags", "atom", (), "uint8", "1"),
        FieldSpec("fixed", "atom", (), "bool", "1"),
    )
}


def energy_spec() -> FieldSpec:
    """Teacher's total energy."""
    return FieldSpec("energy", "system", (), "float64", "eV")


def forces_spec() -> FieldSpec:
    """Teacher's forces."""
    return FieldSpec("forces", "atom", (3,), "float32", "eV/A", "vector")


def atomic_energies_spec() -> FieldSpec:
    """Teacher's own decomposition of its energy; the sum over a system's atoms is its energy."""
    return FieldSpec("atomic_energies", "atom", (), "float64", "eV")


def node_spec(n_channels: int, name: str = "node") -> FieldSpec:
    """Scalar features per atom (Eq. 4, n2n), shape (C,)."""
    return FieldSpec(name, "atom", (n_channels,), "float32", "1")


def v2v_spec(n_channels: int, name: str = "v2v") -> FieldSpec:
    """Vector features per atom (Eq. 6, v2v), shape (3, C)."""
    return FieldSpec(name, "atom", (3, n_channels), "float32", "1", "vector")


def e2n_spec(n_channels: int) -> FieldSpec:
    """Edge features summed at their receivers (Eq. 5, e2n), shape (C,)."""
    return node_spec(n_channels, "e2n")


MAX_EDGES_PER_ATOM = 1 << 16


def edge_spec(n_channels: int, max_per_atom: int | None = None) -> FieldSpec:
    """Raw features of the directed edges (e2e), shape (C,).

    Parameters
    ----------
    max_per_atom : the most edges of any system, divided by its atoms; None takes the most the format allows
    """
    most = MAX_EDGES_PER_ATOM if max_per_atom is None else max_per_atom
    return FieldSpec("edge", "edge", (n_channels,), "float32", "1", max_per_atom=most)


# What says which edges the rows of an edge signal are. Numbers of atoms count from 0 within their system.
# A shift needs 16 bits: atoms of a trajectory may lie hundreds of cells away from each other.
EDGE_INDEX = FieldSpec("index", "edge", (2,), "int32", "1", "none")  # sender, receiver
EDGE_SHIFT = FieldSpec("shift", "edge", (3,), "int16", "1", "none")  # lattice vectors to the sender's image
N_EDGES = FieldSpec("n_edges", "system", (), "int32", "1", "none")
