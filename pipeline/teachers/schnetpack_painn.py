"""The published PaiNN of schnetpack for rMD17 ethanol, as plain arrays in an `.npz` file.

It differs from the PaiNN of `molkd.pipeline.models`: Gaussians in the distance with a cosine cutoff, one
filter network for all layers, forces by gradient, kcal/mol inside.
"""

import zipfile
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear, silu

from molkd.cache_schema.fields import FieldSpec
from molkd.pipeline.errors import TeacherError
from molkd.pipeline.graphs.batch import Batch, edge_vectors, to_device
from molkd.pipeline.graphs.neighbors import NeighborRule
from molkd.pipeline.teachers.common import (
    check_signals,
    file_sha256,
    group_name,
    minus_gradient,
    sum_over_atoms,
    usual_signals,
)
from molkd.pipeline.teachers.interface import TeacherInfo
from molkd.pipeline.units import KCAL_PER_MOL

TRAINED_ELEMENTS = frozenset({1, 6, 8})  # the embedding has more rows, but ethanol has only these
EPSILON = 1e-8  # keeps the gradient of |V| finite where V is zero
MEAN = "energy_mean_per_atom_kcal_mol"
_LAYER_ARRAYS = (
    "interactions.{}.interatomic_context_net.0",
    "interactions.{}.interatomic_context_net.1",
    "mixing.{}.intraatomic_context_net.0",
    "mixing.{}.intraatomic_context_net.1",
)
_CITATION = (
    "K. T. Schuett, O. T. Unke, M. Gastegger, Equivariant message passing for the prediction of tensorial "
    "properties and molecular spectra, ICML 2021; K. T. Schuett et al., SchNetPack 2.0, J. Chem. Phys. 158 "
    "(2023) 144801"
)


