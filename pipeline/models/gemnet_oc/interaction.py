"""Interaction and output blocks of GemNet-OC."""

import math
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn

from molkd.pipeline.models.blocks import sum_at
from molkd.pipeline.models.gemnet_oc.config import GemNetOCConfig
from molkd.pipeline.models.gemnet_oc.graphs import Graph
from molkd.pipeline.models.gemnet_oc.layers import (
    Dense,
    EdgeEmbedding,
    Linear,
    plus,
    residual_layers,
    skip,
)
from molkd.pipeline.models.gemnet_oc.quadruplets import QuadBasis, QuadrupletInteraction
from molkd.pipeline.models.gemnet_oc.triplets import (
    EdgeAtomInteraction,
    PairBasis,
    PairInteraction,
    TripletBasis,
    TripletInteraction,
)
from molkd.pipeline.models.ocp_blocks import ScaleFactor


class Bases(NamedTuple):
    """Graphs and embedded bases of a batch; None where an interaction is off or has nothing to act on."""

    main: Graph
    mirror: Int[Tensor, " E"]
    atom_edge_sender: Int[Tensor, " E_ae"] | None
    edge_to_edge: TripletBasis
    atom_to_edge: TripletBasis | None
    edge_to_atom: TripletBasis | None
    quad: QuadBasis | None
    atom_to_atom: PairBasis | None
    atom_update: Float[Tensor, "E R"]
    output: Float[Tensor, "E R"]


class AtomUpdate(nn.Module):
    """Sums edge features at their receivers, weighted by a radial basis."""

    def __init__(self, n_atom: int, n_edge: int, n_rbf: int, n_layers: int) -> None:
        super().__init__()
        self.dense_rbf = Linear(n_rbf, n_edge)
        self.scale_sum = ScaleFactor()
        widening = [Dense(n_edge, n_atom)] if n_edge != n_atom else []
        self.layers = nn.ModuleList([*widening, *residual_layers(n_layers, n_atom)])

    def forward(
        self, m: Float[Tensor, "E C"], rbf: Float[Tensor, "E R"], receiver: Int[Tensor, " E"], n_atoms: int
    ) -> Float[Tensor, "N A"]:
        """Return what the atoms hear."""
        x: Tensor = self.scale_sum(sum_at(receiver, m * self.dense_rbf(rbf), n_atoms), m)
        for layer in self.layers:
            x = layer(x)
        return x


class OutputBlock(AtomUpdate):
    """What one depth of the network has to say about energies of atoms and forces along edges."""

    def __init__(self, config: GemNetOCConfig) -> None:
        n_atom, n_edge, n_rbf = config.emb_size_atom, config.emb_size_edge, config.emb_size_rbf
        super().__init__(n_atom, n_edge, n_rbf, config.num_atom)
        self.seq_energy_pre = self.layers  # OCP's state_dict has both names
        self.seq_energy2: nn.ModuleList | None = None
        if config.num_output_afteratom:
            self.seq_energy2 = nn.ModuleList(residual_layers(config.num_output_afteratom, n_atom))
        if config.direct_forces:
            self.scale_rbf_F = ScaleFactor()
            self.seq_forces = nn.Sequential(*residual_layers(config.num_atom, n_edge))
            self.dense_rbf_F = Linear(n_rbf, n_edge)

    def energy_features(
        self, h: Float[Tensor, "N A"], m: Float[Tensor, "E C"], bases: Bases
    ) -> Float[Tensor, "N A"]:
        """Return x_E."""
        x: Tensor = self(m, bases.output, bases.main.receiver, len(h))
        if self.seq_energy2 is not None:
            x = skip(h, x)
            for layer in self.seq_energy2:
                x = layer(x)
        return x

    def force_features(self, m: Float[Tensor, "E C"], bases: Bases) -> Float[Tensor, "E C"]:
        """Return x_F."""
        x = self.seq_forces(m)
        scaled: Tensor = self.scale_rbf_F(x * self.dense_rbf_F(bases.output), x)
        return scaled


class InteractionBlock(nn.Module):
    """Updates atoms h and edges m by all interactions (GemNet-OC, Fig. 2)."""

    def __init__(self, config: GemNetOCConfig) -> None:
        super().__init__()
        atom, edge = config.emb_size_atom, config.emb_size_edge
        rbf, cbf = config.emb_size_rbf, config.emb_size_cbf
        triplet_sizes = (config.emb_size_trip_in, config.emb_size_trip_out, rbf, cbf)
        self.dense_ca = Dense(edge, edge)
        self.trip_interaction = TripletInteraction(edge, edge, *triplet_sizes)
        if config.quad_interaction:
            self.quad_interaction = QuadrupletInteraction(
                edge, config.emb_size_quad_in, config.emb_size_quad_out, rbf, cbf, config.emb_size_sbf
            )
        if config.atom_edge_interaction:
            self.atom_edge_interaction = TripletInteraction(atom, edge, *triplet_sizes)
        if config.edge_atom_interaction:
            self.edge_atom_interaction = EdgeAtomInteraction(edge, atom, *triplet_sizes)
        if config.atom_interaction:
            self.atom_interaction = PairInteraction(
                atom, config.emb_size_aint_in, config.emb_size_aint_out, rbf
            )
        n_edge_terms = 2 + config.quad_interaction + config.atom_edge_interaction
        n_atom_terms = 1 + config.edge_atom_interaction + config.atom_interaction
        self.inv_sqrt_edge_terms = 1 / math.sqrt(n_edge_terms)
        self.inv_sqrt_atom_terms = 1 / math.sqrt(n_atom_terms)
        self.layers_before_skip = nn.Sequential(*residual_layers(config.num_before_skip, edge))
        self.layers_after_skip = nn.Sequential(*residual_layers(config.num_after_skip, edge))
        self.atom_emb_layers = nn.Sequential(*residual_layers(config.num_atom_emb_layers, atom))
        self.atom_update = AtomUpdate(atom, edge, rbf, config.num_atom)
        self.concat_layer = EdgeEmbedding(atom, edge, edge)
        self.residual_m = nn.Sequential(*residual_layers(config.num_concat, edge))

    def forward(
        self, h: Float[Tensor, "N A"], m: Float[Tensor, "E C"], bases: Bases
    ) -> tuple[Float[Tensor, "N A"], Float[Tensor, "E C"]]:
        """Return the new h and m."""
        main = bases.main
        x = self.dense_ca(m)
        x = plus(x, self.trip_interaction(m, bases.edge_to_edge, bases.mirror))
        if bases.quad is not None:
            x = plus(x, self.quad_interaction(m, bases.quad, bases.mirror))
        if bases.atom_to_edge is not None:
            x = plus(
                x, self.atom_edge_interaction(h, bases.atom_to_edge, bases.mirror, bases.atom_edge_sender)
            )
        x = x * self.inv_sqrt_edge_terms
        h_new = h
        if bases.edge_to_atom is not None:
            h_new = h_new + self.edge_atom_interaction(m, bases.edge_to_atom)
        if bases.atom_to_atom is not None:
            h_new = h_new + self.atom_interaction(h, bases.atom_to_atom)
        h = h_new * self.inv_sqrt_atom_terms

        x = self.layers_before_skip(x)
        m = self.layers_after_skip(skip(m, x))
        h = self.atom_emb_layers(h)
        h = skip(h, self.atom_update(m, bases.atom_update, main.receiver, len(h)))
        m2 = self.residual_m(self.concat_layer(h, m, main.sender, main.receiver))
        return h, skip(m, m2)
