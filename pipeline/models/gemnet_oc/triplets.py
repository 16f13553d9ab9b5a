"""Interactions over two edges that meet at an atom, and between atoms over one edge (GemNet-OC, Fig. 2)."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn

from molkd.pipeline.models.gemnet_oc.bases import zonal_harmonics
from molkd.pipeline.models.gemnet_oc.graphs import Graph, Table, image_codes
from molkd.pipeline.models.gemnet_oc.layers import Dense, Linear, skip
from molkd.pipeline.models.ocp_blocks import ScaleFactor


class TripletBasis(NamedTuple):
    """Everything about pairs of an input edge b->a and an output edge c->a that features do not change."""

    radial: Float[Tensor, "E_in R"]  # of the input edges
    angular: Float[
        Tensor, "N WoA Wi"
    ]  # harmonics of the angle, row o * A + l; zero where there is no triplet
    inputs: Table
    outputs: Table | None  # None: results are summed at the atoms
    embedding: Tensor  # output edges' part of the basis, (E_out, I, A); at atoms (N, I, Wo A)


def meeting_edges(
    outputs: tuple[Graph, Table], inputs: tuple[Graph, Table], n_angular: int
) -> Float[Tensor, "N Wo A Wi"]:
    """Return the zonal harmonics of the angles between edges c->a and b->a; zero where c and b are one."""
    (graph_out, table_out), (graph_in, table_in) = outputs, inputs
    v_ca, v_ba = table_out.spread(graph_out.vector), table_in.spread(graph_in.vector)
    cosine = v_ca @ v_ba.transpose(1, 2)  # (N, Wo, Wi)
    codes_out = table_out.spread(image_codes(graph_out))  # (N, Wo)
    codes_in = table_in.spread(image_codes(graph_in))
    differ = codes_out.unsqueeze(2) != codes_in.unsqueeze(1)
    harmonics = zonal_harmonics(cosine.clamp(-1, 1), n_angular, dim=2)  # (N, Wo, A, Wi)
    return harmonics * differ.unsqueeze(2)


class Bilinear(nn.Module):
    """Linear map of the products of two embeddings; the first runs slowest."""

    def __init__(self, n_first: int, n_second: int, n_out: int) -> None:
        super().__init__()
        self.bilinear = Linear(n_first * n_second, n_out)

    def forward(self, products: Float[Tensor, "M I C"]) -> Float[Tensor, "M D"]:
        """Map the flattened products."""
        mapped: Tensor = self.bilinear(products.flatten(1))
        return mapped


def both_directions(
    x: Float[Tensor, "E D"], mirror: Int[Tensor, " E"], up_ca: Dense, up_ac: Dense
) -> Float[Tensor, "E C"]:
    """Raise a result to the edge size; the other direction of each edge hears it too."""
    swapped: Tensor = up_ac(x.index_select(0, mirror))  # swapped before it grows wide
    return skip(up_ca(x), swapped)


class TripletSum(nn.Module):
    """Sum over the input edges b->a that meet an output edge c->a, or all of an atom's.

    Parameters
    ----------
    n_input : channels of the features, per input edge or per atom
    n_in, n_out : channels inside, before and after the bilinear layer
    n_rbf, n_cbf : sizes of the embedded bases
    """

    def __init__(self, n_input: int, n_in: int, n_out: int, n_rbf: int, n_cbf: int) -> None:
        super().__init__()
        self.dense_ba = Dense(n_input, n_input)
        self.mlp_rbf = Linear(n_rbf, n_input)
        self.scale_rbf = ScaleFactor()
        self.down_projection = Dense(n_input, n_in)
        self.mlp_cbf = Bilinear(n_cbf, n_in, n_out)
        self.scale_cbf_sum = ScaleFactor()

    def sum_inputs(
        self, features: Float[Tensor, "M C"], basis: TripletBasis, sender: Int[Tensor, " E_in"] | None
    ) -> Float[Tensor, "M2 D"]:
        """Return a row per output edge or atom; `sender` spreads features of atoms over the input edges."""
        x = self.dense_ba(features)
        if sender is not None:
            x = x.index_select(0, sender)
        x = self.scale_rbf(x * self.mlp_rbf(basis.radial), x)
        x = self.down_projection(x)  # (E_in, C)
        sums = basis.angular @ basis.inputs.spread(x)  # (N, Wo A, C)
        if basis.outputs is not None:
            n_angular = basis.embedding.shape[2]
            sums = basis.outputs.gather(sums.unflatten(1, (-1, n_angular)))  # (E_out, A, C)
        products = basis.embedding @ sums  # (M2, I, C)
        scaled: Tensor = self.scale_cbf_sum(self.mlp_cbf(products), x)
        return scaled


class TripletInteraction(TripletSum):
    """Messages to edges, from edges or from atoms at the senders of the input edges."""

    def __init__(self, n_input: int, n_edge: int, n_in: int, n_out: int, n_rbf: int, n_cbf: int) -> None:
        super().__init__(n_input, n_in, n_out, n_rbf, n_cbf)
        self.up_projection_ca = Dense(n_out, n_edge)
        self.up_projection_ac = Dense(n_out, n_edge)

    def forward(
        self,
        features: Float[Tensor, "M C"],
        basis: TripletBasis,
        mirror: Int[Tensor, " E"],
        sender: Int[Tensor, " E_in"] | None = None,
    ) -> Float[Tensor, "E D"]:
        """Return messages to the output edges."""
        x = self.sum_inputs(features, basis, sender)
        return both_directions(x, mirror, self.up_projection_ca, self.up_projection_ac)


class EdgeAtomInteraction(TripletSum):
    """Messages from edges to the atoms they end at, over angles to the atoms' own neighbors."""

    def __init__(self, n_edge: int, n_atom: int, n_in: int, n_out: int, n_rbf: int, n_cbf: int) -> None:
        super().__init__(n_edge, n_in, n_out, n_rbf, n_cbf)
        self.up_projection_ca = Dense(n_out, n_atom)

    def forward(self, m: Float[Tensor, "E C"], basis: TripletBasis) -> Float[Tensor, "N D"]:
        """Return messages to the atoms."""
        message: Tensor = self.up_projection_ca(self.sum_inputs(m, basis, None))
        return message


class PairBasis(NamedTuple):
    """Atoms around each atom: what is left of distances when images of one pair are added up."""

    sender: Int[Tensor, " NW"]  # padded with any atom
    radial: Float[Tensor, "N I W"]  # zero where padded


class PairInteraction(nn.Module):
    """Messages between atoms over distances alone."""

    def __init__(self, n_atom: int, n_in: int, n_out: int, n_rbf: int) -> None:
        super().__init__()
        self.bilinear = Linear(n_rbf * n_in, n_out)
        self.scale_rbf_sum = ScaleFactor()
        self.down_projection = Dense(n_atom, n_in)
        self.up_projection = Dense(n_out, n_atom)

    def forward(self, h: Float[Tensor, "N C"], basis: PairBasis) -> Float[Tensor, "N C"]:
        """Return messages to the atoms."""
        x = self.down_projection(h)  # (N, D)
        n_atoms, _, width = basis.radial.shape
        neighbors = x.index_select(0, basis.sender).view(n_atoms, width, -1)  # (N, W, D)
        products = basis.radial @ neighbors  # (N, I, D)
        x = self.scale_rbf_sum(self.bilinear(products.flatten(1)), x)
        message: Tensor = self.up_projection(x)
        return message
