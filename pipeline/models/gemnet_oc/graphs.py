"""The four graphs of GemNet-OC, all taken from one neighbour search, and their layout as tables.

No list of triplets or quadruplets is ever made. The edges of a graph are sorted by receiver, so those of one
atom can stand side by side in a table with a row per atom; triplets c->a<-b are then products of an atom's
own rows, and quadruplets c->a<-b<-d products of the rows of two neighboring atoms.

Which edges are nearest is decided as in molkd.pipeline.graphs.neighbors: by whole steps of distance, equal
ones by (sender, shift), so neither rounding nor the other systems of a batch have a say.
"""

import logging
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from molkd.pipeline.graphs.batch import Batch, edge_vectors
from molkd.pipeline.graphs.neighbors import RESOLUTION, TIE_STEP
from molkd.pipeline.models.gemnet_oc.config import GemNetOCConfig, Limits

log = logging.getLogger(__name__)

_SPAN = 2**13  # shifts of +-2047 lattice vectors and sums of two of them fit between two codes


class Graph(NamedTuple):
    """Directed edges sorted by receiver."""

    sender: Int[Tensor, " E"]
    receiver: Int[Tensor, " E"]
    shift: Int[Tensor, "E 3"]  # the sender's image
    distance: Float[Tensor, " E"]  # A
    vector: Float[Tensor, "E 3"]  # unit vector from sender to receiver


class Table(NamedTuple):
    """Places of a graph's edges in tables (N, width): one row per receiver, padded."""

    place: Int[Tensor, " E"]  # in the flattened table
    n_rows: int
    width: int

    def spread(self, values: Shaped[Tensor, "E ..."]) -> Shaped[Tensor, "N W ..."]:
        """Put rows of edges into the table."""
        table = values.new_zeros((self.n_rows * self.width, *values.shape[1:]))
        return table.index_copy(0, self.place, values).view(self.n_rows, self.width, *values.shape[1:])

    def gather(self, table: Shaped[Tensor, "N W ..."]) -> Shaped[Tensor, "E ..."]:
        """Take rows of edges from the table."""
        return table.flatten(0, 1).index_select(0, self.place)


class Graphs(NamedTuple):
    """What one forward pass needs; a graph that no interaction uses is None."""

    main: Graph
    mirror: Int[Tensor, " E"]  # place of each main edge's other direction
    atom_edge: Graph | None  # between atoms and edges
    quad: Graph | None  # central edges of quadruplets
    atom: Graph | None  # between atoms


def build_graphs(batch: Batch, config: GemNetOCConfig) -> Graphs:
    """Select the graphs from the batch's edges, differentiable in the positions."""
    widest = _widest(batch)
    ranks = _Ranks(batch, config.tie_tolerance)
    main, mirror = _symmetrized(ranks.nearest(widest, config.main_limits))
    atom_edge = quad = None
    if config.atom_edge_interaction or config.edge_atom_interaction:
        atom_edge = ranks.nearest(widest, config.atom_edge_limits)
    if config.quad_interaction:
        near = ranks.nearest(widest, config.quad_limits)
        tags = torch.tensor(config.qint_tags, device=batch.tags.device)
        chosen = torch.isin(batch.tags, tags)
        quad = take(near, (chosen[near.sender] | chosen[near.receiver]).nonzero().squeeze(1))
        if _lack_tags(batch, near, chosen):
            _warn_of_tags(config.qint_tags)
    return Graphs(main, mirror, atom_edge, quad, widest if config.atom_interaction else None)


def _lack_tags(batch: Batch, near: Graph, chosen: Bool[Tensor, " N"]) -> bool:
    """Return whether any system has edges, but no chosen atom that makes quadruplets of them."""
    n_edges, n_chosen = batch.system_idx.new_zeros((2, batch.n_systems))  # (S,) each
    n_edges.index_add_(0, batch.system_idx[near.receiver], torch.ones_like(near.receiver))
    n_chosen.index_add_(0, batch.system_idx, chosen.long())
    return bool(((n_edges > 0) & (n_chosen == 0)).any())


@cache
def _warn_of_tags(qint_tags: tuple[int, ...]) -> None:
    """Say it once: the numbers are finite all the same."""
    log.warning(
        "a system has no atom with a tag in qint_tags %s: GemNet-OC works without quadruplets there; give "
        "the structures OC20's tags (0 below the surface, 1 surface, 2 adsorbate), or train with "
        "--set model.qint_tags=[0,1,2] where tags mean nothing",
        list(qint_tags),
    )


