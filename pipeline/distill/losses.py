"""The training losses (Eq. 1, 2) and the distillation losses (Eq. 3 to 8), each with its normaliser.

All energies and forces here are in units of the normalised labels (`LabelScale`). A missing label is NaN in
the targets and leaves no trace in the loss. B systems, N atoms.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from molkd.pipeline.models.interface import Outputs


class Targets(NamedTuple):
    """What one batch is trained on."""

    energy: Float[Tensor, " S"]  # normalised labels, NaN where missing
    forces: Float[Tensor, "N 3"]  # normalised labels, NaN where missing
    free: Bool[Tensor, " N"]  # atoms that are not fixed
    teacher: dict[str, Any]  # cached signals (Tensor, `Coded` before they are on a device); energies and
    # forces normalised like the labels


class LossTerms(NamedTuple):
    """The sum that is minimised, and every term alone and unweighted."""

    total: Tensor
    parts: dict[str, Tensor]


def energy_loss(predicted: Float[Tensor, " S"], target: Float[Tensor, " S"]) -> Tensor:
    """L_E of Eq. 1: mean absolute error over the systems that have an energy; 0 if none has."""
    known = torch.isfinite(target)
    error = torch.where(known, predicted - target.nan_to_num(), 0).abs()
    return error.sum() / known.sum().clamp(min=1)


def forces_loss(
    predicted: Float[Tensor, "N 3"], target: Float[Tensor, "N 3"], free: Bool[Tensor, " N"]
) -> Tensor:
    """L_F of Eq. 1: mean over free labelled atoms of the Euclidean norm of the force error; 0 if none is.

    The mean runs over the atoms of the whole batch, so large systems weigh more, as in the official code.
    """
    counted = torch.isfinite(target).all(dim=1) & free
    error = torch.where(counted[:, None], predicted - target.nan_to_num(), 0)
    # The norm's gradient at exactly zero error is undefined; these rows are masked or perfectly fitted.
    norm = error.square().sum(dim=1).clamp(min=1e-24).sqrt() * counted
    return norm.sum() / counted.sum().clamp(min=1)


def base_loss(outputs: Outputs, targets: Targets, energy_weight: float, forces_weight: float) -> LossTerms:
    """L_0 of Eq. 1: a_E L_E + a_F L_F."""
    energy = energy_loss(outputs["energy"], targets.energy)
    forces = forces_loss(outputs["forces"], targets.forces, targets.free)
    return LossTerms(energy_weight * energy + forces_weight * forces, {"energy": energy, "forces": forces})


def feature_loss(mapped: Tensor, target: Tensor, kind: str) -> Tensor:
    """L_feat of Eq. 3 for n2n, e2n (Eqs. 4, 5), v2v (Eq. 6) and e2e: one mean over all rows and channels.

    Fixed atoms count; there is no average per system. `mapped` and `target` are (N, C), (N, 3, C) or (E, C).
    """
    error = mapped.float() - target.float()
    if not len(error):  # no edges; the mean of nothing would be NaN
        return error.sum()
    return error.square().mean() if kind == "mse" else error.abs().mean()


def vanilla1_loss(outputs: Outputs, targets: Targets, energy_weight: float, forces_weight: float) -> Tensor:
    """Eq. 7, vanilla (1): the training loss against the teacher's energy and forces, free atoms only."""
    energy = energy_loss(outputs["energy"], targets.teacher["energy"])
    forces = forces_loss(outputs["forces"], targets.teacher["forces"], targets.free)
    return energy_weight * energy + forces_weight * forces


def vanilla2_loss(outputs: Outputs, targets: Targets) -> Tensor:
    """Eq. 8, vanilla (2): mean absolute error of the atomic energies over all atoms."""
    target: Tensor = targets.teacher["atomic_energies"]
    return (outputs["atomic_energies"] - target).abs().mean()


def fill_labels(targets: Targets) -> Targets:
    """Replace missing labels by the teacher's energy and forces (pseudo-labels)."""
    energy = torch.where(torch.isfinite(targets.energy), targets.energy, targets.teacher["energy"])
    forces = torch.where(torch.isfinite(targets.forces), targets.forces, targets.teacher["forces"])
    return targets._replace(energy=energy, forces=forces)
