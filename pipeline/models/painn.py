"""PaiNN: polarizable atom interaction network (Schuett, Unke, Gastegger 2021), in the form that OCP trains.

Weights of OCP/fairchem v1 fit by name, shape and number. Against the paper, OCP normalises the scalars
before each message, divides by sqrt 2 after it, applies fitted scale factors, and can give direct forces.
"""

import math
from collections.abc import Collection
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from molkd.cache_schema.fields import (
    FieldSpec,
    atomic_energies_spec,
    edge_spec,
    energy_spec,
    forces_spec,
    node_spec,
    v2v_spec,
)
from molkd.pipeline.config import Settings
from molkd.pipeline.graphs.batch import Batch, edge_vectors
from molkd.pipeline.graphs.neighbors import NeighborRule
from molkd.pipeline.models.blocks import full_precision, linear, sum_at, with_gradient_forces
from molkd.pipeline.models.interface import Outputs
from molkd.pipeline.models.ocp_blocks import (
    MAX_ATOMIC_NUMBER,
    AtomEmbedding,
    GaussianBasis,
    ScaledSiLU,
    ScaleFactor,
)


class PaiNNConfig(Settings):
    """Hyper-parameters under OCP's names; the defaults are OCP's."""

    name: Literal["painn"] = "painn"
    hidden_channels: int = Field(512, ge=2, multiple_of=2)
    num_layers: int = Field(6, ge=1)
    num_rbf: int = Field(128, ge=2)
    cutoff: float = Field(12.0, gt=0)  # A
    max_neighbors: int = Field(50, ge=1)
    regress_forces: bool = True
    direct_forces: bool = True  # False: minus the gradient of the energy
    use_pbc: bool = True


class MessageBlock(nn.Module):
    """Gathers scalars and vectors from the neighbors (paper's Fig. 2b, Eqs. 7 and 8)."""

    def __init__(self, n_channels: int, n_rbf: int) -> None:
        super().__init__()
        self.x_proj = mlp(n_channels, n_channels, 3 * n_channels)
        # The bias means that a neighbor at the cutoff does not fade out; trained weights rely on it.
        self.rbf_proj = linear(n_rbf, 3 * n_channels)
        self.x_layernorm = nn.LayerNorm(n_channels)

    def forward(
        self,
        x: Float[Tensor, "N C"],
        vec: Float[Tensor, "N 3 C"] | None,
        edge_index: Int[Tensor, "2 E"],
        edge_rbf: Float[Tensor, "E K"],
        edge_unit: Float[Tensor, "E 3"],
    ) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N 3 C"]]:
        """Return what is to be added to scalars and vectors; `vec` is None while all vectors are zero."""
        n_atoms, n_channels = x.shape
        sender, receiver = edge_index
        features = self.x_proj(self.x_layernorm(x))  # (N, 3C)
        messages = features.index_select(0, sender) * self.rbf_proj(edge_rbf)  # (E, 3C)
        scalar, along_neighbor, along_edge = messages.split(n_channels, dim=1)  # (E, C) each
        vectors = along_edge.unsqueeze(1) * edge_unit.unsqueeze(2)  # (E, 3, C)
        if vec is not None:
            neighbor = (vec * (1 / math.sqrt(3))).index_select(0, sender)  # (E, 3, C)
            vectors = torch.addcmul(vectors, neighbor, along_neighbor.unsqueeze(1))
        dx = sum_at(receiver, scalar, n_atoms)
        dvec = sum_at(receiver, vectors, n_atoms) * (1 / math.sqrt(n_channels))
        return dx, dvec


