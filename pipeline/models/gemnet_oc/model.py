"""GemNet-OC: atom features h and edge features m, refined by blocks of interactions between them."""

from collections.abc import Collection
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from molkd.cache_schema.fields import (
    FieldSpec,
    atomic_energies_spec,
    e2n_spec,
    edge_spec,
    energy_spec,
    forces_spec,
    node_spec,
    v2v_spec,
)
from molkd.pipeline.graphs.batch import Batch
from molkd.pipeline.models.blocks import full_precision, sum_at, with_gradient_forces
from molkd.pipeline.models.gemnet_oc.bases import AngularBasis, BasisEmbedding, RadialEmbedding
from molkd.pipeline.models.gemnet_oc.config import GemNetOCConfig, Limits
from molkd.pipeline.models.gemnet_oc.graphs import Graph, Graphs, Table, build_graphs, table_of, take
from molkd.pipeline.models.gemnet_oc.interaction import Bases, InteractionBlock, OutputBlock
from molkd.pipeline.models.gemnet_oc.layers import Dense, EdgeEmbedding, Linear, residual_layers
from molkd.pipeline.models.gemnet_oc.quadruplets import QuadBasis, quad_geometry
from molkd.pipeline.models.gemnet_oc.triplets import PairBasis, TripletBasis, meeting_edges
from molkd.pipeline.models.interface import Outputs
from molkd.pipeline.models.ocp_blocks import MAX_ATOMIC_NUMBER, AtomEmbedding, GaussianBasis

_EDGES_AT_ONCE = 65_536  # whose Gaussians are in memory together


