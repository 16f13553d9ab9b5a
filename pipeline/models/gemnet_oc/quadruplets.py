"""Interaction over quadruplets c->a<-b<-d: two edges at the ends of a central edge, and their dihedral angle.

The harmonics of angle and dihedral angle are multiplied one after the other: first everything is summed
over d with the dihedral's, then over b with the angle's. So nothing of their product's size is ever made.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from molkd.pipeline.models.gemnet_oc.bases import zonal_harmonics
from molkd.pipeline.models.gemnet_oc.graphs import (
    Graph,
    Table,
    atom_codes,
    image_codes,
    shift_codes,
    table_of,
    take,
)
from molkd.pipeline.models.gemnet_oc.layers import Dense, Linear
from molkd.pipeline.models.gemnet_oc.triplets import Bilinear, both_directions
from molkd.pipeline.models.ocp_blocks import ScaleFactor

# Below this product of sines three atoms are on a line: what is left of a dihedral angle is the rounding of
# positions. OCP draws the line at 1e-9, where float32 never gets, so its crystals have random angles.
_STRAIGHT = 1e-5


class QuadGeometry(NamedTuple):
    """Q central edges b->a with the main edges at both ends; A angular functions."""

    d_edges: Int[Tensor, " E_d"]  # main edges d->b that are needed
    d_table: Table  # a row per atom b
    b_row: Int[Tensor, " Q"]
    c_edges: Int[Tensor, " E_c"]  # main edges c->a that get a message
    c_place: Int[Tensor, " E_c"]  # of those in (R, Wc)
    place: Int[Tensor, " QWc"]  # of pairs (b->a, c->a) in (R, Wc, Wq)
    n_places: tuple[int, int]  # R Wc, Wq
    angle_abd: Float[Tensor, "Q Wd A"]  # harmonics, zero where d is a
    angle_cab: Float[Tensor, "RWc A Wq"]  # harmonics, zero where c is b
    dihedral: Float[Tensor, "Q WcA Wd"]  # harmonics, zero where c is d


class QuadBasis(NamedTuple):
    """The geometry with what learned maps make of it."""

    geometry: QuadGeometry
    radial: Float[Tensor, "E_d R"]  # of the input edges
    circular: Float[Tensor, "Q Wd I"]  # of central edge and angle abd
    spherical: Float[Tensor, "E_c I AA"]  # what output edges make of angle cab times dihedral


def quad_geometry(main: Graph, quad: Graph, n_atoms: int, n_angular: int) -> QuadGeometry:
    """Find the quadruplets of all central edges; masks tell images apart by atom and shift."""
    c_edges, c_table, row_of_a = _edges_at(main, quad.receiver, n_atoms)
    d_edges, d_table, row_of_b = _edges_at(main, quad.sender, n_atoms)
    a_row, b_row = row_of_a[quad.receiver], row_of_b[quad.sender]  # (Q,)
    at_a, at_b = take(main, c_edges), take(main, d_edges)

    code_b = image_codes(quad).unsqueeze(1)
    code_c = c_table.spread(image_codes(at_a))[a_row]  # (Q, Wc)
    code_d = d_table.spread(image_codes(at_b))[b_row] + shift_codes(quad).unsqueeze(1)  # seen from a
    c_is_other = code_c != code_b
    d_is_other = code_d != atom_codes(quad.receiver).unsqueeze(1)
    ends_differ = code_c.unsqueeze(2) != code_d.unsqueeze(1)  # (Q, Wc, Wd)

    v_ba = quad.vector.unsqueeze(1)  # (Q, 1, 3)
    v_ca = c_table.spread(at_a.vector)[a_row]  # (Q, Wc, 3)
    v_db = d_table.spread(at_b.vector)[b_row]  # (Q, Wd, 3)
    cos_cab = (v_ca * v_ba).sum(dim=2).clamp(-1, 1)
    cos_abd = (v_db * v_ba).sum(dim=2).clamp(-1, 1)
    cos_dihedral = _cos_dihedral(torch.linalg.cross(v_ca, v_ba), torch.linalg.cross(v_db, v_ba))

    angle_cab = zonal_harmonics(cos_cab, n_angular, dim=2) * c_is_other.unsqueeze(2)  # (Q, Wc, A)
    q_table = table_of(quad._replace(receiver=a_row), c_table.n_rows)
    # (R, Wc, Wq) from (R, Wq, Wc): the sum over b of one output edge runs over neighboring places
    c_slot = torch.arange(c_table.width, device=a_row.device)
    q_slot = q_table.place - a_row * q_table.width
    place = (a_row.unsqueeze(1) * c_table.width + c_slot) * q_table.width + q_slot.unsqueeze(1)  # (Q, Wc)
    n_places = (c_table.n_rows * c_table.width, q_table.width)
    cab = angle_cab.new_zeros((n_places[0] * n_places[1], n_angular))
    cab = cab.index_copy(0, place.flatten(), angle_cab.flatten(0, 1))
    return QuadGeometry(
        d_edges=d_edges,
        d_table=d_table,
        b_row=b_row,
        c_edges=c_edges,
        c_place=c_table.place,
        place=place.flatten(),
        n_places=n_places,
        angle_abd=zonal_harmonics(cos_abd, n_angular, dim=2) * d_is_other.unsqueeze(2),
        angle_cab=cab.view(*n_places, n_angular).transpose(1, 2).contiguous(),
        dihedral=(zonal_harmonics(cos_dihedral, n_angular, dim=2) * ends_differ.unsqueeze(2)).flatten(1, 2),
    )


def _edges_at(main: Graph, atoms: Int[Tensor, " Q"], n_atoms: int) -> tuple[Tensor, Table, Int[Tensor, " N"]]:
    """Return the main edges to some atoms, their table with a row per such atom, and each atom's row."""
    is_end = torch.zeros(n_atoms, dtype=torch.bool, device=atoms.device).index_fill(0, atoms, value=True)
    row_of = is_end.long().cumsum(0) - 1
    edges = is_end[main.receiver].nonzero().squeeze(1)
    graph = take(main, edges)
    n_rows = int(row_of[-1]) + 1
    return edges, table_of(graph._replace(receiver=row_of[graph.receiver]), n_rows), row_of


