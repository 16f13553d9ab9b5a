"""The one batch type: systems concatenated over atoms, with their edges.

Conventions, written here once. `edge_index[0]` is the neighbor j (sender), `edge_index[1]` the center i
(receiver); edges are sorted by receiver, then sender, then shift. The vector of an edge points from the
center to the neighbor's periodic image: ``positions[j] + shift @ cell - positions[i]``, in Angstrom.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from molkd.pipeline.data.system import System
from molkd.pipeline.graphs.neighbors import NeighborRule, neighbor_lists

BATCH_FIELDS = ("atomic_numbers", "positions", "cell", "pbc", "tags", "fixed")  # of a store, that make one
_PER_ROW = (*BATCH_FIELDS, "edge_shift")
_PER_ATOM = ("atomic_numbers", "positions", "tags", "fixed")

Edges = tuple[NDArray[np.int64], NDArray[np.integer]]  # edge_index (2, E), edge_shift (E, 3)


class Batch(NamedTuple):
    """S systems with N atoms and E edges in all."""

    atomic_numbers: Int[Tensor, " N"]
    positions: Float[Tensor, "N 3"]  # A
    cell: Float[Tensor, "S 3 3"]  # A, rows are lattice vectors, zeros if not periodic
    pbc: Bool[Tensor, "S 3"]
    tags: Int[Tensor, " N"]
    fixed: Bool[Tensor, " N"]
    system_idx: Int[Tensor, " N"]  # [0, 0, 0, 1, 1]: which system an atom belongs to
    atoms_ptr: Int[Tensor, " S1"]  # [0, 3, 5]: where each system's atoms begin, length S+1
    edge_index: Int[Tensor, "2 E"]
    edge_shift: Float[Tensor, "E 3"]  # whole numbers of lattice vectors

    @property
    def n_systems(self) -> int:
        """Number of systems S."""
        return len(self.atoms_ptr) - 1

    @property
    def n_atoms(self) -> int:
        """Number of atoms N."""
        return len(self.atomic_numbers)


def make_batch(
    *,
    atomic_numbers: NDArray[np.integer],
    positions: NDArray[np.floating],
    n_atoms: NDArray[np.integer],
    cell: NDArray[np.floating],
    pbc: NDArray[np.bool_],
    tags: NDArray[np.integer],
    fixed: NDArray[np.bool_],
    rule: NeighborRule | Edges,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Build a batch from concatenated arrays: (N,), (N, 3) A, (S,), (S, 3, 3) A, (S, 3), (N,), (N,).

    In place of the rule its outcome may be given: edge_index (2, E) and edge_shift (E, 3), sorted.
    """
    atoms_ptr = np.concatenate([[0], np.cumsum(n_atoms)]).astype(np.int64)
    edges = neighbor_lists(positions, atoms_ptr, cell, pbc, rule) if isinstance(rule, NeighborRule) else rule
    edge_index, edge_shift = edges
    return Batch(
        atomic_numbers=torch.from_numpy(atomic_numbers.astype(np.int64)),
        positions=torch.as_tensor(positions).to(dtype),
        cell=torch.as_tensor(cell).to(dtype),
        pbc=torch.as_tensor(pbc),
        tags=torch.from_numpy(tags.astype(np.int64)),
        fixed=torch.as_tensor(fixed),
        system_idx=torch.from_numpy(np.repeat(np.arange(len(n_atoms)), n_atoms)),
        atoms_ptr=torch.from_numpy(atoms_ptr),
        edge_index=torch.from_numpy(edge_index),
        edge_shift=torch.from_numpy(edge_shift).to(dtype),
    )


def batch_from_arrays(
    arrays: Mapping[str, NDArray[Any]], rule: NeighborRule | Edges, dtype: torch.dtype = torch.float32
) -> Batch:
    """Build a batch from what `Cache.read` gives of `BATCH_FIELDS`; rule as of `make_batch`."""
    return make_batch(
        atomic_numbers=arrays["atomic_numbers"],
        positions=arrays["positions"],
        n_atoms=arrays["n_atoms"],
        cell=arrays["cell"],
        pbc=arrays["pbc"],
        tags=arrays["tags"],
        fixed=arrays["fixed"],
        rule=rule,
        dtype=dtype,
    )