class GemNetOC(nn.Module):
    """Energies and direct forces from two-, three- and four-body messages.

    Parameters
    ----------
    config : GemNetOCConfig
    """

    config_class = GemNetOCConfig
    max_atomic_number = MAX_ATOMIC_NUMBER

    def __init__(self, config: GemNetOCConfig) -> None:
        super().__init__()
        self.config = config
        self.forces_from: Literal["direct", "gradient"] = "direct" if config.direct_forces else "gradient"
        self.neighbor_rule = config.neighbor_rule
        self.edge_rule = config.edge_rule
        atom, edge = config.emb_size_atom, config.emb_size_edge
        self._add_bases(config)
        self.atom_emb = AtomEmbedding(atom)
        self.edge_emb = EdgeEmbedding(atom, config.num_radial, edge)
        self.int_blocks = nn.ModuleList(InteractionBlock(config) for _ in range(config.num_blocks))
        self.out_blocks = nn.ModuleList(OutputBlock(config) for _ in range(config.num_blocks + 1))
        n_out, n_layers = config.num_blocks + 1, config.num_global_out_layers
        self.out_mlp_E = nn.Sequential(Dense(n_out * atom, atom), *residual_layers(n_layers, atom))
        self.out_energy = Linear(atom, 1)
        heads = [self.out_energy]
        if config.direct_forces:
            self.out_mlp_F = nn.Sequential(Dense(n_out * edge, edge), *residual_layers(n_layers, edge))
            self.out_forces = Linear(edge, 1)
            heads.append(self.out_forces)
        if config.output_init == "zeros":
            for head in heads:
                nn.init.zeros_(head.linear.weight)

    def _add_bases(self, config: GemNetOCConfig) -> None:
        """Radial bases, and the maps that embed them once for all blocks, under OCP's names."""

        def radial(limits: Limits) -> GaussianBasis:
            exponent = config.envelope.exponent
            return GaussianBasis(config.num_radial, limits.cutoff, exponent=exponent, exact_width=True)

        n_radial, n_angular = config.num_radial, config.num_spherical
        rbf, cbf = config.emb_size_rbf, config.emb_size_cbf
        self.radial_basis = radial(config.main_limits)
        self.mlp_rbf_tint = Linear(n_radial, rbf)
        self.mlp_rbf_h = Linear(n_radial, rbf)
        self.mlp_rbf_out = Linear(n_radial, rbf)
        within_main = radial(config.main_limits)  # OCP's models share this one
        self.cbf_basis_tint = AngularBasis(within_main)
        self.mlp_cbf_tint = BasisEmbedding(n_radial, cbf, n_angular)
        if config.quad_interaction:
            self.cbf_basis_qint = AngularBasis(radial(config.quad_limits))
            self.sbf_basis_qint = AngularBasis(within_main)
            self.mlp_rbf_qint = Linear(n_radial, rbf)
            self.mlp_cbf_qint = BasisEmbedding(n_radial, cbf, n_angular)
            self.mlp_sbf_qint = BasisEmbedding(n_radial, config.emb_size_sbf, n_angular**2)
        if config.atom_edge_interaction or config.edge_atom_interaction:
            self.radial_basis_aeaint = radial(config.atom_edge_limits)
        if config.atom_edge_interaction:
            self.cbf_basis_aeint = AngularBasis(within_main)
            self.mlp_rbf_aeint = Linear(n_radial, rbf)
            self.mlp_cbf_aeint = BasisEmbedding(n_radial, cbf, n_angular)
        if config.edge_atom_interaction:
            self.cbf_basis_eaint = AngularBasis(radial(config.atom_edge_limits))
            self.mlp_rbf_eaint = Linear(n_radial, rbf)
            self.mlp_cbf_eaint = BasisEmbedding(n_radial, cbf, n_angular)
        if config.atom_interaction:
            self.radial_basis_aint = radial(config.widest_limits)
            self.mlp_rbf_aint = RadialEmbedding(n_radial, rbf)

    @property
    def signals(self) -> dict[str, FieldSpec]:
        """Everything `forward` can give; H and X number hidden features and output blocks from 0."""
        atom, edge = self.config.emb_size_atom, self.config.emb_size_edge
        specs = [energy_spec(), atomic_energies_spec(), node_spec(atom)]
        specs += [forces_spec()] if self.config.regress_forces else []
        if self.config.direct_forces:
            specs += [e2n_spec(edge), v2v_spec(edge), edge_spec(edge, self.edge_rule.max_edges_per_atom)]
        for kind in "HX":
            specs += [node_spec(atom, f"layer/{kind}{i}") for i in range(self.config.num_blocks + 1)]
        return {spec.name: spec for spec in specs}

    def forward(self, batch: Batch, taps: Collection[str] = (), *, forces: bool = True) -> Outputs:
        """Return the outputs of `molkd.pipeline.models.interface`.

        Vectors (v2v, direct forces) are summed along unit vectors from sender to receiver.
        """
        forces = forces and self.config.regress_forces
        if forces and not self.config.direct_forces:
            return with_gradient_forces(self._predict, batch, taps, self.parameters())
        return self._predict(batch, taps, direct_forces=forces)

    def _predict(self, batch: Batch, taps: Collection[str], *, direct_forces: bool = False) -> Outputs:
        graphs = build_graphs(batch, self.config)
        main = graphs.main
        rbf = self.radial_basis(main.distance)  # (E, K)
        bases = self._embed(graphs, rbf, batch.n_atoms)
        h = self.atom_emb(batch.atomic_numbers)  # (N, A)
        m = self.edge_emb(h, rbf, main.sender, main.receiver)  # (E, C)
        asks_edges = self.config.direct_forces and not {"e2n", "v2v", "edge"}.isdisjoint(taps)
        wants_edges = direct_forces or asks_edges
        outputs: Outputs = {}
        energy_features: list[Tensor] = []
        force_features: list[Tensor] = []
        for i, out_block in enumerate(self.out_blocks):
            assert isinstance(out_block, OutputBlock)  # for the type checker
            if i > 0:
                h, m = self.int_blocks[i - 1](h, m, bases)
            energy_features.append(out_block.energy_features(h, m, bases))
            if wants_edges:
                force_features.append(out_block.force_features(m, bases))
            found = {f"layer/H{i}": h, f"layer/X{i}": energy_features[-1]}
            outputs |= {tap: value for tap, value in found.items() if tap in taps}
        x_energy = self.out_mlp_E(torch.cat(energy_features, dim=1))  # (N, A)
        with full_precision(x_energy):
            atomic_energies = self.out_energy(at_least_float32(x_energy)).squeeze(1)  # (N,)
        if wants_edges:
            x_force = self.out_mlp_F(torch.cat(force_features, dim=1))  # (E, C)
            outputs |= self._from_edges(x_force, graphs, batch.n_atoms, taps, direct_forces=direct_forces)
        energy = sum_at(batch.system_idx, atomic_energies, batch.n_systems)  # (S,)
        if not self.config.extensive:
            n_atoms = batch.atoms_ptr.diff().to(energy.dtype)
            energy = energy / n_atoms
            atomic_energies = atomic_energies / n_atoms[batch.system_idx]
        outputs |= {"energy": energy, "atomic_energies": atomic_energies, "node": x_energy}
        return {k: at_least_float32(v) if v.is_floating_point() else v for k, v in outputs.items()}

    def _from_edges(
        self,
        x: Float[Tensor, "E C"],
        graphs: Graphs,
        n_atoms: int,
        taps: Collection[str],
        *,
        direct_forces: bool,
    ) -> Outputs:
        main = graphs.main
        outputs: Outputs = {}
        if direct_forces:
            with full_precision(x):
                along = self.out_forces(at_least_float32(x))  # (E, 1)
            if self.config.forces_coupled:
                along = (along + along.index_select(0, graphs.mirror)) / 2
            outputs["forces"] = sum_at(main.receiver, along * main.vector, n_atoms)
        if "e2n" in taps:
            outputs["e2n"] = sum_at(main.receiver, x, n_atoms)
        if "v2v" in taps:
            outputs["v2v"] = sum_at(main.receiver, x.unsqueeze(1) * main.vector.unsqueeze(2), n_atoms)
        if "edge" in taps:
            outputs["edge"] = x
            outputs["edge_index"] = torch.stack([main.sender, main.receiver])
            outputs["edge_shift"] = main.shift.to(x.dtype)
        return outputs

    def _embed(self, graphs: Graphs, rbf: Float[Tensor, "E K"], n_atoms: int) -> Bases:
        """Compute everything that depends on positions only and is the same for all blocks."""
        config, main = self.config, graphs.main
        n_angular = config.num_spherical
        table = table_of(main, n_atoms)
        tables = (main, table)
        angular = meeting_edges(tables, tables, n_angular).flatten(1, 2)  # (N, W A, W)
        edge_to_edge = TripletBasis(self.mlp_rbf_tint(rbf), angular, table, table, self.mlp_cbf_tint(rbf))
        atom_to_edge = edge_to_atom = quad = atom_to_atom = None
        if graphs.atom_edge is not None:
            near = graphs.atom_edge
            near_table = table_of(near, n_atoms)
            near_rbf = self.radial_basis_aeaint(near.distance)  # (E_n, K)
            angles = meeting_edges(tables, (near, near_table), n_angular)  # (N, W, A, Wn)
            if config.atom_edge_interaction:
                atom_to_edge = TripletBasis(
                    self.mlp_rbf_aeint(near_rbf),
                    angles.flatten(1, 2),
                    near_table,
                    table,
                    self.mlp_cbf_aeint(rbf),
                )
            if config.edge_atom_interaction:
                turned = angles.permute(0, 3, 2, 1).flatten(1, 2)  # (N, Wn A, W)
                embedding = self.mlp_cbf_eaint(near_rbf)  # (E_n, I, A)
                at_atoms = near_table.spread(embedding).transpose(1, 2).flatten(2)  # (N, I, Wn A)
                edge_to_atom = TripletBasis(self.mlp_rbf_eaint(rbf), turned, table, None, at_atoms)
        if graphs.quad is not None and len(graphs.quad.sender):
            geometry = quad_geometry(main, graphs.quad, n_atoms, n_angular)
            maps = self.mlp_cbf_qint(self.cbf_basis_qint.radial_basis(graphs.quad.distance))  # (Q, I, A)
            quad = QuadBasis(
                geometry,
                self.mlp_rbf_qint(rbf.index_select(0, geometry.d_edges)),
                geometry.angle_abd @ maps.transpose(1, 2),
                self.mlp_sbf_qint(rbf.index_select(0, geometry.c_edges)),
            )
        if graphs.atom is not None:
            atom_to_atom = self._embed_pairs(graphs.atom, n_atoms)
        return Bases(
            main=main,
            mirror=graphs.mirror,
            atom_edge_sender=graphs.atom_edge.sender if graphs.atom_edge is not None else None,
            edge_to_edge=edge_to_edge,
            atom_to_edge=atom_to_edge,
            edge_to_atom=edge_to_atom,
            quad=quad,
            atom_to_atom=atom_to_atom,
            atom_update=self.mlp_rbf_h(rbf),
            output=self.mlp_rbf_out(rbf),
        )

    def _embed_pairs(self, graph: Graph, n_atoms: int) -> PairBasis:
        """Add up the radial embeddings of all images of a pair: no more than distances enters there."""
        parts = [
            self.mlp_rbf_aint(self.radial_basis_aint(part)) for part in graph.distance.split(_EDGES_AT_ONCE)
        ]
        same = (graph.sender[1:] == graph.sender[:-1]) & (graph.receiver[1:] == graph.receiver[:-1])
        pair_of = torch.nn.functional.pad((~same).long().cumsum(0), (1, 0))[: len(graph.sender)]  # (E,)
        first = torch.nn.functional.pad(~same, (1, 0), value=True)[: len(graph.sender)].nonzero().squeeze(1)
        pairs = take(graph, first)
        table: Table = table_of(pairs, n_atoms)
        radial = sum_at(pair_of, torch.cat(parts), len(first))  # (P, I)
        return PairBasis(
            table.spread(pairs.sender).flatten(), table.spread(radial).transpose(1, 2).contiguous()
        )


def at_least_float32(x: Tensor) -> Tensor:
    """Widen what mixed precision left narrow."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
