"""SchNet: continuous-filter convolutions over interatomic distances (Schuett et al. 2018).

Weights of OCP/fairchem v1 and of PyTorch Geometric fit by name, shape and number.
"""

import math
from collections.abc import Collection
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import softplus

from molkd.cache_schema.fields import FieldSpec, atomic_energies_spec, energy_spec, forces_spec, node_spec
from molkd.pipeline.config import Settings
from molkd.pipeline.graphs.batch import Batch, edge_vectors
from molkd.pipeline.graphs.neighbors import NeighborRule
from molkd.pipeline.models.blocks import (
    GaussianSmearing,
    full_precision,
    linear,
    sum_at,
    with_gradient_forces,
)
from molkd.pipeline.models.interface import Outputs

MAX_ATOMIC_NUMBER = 99  # the embedding has a row 0 for padding
LN_2 = float(torch.tensor(math.log(2.0), dtype=torch.float32))  # the peer's value, rounded to float32


class SchNetConfig(Settings):
    """Hyper-parameters under OCP's names; the defaults are OCP's."""

    name: Literal["schnet"] = "schnet"
    hidden_channels: int = Field(128, ge=2, multiple_of=2)
    num_filters: int = Field(128, ge=1)
    num_interactions: int = Field(6, ge=1)
    num_gaussians: int = Field(50, ge=2)
    cutoff: float = Field(10.0, gt=0)  # A
    max_neighbors: int | None = Field(None, ge=1)  # None: OCP's fixed 50 with use_pbc, PyG's 32 without
    regress_forces: bool = True
    use_pbc: bool = True


class ShiftedSoftplus(nn.Module):
    """Softplus through the origin."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply elementwise."""
        return softplus(x) - LN_2


class CFConv(nn.Module):
    """Continuous-filter convolution: every edge multiplies its sender by a filter of its length."""

    def __init__(self, n_channels: int, n_filters: int, filter_mlp: nn.Sequential) -> None:
        super().__init__()
        self.lin1 = linear(n_channels, n_filters, bias=False)
        self.lin2 = linear(n_filters, n_channels)
        self.nn = filter_mlp  # also registered by InteractionBlock: checkpoints hold both names

    def forward(
        self,
        h: Float[Tensor, "N C"],
        edge_index: Int[Tensor, "2 E"],
        edge_rbf: Float[Tensor, "E K"],
        edge_weight: Float[Tensor, "E 1"],
    ) -> Float[Tensor, "N C"]:
        """Return the sum of filtered neighbors."""
        sender, receiver = edge_index
        filters = self.nn(edge_rbf) * edge_weight  # (E, F)
        messages = self.lin1(h).index_select(0, sender) * filters
        out: Tensor = self.lin2(sum_at(receiver, messages, len(h)))
        return out


class InteractionBlock(nn.Module):
    """Convolution, activation and a linear layer (paper's Fig. 2, right)."""

    def __init__(self, n_channels: int, n_gaussians: int, n_filters: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            linear(n_gaussians, n_filters), ShiftedSoftplus(), linear(n_filters, n_filters)
        )
        self.conv = CFConv(n_channels, n_filters, self.mlp)
        self.act = ShiftedSoftplus()
        self.lin = linear(n_channels, n_channels)

    def forward(
        self,
        h: Float[Tensor, "N C"],
        edge_index: Int[Tensor, "2 E"],
        edge_rbf: Float[Tensor, "E K"],
        edge_weight: Float[Tensor, "E 1"],
    ) -> Float[Tensor, "N C"]:
        """Return what is to be added to the features."""
        out: Tensor = self.lin(self.act(self.conv(h, edge_index, edge_rbf, edge_weight)))
        return out


class SchNet(nn.Module):
    """Scalars h (N, C) per atom, refined by interaction blocks; forces are minus the energy's gradient.

    Parameters
    ----------
    config : SchNetConfig
    """

    config_class = SchNetConfig
    max_atomic_number = MAX_ATOMIC_NUMBER
    forces_from: Literal["direct", "gradient"] = "gradient"

    def __init__(self, config: SchNetConfig) -> None:
        super().__init__()
        self.config = config
        C = config.hidden_channels
        n_nearest = config.max_neighbors or (50 if config.use_pbc else 32)
        self.neighbor_rule = NeighborRule(config.cutoff, n_nearest, use_pbc=config.use_pbc)
        self.edge_rule = self.neighbor_rule
        self.embedding = nn.Embedding(MAX_ATOMIC_NUMBER + 1, C, padding_idx=0)
        self.distance_expansion = GaussianSmearing(config.cutoff, config.num_gaussians)
        self.interactions = nn.ModuleList(
            InteractionBlock(C, config.num_gaussians, config.num_filters)
            for _ in range(config.num_interactions)
        )
        self.lin1 = linear(C, C // 2)
        self.act = ShiftedSoftplus()
        self.lin2 = linear(C // 2, 1)

    @property
    def signals(self) -> dict[str, FieldSpec]:
        """Everything `forward` can give; I numbers the interaction blocks from 1."""
        C = self.config.hidden_channels
        specs = [energy_spec(), atomic_energies_spec(), node_spec(C)]
        specs += [forces_spec()] if self.config.regress_forces else []
        specs += [node_spec(C, f"layer/I{i + 1}") for i in range(self.config.num_interactions)]
        return {spec.name: spec for spec in specs}

    def forward(self, batch: Batch, taps: Collection[str] = (), *, forces: bool = True) -> Outputs:
        """Return the outputs of `molkd.pipeline.models.interface`."""
        if not (forces and self.config.regress_forces):
            return self._predict(batch, taps)
        return with_gradient_forces(self._predict, batch, taps, self.parameters())

    def _predict(self, batch: Batch, taps: Collection[str]) -> Outputs:
        distance = torch.linalg.vector_norm(edge_vectors(batch, batch.positions), dim=1)  # (E,)
        edge_rbf = self.distance_expansion(distance)  # (E, K)
        cosine = 0.5 * (torch.cos(distance * (math.pi / self.config.cutoff)) + 1)  # 0 at the cutoff
        edge_weight = cosine.unsqueeze(1)  # (E, 1)

        h = self.embedding(batch.atomic_numbers)  # (N, C)
        outputs: Outputs = {}
        for i, interaction in enumerate(self.interactions):
            h = h + interaction(h, batch.edge_index, edge_rbf, edge_weight)
            if f"layer/I{i + 1}" in taps:
                outputs[f"layer/I{i + 1}"] = h

        with full_precision(h):
            atomic_energies = self.lin2(self.act(self.lin1(h))).squeeze(1)  # (N,)
        outputs["energy"] = sum_at(batch.system_idx, atomic_energies, batch.n_systems)  # (S,)
        outputs["atomic_energies"] = atomic_energies
        outputs["node"] = h
        return outputs