def batch_from_systems(
    systems: Sequence[System], rule: NeighborRule, dtype: torch.dtype = torch.float32
) -> Batch:
    """Build a batch from System records."""
    return make_batch(
        atomic_numbers=np.concatenate([s.atomic_numbers for s in systems]),
        positions=np.concatenate([s.positions for s in systems]),
        n_atoms=np.array([s.n_atoms for s in systems]),
        cell=np.stack([s.cell for s in systems]),
        pbc=np.stack([s.pbc for s in systems]),
        tags=np.concatenate([s.tags for s in systems]),
        fixed=np.concatenate([s.fixed for s in systems]),
        rule=rule,
        dtype=dtype,
    )


def join_batches(batches: Sequence[Batch]) -> Batch:
    """Put the systems of several batches one behind the other; their edges stay as they are, and sorted."""
    first_system = np.cumsum([0, *(b.n_systems for b in batches)])[:-1].tolist()
    first_atom = np.cumsum([0, *(b.n_atoms for b in batches)])[:-1].tolist()
    shifted = list(zip(batches, first_system, first_atom, strict=True))
    columns = {name: torch.cat([getattr(b, name) for b in batches]) for name in _PER_ROW}
    return Batch(
        **columns,
        system_idx=torch.cat([b.system_idx + system for b, system, _ in shifted]),
        atoms_ptr=torch.cat([batches[0].atoms_ptr[:1], *(b.atoms_ptr[1:] + atom for b, _, atom in shifted)]),
        edge_index=torch.cat([b.edge_index + atom for b, _, atom in shifted], dim=1),
    )


def split_batch(batch: Batch, borders: Sequence[int]) -> list[Batch]:
    """Cut a batch between systems; borders begin with 0 and end with S. Edges stay as they were found."""
    ptr = batch.atoms_ptr.tolist()
    edges = edges_ptr(batch).tolist()
    parts = []
    for first, last in pairwise(borders):
        systems, atoms = slice(first, last), slice(ptr[first], ptr[last])
        of_part = slice(edges[first], edges[last])
        columns = {name: getattr(batch, name)[atoms] for name in _PER_ATOM}
        parts.append(
            Batch(
                **columns,
                cell=batch.cell[systems],
                pbc=batch.pbc[systems],
                system_idx=batch.system_idx[atoms] - first,
                atoms_ptr=batch.atoms_ptr[first : last + 1] - ptr[first],
                edge_index=batch.edge_index[:, of_part] - ptr[first],
                edge_shift=batch.edge_shift[of_part],
            )
        )
    return parts


def edges_ptr(batch: Batch) -> Int[Tensor, " S1"]:
    """Return where each system's edges begin, length S+1, as `atoms_ptr` does for atoms."""
    return torch.searchsorted(batch.edge_index[1].contiguous(), batch.atoms_ptr)


def to_device(batch: Batch, device: torch.device, dtype: torch.dtype | None = None) -> Batch:
    """Move a batch; floating tensors also change to `dtype` if one is given."""

    def move(t: Tensor) -> Tensor:
        return t.to(device=device, dtype=dtype if t.is_floating_point() else None, non_blocking=True)

    return Batch(*(move(t) for t in batch))


def edge_vectors(batch: Batch, positions: Float[Tensor, "N 3"]) -> Float[Tensor, "E 3"]:
    """Vectors from center to neighbor image in Angstrom, differentiable in `positions`."""
    sender, receiver = batch.edge_index
    cell = batch.cell.index_select(0, batch.system_idx.index_select(0, receiver))  # (E, 3, 3)
    offset = (batch.edge_shift.unsqueeze(1) @ cell).squeeze(1)  # (E, 3)
    # index_select, not [...]: its gradient is a plain sum, several times faster
    return positions.index_select(0, sender) + offset - positions.index_select(0, receiver)