def _cos_dihedral(a: Float[Tensor, "Q Wc 3"], b: Float[Tensor, "Q Wd 3"]) -> Float[Tensor, "Q Wc Wd"]:
    """Return the cosine between normals; 0 where one vanishes because three atoms are on a line."""
    norms = torch.linalg.vector_norm(a, dim=2).unsqueeze(2) * torch.linalg.vector_norm(b, dim=2).unsqueeze(1)
    cosine = ((a @ b.transpose(1, 2)) / norms.clamp_min(_STRAIGHT)).clamp(-1, 1)
    return torch.where(norms > _STRAIGHT, cosine, torch.zeros_like(cosine))


class QuadrupletInteraction(nn.Module):
    """Messages from main edges d->b to main edges c->a."""

    def __init__(self, n_edge: int, n_in: int, n_out: int, n_rbf: int, n_cbf: int, n_sbf: int) -> None:
        super().__init__()
        self.dense_db = Dense(n_edge, n_edge)
        self.mlp_rbf = Linear(n_rbf, n_edge)
        self.scale_rbf = ScaleFactor()
        self.mlp_cbf = Linear(n_cbf, n_in)
        self.scale_cbf = ScaleFactor()
        self.mlp_sbf = Bilinear(n_sbf, n_in, n_out)
        self.scale_sbf_sum = ScaleFactor()
        self.down_projection = Dense(n_edge, n_in)
        self.up_projection_ca = Dense(n_out, n_edge)
        self.up_projection_ac = Dense(n_out, n_edge)

    def forward(
        self, m: Float[Tensor, "E C"], basis: QuadBasis, mirror: Int[Tensor, " E"]
    ) -> Float[Tensor, "E C"]:
        """Return messages to all main edges, zero to those without quadruplets."""
        geometry = basis.geometry
        x = self.dense_db(m.index_select(0, geometry.d_edges))
        x = self.scale_rbf(x * self.mlp_rbf(basis.radial), x)
        x = self.down_projection(x)  # (E_d, D)
        x = geometry.d_table.spread(x).index_select(0, geometry.b_row)  # (Q, Wd, D)
        x = self.scale_cbf(x * self.mlp_cbf(basis.circular), x)

        over_d = geometry.dihedral @ x  # (Q, Wc A, D)
        n_angular = geometry.angle_cab.shape[1]
        over_d = over_d.unflatten(1, (-1, n_angular)).flatten(0, 1).flatten(1)  # (Q Wc, A D)
        n_outputs, width = geometry.n_places
        table = over_d.new_zeros((n_outputs * width, over_d.shape[1])).index_copy(0, geometry.place, over_d)
        over_b = geometry.angle_cab @ table.view(n_outputs, width, -1)  # (R Wc, A, A D)
        sums = over_b.index_select(0, geometry.c_place).view(len(geometry.c_place), n_angular**2, -1)
        products = basis.spherical @ sums  # (E_c, I, D)
        found: Tensor = self.scale_sbf_sum(self.mlp_sbf(products), x)
        everywhere = found.new_zeros((len(m), found.shape[1])).index_copy(0, geometry.c_edges, found)
        return both_directions(everywhere, mirror, self.up_projection_ca, self.up_projection_ac)
