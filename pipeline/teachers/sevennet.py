"""SevenNet-0 from the wheel of `sevenn`: 128 scalar and 64 vector features an atom, 89 elements, offline."""

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molkd.cache_schema.fields import FieldSpec
from molkd.pipeline.errors import TeacherError
from molkd.pipeline.graphs.batch import Batch, edge_vectors, to_device
from molkd.pipeline.graphs.neighbors import NeighborRule
from molkd.pipeline.teachers.common import (
    check_signals,
    file_sha256,
    minus_gradient,
    sum_over_atoms,
    usual_signals,
)
from molkd.pipeline.teachers.interface import TeacherInfo

NAME = "sevennet-0"
N_SCALARS, N_VECTORS = 128, 64
VECTOR_TAP = "3_equivariant_gate"  # the last block keeps scalars only, so vectors come from the one before
SCALAR_TAP = "4_equivariant_gate"
ENERGY_TAP = "rescale_atomic_energy"
_ARRAY_GLOBALS = {"numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct"}
_CONFIG_KEYS = ("version", "irreps_manual", "is_parity", "radial_basis", "cutoff_function")
_CITATION = (
    "Y. Park, J. Kim, S. Hwang, S. Han, Scalable Parallel Algorithm for Graph Neural Network Interatomic "
    "Potentials in Molecular Dynamics Simulations, J. Chem. Theory Comput. 20 (2024) 4857"
)


class SevenNet:
    """Teacher over SevenNet-0 (11 July 2024), trained on MPtrj (PBE and PBE+U as in Materials Project)."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        path, config, model = _load_model()
        self.device, self.dtype = device, dtype
        self.model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self.neighbor_rule = NeighborRule(cutoff=float(config["cutoff"]))
        self.atomic_numbers = frozenset(config["_type_map"])
        self.type_idx = torch.full((max(self.atomic_numbers) + 1,), -1, device=device)
        for atomic_number, index in config["_type_map"].items():
            self.type_idx[atomic_number] = index
        self.info = TeacherInfo(
            name=NAME,
            architecture="SevenNet",
            weights_sha256=file_sha256(path),
            config={"cutoff": self.neighbor_rule.cutoff, **{key: config[key] for key in _CONFIG_KEYS}},
            taps={
                "node": f"{SCALAR_TAP}: scalars after the fifth, last interaction, read by the energy head",
                "v2v": f"{VECTOR_TAP}: l=1 features after the fourth interaction, the last that has vectors; "
                "they turn with the system, their sign under reflection is not defined",
                "atomic_energies": f"{ENERGY_TAP}: energy head with its shift and scale of each element",
            },
            licence="MIT",
            citation=_CITATION,
            energy_reference="total energies of PBE and PBE+U as in Materials Project, without corrections",
            extra={"sevenn": version("sevenn"), "e3nn": version("e3nn")},
        )

    @property
    def signals(self) -> dict[str, FieldSpec]:
        """Everything the teacher can give, by name."""
        return usual_signals(N_SCALARS, N_VECTORS)

    def compute(self, batch: Batch, signals: Collection[str]) -> dict[str, Tensor]:
        """Return the asked signals, detached; features and forces in the teacher's dtype."""
        check_signals(signals, self.signals, self.info.name)
        batch = to_device(batch, self.device, self.dtype)
        with torch.set_grad_enabled("forces" in signals):
            positions = batch.positions.detach().clone().requires_grad_("forces" in signals)
            node, v2v, energies = self._forward(batch, positions)
        atomic_energies = energies.detach().double()
        out = {"atomic_energies": atomic_energies, "node": node.detach(), "v2v": v2v.detach()}
        out["energy"] = sum_over_atoms(atomic_energies, batch)
        if "forces" in signals:
            out["forces"] = minus_gradient(energies, positions)
        return {name: out[name] for name in signals}

    def _forward(self, batch: Batch, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return node (N, 128), v2v (N, 3, 64) and atomic energies (N,) in eV."""
        data = {
            "x": self.type_idx[batch.atomic_numbers],
            "edge_index": batch.edge_index.flip(0),  # row 0 is the center there
            "edge_vec": edge_vectors(batch, positions),
        }
        v2v = positions.new_zeros(0)
        # The blocks one by one, as the package's own model runs them, up to the energy of each atom.
        for name, block in self.model.named_children():
            data = block(data)
            if name == "onehot_idx_to_onehot":
                data["x"] = data["x"].to(self.dtype)  # the block always gives float32
            elif name == VECTOR_TAP:
                flat = data["x"][:, N_SCALARS : N_SCALARS + 3 * N_VECTORS]
                v2v = (
                    flat.unflatten(1, (N_VECTORS, 3)).transpose(1, 2).contiguous()
                )  # e3nn: x, y, z per channel
            elif name == SCALAR_TAP:
                node = data["x"]
            elif name == ENERGY_TAP:
                break
        return node, v2v, data["atomic_energy"].squeeze(1)


def _load_model() -> tuple[Path, dict[str, Any], torch.nn.Module]:
    """Return the checkpoint's path, its configuration and the network.

    Raises
    ------
    TeacherError
        If `sevenn` is absent, broken or of another make, or if its checkpoint names anything but arrays.
    """
    try:  # by name: type checkers run with and without the extra
        with _quiet():
            util = import_module("sevenn.util")
    except ImportError as error:
        raise TeacherError(
            f"{NAME} needs the package sevenn ({error}); install it with: pip install 'molkd[sevenn]'"
        ) from None
    path = Path(util.pretrained_name_to_path("7net-0"))  # shipped in the wheel: nothing is downloaded
    # The package unpickles its file without restriction. The installed package is trusted as code anyway; the
    # file need not be: it may name tensors and numpy arrays and nothing else.
    foreign = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - _ARRAY_GLOBALS
    if foreign:
        raise TeacherError(
            f"{path}: the checkpoint names {', '.join(sorted(foreign))}, expected arrays only; "
            "reinstall sevenn"
        )
    with _quiet():
        checkpoint = util.load_checkpoint(path)
        model = checkpoint.build_model()
    if not {VECTOR_TAP, SCALAR_TAP, ENERGY_TAP} <= dict(model.named_children()).keys():
        raise TeacherError(f"sevenn {version('sevenn')} builds {NAME} from other blocks; install sevenn 0.13")
    return path, checkpoint.config, model


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide torch's notice that TorchScript, which the package is written in, is deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit", category=DeprecationWarning)
        yield