class UpdateBlock(nn.Module):
    """Mixes scalars and vectors within an atom (paper's Fig. 2c, Eqs. 9 and 10)."""

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.vec_proj = linear(n_channels, 2 * n_channels, bias=False)
        self.xvec_proj = mlp(2 * n_channels, n_channels, 3 * n_channels)

    def forward(
        self, x: Float[Tensor, "N C"], vec: Float[Tensor, "N 3 C"]
    ) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N 3 C"]]:
        """Return what is to be added to scalars and vectors."""
        n_channels = x.shape[1]
        v1, v2 = self.vec_proj(vec).split(n_channels, dim=2)  # (N, 3, C) each
        product = (v1 * v2).sum(dim=1) * (1 / math.sqrt(n_channels))  # (N, C)
        norm = torch.sqrt(v2.square().sum(dim=1) + 1e-8)  # (N, C), smooth at zero
        p, q, t = self.xvec_proj(torch.cat([x, norm], dim=1)).split(n_channels, dim=1)
        dx = (p + q * product) * (1 / math.sqrt(2))
        dvec = t.unsqueeze(1) * v1
        return dx, dvec


class GatedEquivariantBlock(nn.Module):
    """Maps scalars and vectors to fewer channels (paper's Fig. 3, after Weiler et al. 2018)."""

    def __init__(self, n_channels: int, n_out: int) -> None:
        super().__init__()
        self.n_out = n_out
        self.vec1_proj = linear(n_channels, n_channels, bias=False)
        self.vec2_proj = linear(n_channels, n_out, bias=False)
        self.update_net = mlp(2 * n_channels, n_channels, 2 * n_out)
        self.activation = ScaledSiLU()

    def forward(
        self, x: Float[Tensor, "N C"], vec: Float[Tensor, "N 3 C"]
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N 3 D"]]:
        """Return scalars and vectors with `n_out` channels."""
        # The plain norm; written out because vector_norm over the middle axis is 50 times slower on a CPU.
        # The bound keeps the gradient of an atom without neighbors zero.
        squares = self.vec1_proj(vec).square().sum(dim=1)  # (N, C)
        norm = torch.sqrt(squares.clamp_min(torch.finfo(squares.dtype).tiny))
        x, gate = self.update_net(torch.cat([x, norm], dim=1)).split(self.n_out, dim=1)
        return self.activation(x), gate.unsqueeze(1) * self.vec2_proj(vec)


class ForceHead(nn.Module):
    """Direct forces: two gated blocks down to one vector channel."""

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.output_network = nn.ModuleList(
            [
                GatedEquivariantBlock(n_channels, n_channels // 2),
                GatedEquivariantBlock(n_channels // 2, 1),
            ]
        )

    def forward(self, x: Float[Tensor, "N C"], vec: Float[Tensor, "N 3 C"]) -> Float[Tensor, "N 3"]:
        """Return one vector per atom."""
        for block in self.output_network:
            x, vec = block(x, vec)
        return vec.squeeze(2)


class PaiNN(nn.Module):
    """Scalars x (N, C) and vectors vec (N, 3, C) per atom, refined by message and update blocks.

    Parameters
    ----------
    config : PaiNNConfig
    """

    config_class = PaiNNConfig
    max_atomic_number = MAX_ATOMIC_NUMBER

    def __init__(self, config: PaiNNConfig) -> None:
        super().__init__()
        self.config = config
        C, K = config.hidden_channels, config.num_rbf
        self.forces_from: Literal["direct", "gradient"] = "direct" if config.direct_forces else "gradient"
        self.neighbor_rule = NeighborRule(
            config.cutoff, config.max_neighbors, symmetrize=True, use_pbc=config.use_pbc
        )
        self.edge_rule = self.neighbor_rule
        self.atom_emb = AtomEmbedding(C)
        self.radial_basis = GaussianBasis(K, config.cutoff)
        self.message_layers = nn.ModuleList(MessageBlock(C, K) for _ in range(config.num_layers))
        self.update_layers = nn.ModuleList(UpdateBlock(C) for _ in range(config.num_layers))
        for i in range(config.num_layers):
            self.add_module(f"upd_out_scalar_scale_{i}", ScaleFactor())  # OCP's names, so not a ModuleList
        self.out_energy = mlp(C, C // 2, 1)
        if config.regress_forces and config.direct_forces:
            self.out_forces = ForceHead(C)

    @property
    def signals(self) -> dict[str, FieldSpec]:
        """Everything `forward` can give; M and U number the message and update blocks from 1.

        M1 and U1 are scalars, MV1 and UV1 the vectors beside them.
        """
        C = self.config.hidden_channels
        layers = [(block, i + 1) for i in range(self.config.num_layers) for block in "MU"]
        specs = [energy_spec(), atomic_energies_spec(), node_spec(C), v2v_spec(C)]
        specs += [forces_spec()] if self.config.regress_forces else []
        specs += [node_spec(C, f"layer/{block}{i}") for block, i in layers]
        specs += [v2v_spec(C, f"layer/{block}V{i}") for block, i in layers]
        specs.append(edge_spec(C, self.edge_rule.max_edges_per_atom))
        return {spec.name: spec for spec in specs}

    def forward(self, batch: Batch, taps: Collection[str] = (), *, forces: bool = True) -> Outputs:
        """Return the outputs of `molkd.pipeline.models.interface`.

        With ``direct_forces: False`` forces are the true negative gradient of the energy. The peer
        differentiates the sum of its last features there; that is a mistake and not copied.
        """
        forces = forces and self.config.regress_forces
        if forces and not self.config.direct_forces:
            return with_gradient_forces(self._predict, batch, taps, self.parameters())
        return self._predict(batch, taps, direct_forces=forces)

    def _predict(self, batch: Batch, taps: Collection[str], *, direct_forces: bool = False) -> Outputs:
        vectors = edge_vectors(batch, batch.positions)  # (E, 3), from receiver to sender
        distance = torch.linalg.vector_norm(vectors, dim=1)  # (E,)
        edge_unit = vectors / distance.unsqueeze(1)
        edge_rbf = self.radial_basis(distance)  # (E, K)

        x = self.atom_emb(batch.atomic_numbers)  # (N, C)
        vec: Tensor | None = None  # (N, 3, C), zero so far
        outputs: Outputs = {}
        for i, (message, update) in enumerate(zip(self.message_layers, self.update_layers, strict=True)):
            dx, dvec = message(x, vec, batch.edge_index, edge_rbf, edge_unit)
            x = (x + dx) * (1 / math.sqrt(2))
            vec = dvec if vec is None else vec + dvec
            outputs |= _asked({f"layer/M{i + 1}": x, f"layer/MV{i + 1}": vec}, taps)
            dx, dvec = update(x, vec)
            x = self.get_submodule(f"upd_out_scalar_scale_{i}")(x + dx)
            vec = vec + dvec
            outputs |= _asked({f"layer/U{i + 1}": x, f"layer/UV{i + 1}": vec}, taps)

        with full_precision(x):
            atomic_energies = self.out_energy(x).squeeze(1)  # (N,)
            if direct_forces:
                outputs["forces"] = self.out_forces(x, vec)
        outputs["energy"] = sum_at(batch.system_idx, atomic_energies, batch.n_systems)  # (S,)
        outputs["atomic_energies"] = atomic_energies
        outputs["node"] = x
        assert vec is not None  # there is at least one layer
        outputs["v2v"] = vec
        if "edge" in taps:
            sender, receiver = batch.edge_index
            # PaiNN keeps no features on edges; this product of the end atoms' vectors stands in for them.
            outputs["edge"] = (vec.index_select(0, sender) * vec.index_select(0, receiver)).sum(1)  # (E, C)
            outputs |= {"edge_index": batch.edge_index, "edge_shift": batch.edge_shift}
        return outputs


def _asked(features: dict[str, Tensor], taps: Collection[str]) -> dict[str, Tensor]:
    return {name: values for name, values in features.items() if name in taps}


def mlp(n_in: int, n_hidden: int, n_out: int) -> nn.Sequential:
    """Two linear layers around one activation."""
    return nn.Sequential(linear(n_in, n_hidden), ScaledSiLU(), linear(n_hidden, n_out))