class SchnetpackPaiNN:
    """Teacher over one weights file; energies are total DFT energies (PBE/def2-SVP) in eV."""

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype) -> None:
        arrays = _read_arrays(path)
        self.path, self.device, self.dtype = path, device, dtype
        self.energy_mean = float(arrays.pop(MEAN))  # kcal/mol an atom
        self.weights = {k: torch.from_numpy(v).to(device=device, dtype=dtype) for k, v in arrays.items()}
        embedding = self.weights["embedding.weight"]  # (Z, C)
        # Rows of elements never trained give NaN, so that no caller takes their output for a result.
        untrained = [z for z in range(len(embedding)) if z not in TRAINED_ELEMENTS]
        embedding[untrained] = torch.nan
        self.n_channels = embedding.shape[1]
        self.n_layers = len(self.weights["filter_net.weight"]) // (3 * self.n_channels)
        self.neighbor_rule = NeighborRule(cutoff=float(arrays["cutoff_fn.cutoff"].item()))
        self.atomic_numbers = TRAINED_ELEMENTS
        self.info = TeacherInfo(
            name=group_name(path.stem),
            architecture="PaiNN (schnetpack)",
            weights_sha256=file_sha256(path),
            config={
                "n_channels": self.n_channels,
                "n_layers": self.n_layers,
                "n_rbf": len(self.weights["radial_basis.offsets"]),
                "cutoff": self.neighbor_rule.cutoff,
            },
            taps={
                "node": "scalar features q after the last mixing block, input of the energy head",
                "v2v": "vector features mu after the last mixing block",
                "atomic_energies": "energy head of each atom plus the mean energy an atom",
            },
            licence="MIT",
            citation=_CITATION,
            energy_reference="total energies of PBE/def2-SVP, nothing subtracted",
            units_inside="kcal/mol, A",
        )

    @property
    def signals(self) -> dict[str, FieldSpec]:
        """Everything the teacher can give, by name."""
        return usual_signals(self.n_channels, self.n_channels)

    def compute(self, batch: Batch, signals: Collection[str]) -> dict[str, Tensor]:
        """Return the asked signals, detached; features and forces in the teacher's dtype."""
        check_signals(signals, self.signals, self.info.name)
        batch = to_device(batch, self.device, self.dtype)
        with torch.set_grad_enabled("forces" in signals):
            positions = batch.positions.detach().clone().requires_grad_("forces" in signals)
            node, v2v = self._features(batch, positions)
            head = self._dense("readout.1", silu(self._dense("readout.0", node))).squeeze(-1)  # (N,) kcal/mol
        # The mean is 1e4 times the signal: it is added in double precision.
        atomic_energies = (head.detach().double() + self.energy_mean) * KCAL_PER_MOL
        out = {"atomic_energies": atomic_energies, "node": node.detach(), "v2v": v2v.detach()}
        out["energy"] = sum_over_atoms(atomic_energies, batch)
        if "forces" in signals:
            out["forces"] = minus_gradient(head, positions) * KCAL_PER_MOL
        return {name: out[name] for name in signals}

    def _features(
        self, batch: Batch, positions: Float[Tensor, "N 3"]
    ) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N 3 C"]]:
        sender, receiver = batch.edge_index
        vectors = edge_vectors(batch, positions)
        distances = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)  # (E, 1)
        directions = (vectors / distances).unsqueeze(2)  # (E, 3, 1)
        widths, offsets = self.weights["radial_basis.widths"], self.weights["radial_basis.offsets"]
        rbf = torch.exp(-0.5 * ((distances - offsets) / widths) ** 2)  # (E, K)
        cutoff = self.neighbor_rule.cutoff
        envelope = 0.5 * (torch.cos(torch.pi * distances / cutoff) + 1) * (distances < cutoff)
        filters = (self._dense("filter_net", rbf) * envelope).chunk(self.n_layers, dim=1)  # each (E, 3C)

        node = self.weights["embedding.weight"][batch.atomic_numbers]  # (N, C)
        v2v = node.new_zeros(len(node), 3, self.n_channels)  # (N, 3, C)
        for layer in range(self.n_layers):
            message = self._context(f"interactions.{layer}.interatomic_context_net", node)[sender]
            scalar, radial, vector = (filters[layer] * message).chunk(3, dim=1)  # (E, C)
            vector_message = radial.unsqueeze(1) * directions + vector.unsqueeze(1) * v2v[sender]
            node = node.index_add(0, receiver, scalar)
            v2v = v2v.index_add(0, receiver, vector_message)

            mixed = linear(v2v, self.weights[f"mixing.{layer}.mu_channel_mix.weight"])  # (N, 3, 2C)
            left, right = mixed.chunk(2, dim=2)
            norm = torch.sqrt((left**2).sum(1) + EPSILON)  # (N, C)
            context = self._context(f"mixing.{layer}.intraatomic_context_net", torch.cat([node, norm], dim=1))
            scalar, radial, vector = context.chunk(3, dim=1)  # (N, C)
            node = node + scalar + vector * (left * right).sum(1)
            v2v = v2v + radial.unsqueeze(1) * right
        return node, v2v

    def _dense(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _context(self, name: str, x: Tensor) -> Tensor:
        return self._dense(f"{name}.1", silu(self._dense(f"{name}.0", x)))


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read and check the file; nothing in it is executed (`allow_pickle=False`)."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise TeacherError(f"{path}: no such file; give the .npz of a schnetpack PaiNN") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise TeacherError(f"{path}: not a readable .npz file ({error}); copy it again") from None
    problems = _problems(arrays)
    if problems:
        raise TeacherError(
            f"{path}: not the weights of a schnetpack PaiNN: {'; '.join(problems)}; "
            "give a file in the layout of painn_1.npz"
        )
    return arrays


def _problems(arrays: dict[str, np.ndarray]) -> list[str]:
    """List every array that is missing or of the wrong shape."""
    if "embedding.weight" not in arrays or "filter_net.weight" not in arrays:
        return ["embedding.weight and filter_net.weight are needed"]
    if arrays["embedding.weight"].ndim != 2 or arrays["filter_net.weight"].ndim != 2:
        return ["embedding.weight and filter_net.weight must have two dimensions"]
    c = arrays["embedding.weight"].shape[1]
    n_filters, k = arrays["filter_net.weight"].shape
    hidden = arrays["readout.0.bias"].size if "readout.0.bias" in arrays else c // 2
    expected: dict[str, tuple[int, ...]] = {
        "radial_basis.widths": (k,),
        "radial_basis.offsets": (k,),
        "cutoff_fn.cutoff": (1,),
        "filter_net.bias": (n_filters,),
        "readout.0.weight": (hidden, c),
        "readout.0.bias": (hidden,),
        "readout.1.weight": (1, hidden),
        "readout.1.bias": (1,),
        MEAN: (),
    }
    sizes = ((c, c), (3 * c, c), (c, 2 * c), (3 * c, c))
    for layer in range(n_filters // (3 * c)):
        for pattern, shape in zip(_LAYER_ARRAYS, sizes, strict=True):
            expected[f"{pattern.format(layer)}.weight"] = shape
            expected[f"{pattern.format(layer)}.bias"] = shape[:1]
        expected[f"mixing.{layer}.mu_channel_mix.weight"] = (2 * c, c)
    problems = [f"{name} is missing" for name in expected if name not in arrays]
    problems += [
        f"{name} has shape {arrays[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in arrays and arrays[name].shape != shape
    ]
    if n_filters == 0 or n_filters % (3 * c):
        problems.append(f"filter_net.weight has {n_filters} rows, expected a multiple of {3 * c}")
    return problems