def table_of(graph: Graph, n_atoms: int) -> Table:
    """Return where the edges of each receiver stand side by side."""
    slot, n_edges = _numbers(graph.receiver, n_atoms)
    width = max(int(n_edges.max()), 1) if n_atoms else 1
    return Table(graph.receiver * width + slot, n_atoms, width)


def _numbers(receiver: Int[Tensor, " E"], n_atoms: int) -> tuple[Int[Tensor, " E"], Int[Tensor, " N"]]:
    """Return each edge's number among those of its receiver, from 0, and how many each atom has."""
    n_edges = torch.bincount(receiver, minlength=n_atoms)
    first = n_edges.cumsum(0) - n_edges
    return torch.arange(len(receiver), device=receiver.device) - first[receiver], n_edges


def image_codes(graph: Graph) -> Int[Tensor, " E"]:
    """Return one number per sender's image; codes of the same atom differ by the `shift_codes`."""
    return graph.sender * _SPAN**3 + shift_codes(graph)


def atom_codes(atoms: Int[Tensor, " M"]) -> Int[Tensor, " M"]:
    """Return the code of atoms that are not shifted."""
    return atoms * _SPAN**3


def shift_codes(graph: Graph) -> Int[Tensor, " E"]:
    """Return one number per shift, so that numbers of shifts add up as the shifts do."""
    x, y, z = graph.shift.unbind(1)
    return (x * _SPAN + y) * _SPAN + z


def _widest(batch: Batch) -> Graph:
    to_neighbor = edge_vectors(batch, batch.positions)  # (E, 3)
    distance = torch.linalg.vector_norm(to_neighbor, dim=1)
    sender, receiver = batch.edge_index
    vector = -to_neighbor / distance.unsqueeze(1)
    return Graph(sender, receiver, batch.edge_shift.long(), distance, vector)


class _Ranks:
    """How near each edge's sender is among the neighbors of its receiver."""

    def __init__(self, batch: Batch, tie_tolerance: float) -> None:
        positions, cell = batch.positions.detach().double(), batch.cell.double()
        wide = batch._replace(cell=cell, edge_shift=batch.edge_shift.double())
        length = torch.linalg.vector_norm(edge_vectors(wide, positions), dim=1)
        receiver = batch.edge_index[1]
        self.length = length
        self.steps = torch.round(length / TIE_STEP).long()  # (E,)
        self.receiver, self.n_atoms = receiver, batch.n_atoms
        self.tolerance = round(tie_tolerance / TIE_STEP)
        # stable: equally far edges stay in their (sender, shift) order
        order = torch.argsort(receiver * 2**40 + self.steps, stable=True)
        self.rank = torch.empty_like(order)
        self.rank[order] = _numbers(receiver, batch.n_atoms)[0]  # receivers come sorted: order keeps them

    def nearest(self, graph: Graph, limits: Limits) -> Graph:
        """Return the edges to the nearest senders within the cutoff."""
        near = self.rank < limits.max_neighbors
        if self.tolerance:  # behind the first that is too many, see NeighborRule
            limit = self.steps.new_full((self.n_atoms,), 2**40)
            is_last = (self.rank == limits.max_neighbors).nonzero().squeeze(1)
            limit[self.receiver[is_last]] = self.steps[is_last] + self.tolerance
            near = self.steps <= limit[self.receiver]
        near &= self.length <= limits.cutoff + RESOLUTION / 2
        return take(graph, near.nonzero().squeeze(1))


def take(graph: Graph, chosen: Int[Tensor, " M"]) -> Graph:
    """Return some of the edges."""
    return Graph(*(column.index_select(0, chosen) for column in graph))


def _symmetrized(graph: Graph) -> tuple[Graph, Int[Tensor, " E"]]:
    """Keep of each pair the edge whose sender has the lower index and add its mirror image (OCP's rule)."""
    x, y, z = graph.shift.unbind(1)
    earlier = (x < 0) | ((x == 0) & ((y < 0) | ((y == 0) & (z < 0))))
    own_image = graph.sender == graph.receiver
    half = take(graph, ((graph.sender < graph.receiver) | (own_image & earlier)).nonzero().squeeze(1))
    both = Graph(
        sender=torch.cat([half.sender, half.receiver]),
        receiver=torch.cat([half.receiver, half.sender]),
        shift=torch.cat([half.shift, -half.shift]),
        distance=torch.cat([half.distance, half.distance]),
        vector=torch.cat([half.vector, -half.vector]),
    )
    order = torch.argsort(image_codes(both), stable=True)
    order = order[torch.argsort(both.receiver[order], stable=True)]
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    n_half = len(half.sender)
    mirror = torch.cat([place[n_half:], place[:n_half]])[order]
    return take(both, order), mirror
