"""The training losses (Eq. 1, 2) and the distillation losses (Eq. 3 to 8), each with its normaliser.

All energies and forces here are in units of the normalised labels (`LabelScale`). A missing label is NaN in
the targets and leaves no trace in the loss. S systems, N atoms, E edges.

A batch may weigh its systems (`Weights`). Each loss is then the sum of weight x error over the same count as
without weights, never over the sum of weights: where the mean weight is one the scale of a loss stays.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from molkd.pipeline.models.interface import Outputs


class Weights(NamedTuple):
    """How much the systems of a batch count in every loss: of each system, and of its atoms and edges."""

    systems: Float[Tensor, " S"]
    atoms: Float[Tensor, " N"]
    edges: Float[Tensor, " E"]  # of the teacher's edges; empty where no loss compares edges


class Targets(NamedTuple):
    """What one batch is trained on."""

    energy: Float[Tensor, " S"]  # normalised labels, NaN where missing
    forces: Float[Tensor, "N 3"]  # normalised labels, NaN where missing
    free: Bool[Tensor, " N"]  # atoms that are not fixed
    teacher: dict[str, Any]  # cached signals (Tensor, `Coded` before they are on a device); energies and
    # forces normalised like the labels
    weights: Weights | None = None  # None: all systems count alike


class LossTerms(NamedTuple):
    """The sum that is minimised, and every term alone and unweighted."""

    total: Tensor
    parts: dict[str, Tensor]


def energy_loss(
    predicted: Float[Tensor, " S"], target: Float[Tensor, " S"], weights: Float[Tensor, " S"] | None = None
) -> Tensor:
    """L_E of Eq. 1: mean absolute error over the systems that have an energy; 0 if none has."""
    known = torch.isfinite(target)
    error = torch.where(known, predicted - target.nan_to_num(), 0).abs()
    return _weighted(error, weights).sum() / known.sum().clamp(min=1)


def forces_loss(
    predicted: Float[Tensor, "N 3"],
    target: Float[Tensor, "N 3"],
    free: Bool[Tensor, " N"],
    weights: Float[Tensor, " N"] | None = None,
) -> Tensor:
    """L_F of Eq. 1: mean over free labelled atoms of the Euclidean norm of the force error; 0 if none is.

    The mean runs over the atoms of the whole batch, so large systems weigh more, as in the official code.
    """
    counted = torch.isfinite(target).all(dim=1) & free
    error = torch.where(counted[:, None], predicted - target.nan_to_num(), 0)
    # The norm's gradient at exactly zero error is undefined; these rows are masked or perfectly fitted.
    norm = error.square().sum(dim=1).clamp(min=1e-24).sqrt() * counted
    return _weighted(norm, weights).sum() / counted.sum().clamp(min=1)


def base_loss(outputs: Outputs, targets: Targets, energy_weight: float, forces_weight: float) -> LossTerms:
    """L_0 of Eq. 1: a_E L_E + a_F L_F."""
    energy, forces = _energy_and_forces(outputs, targets.energy, targets.forces, targets)
    return LossTerms(energy_weight * energy + forces_weight * forces, {"energy": energy, "forces": forces})


def feature_loss(
    mapped: Tensor, target: Tensor, kind: str, weights: Tensor | None = None, *, delta: float = 1.0
) -> Tensor:
    """L_feat of Eq. 3 for n2n, e2n (Eqs. 4, 5), v2v (Eq. 6) and e2e: one mean over all rows and channels.

    Fixed atoms count; there is no average per system. `mapped` and `target` are (N, C), (N, 3, C) or (E, C),
    `weights` is (N,) or (E,).

    Parameters
    ----------
    kind : mse, mae, or huber: half the square up to `delta`, from there on delta x (abs(error) - delta / 2)
    """
    error = mapped.float() - target.float()
    if not len(error):  # no edges; the mean of nothing would be NaN
        return error.sum()
    if kind == "huber":
        error = functional.huber_loss(error, torch.zeros_like(error), reduction="none", delta=delta)
    else:
        error = error.square() if kind == "mse" else error.abs()
    return _weighted(error, weights).mean()


def vanilla1_loss(outputs: Outputs, targets: Targets, energy_weight: float, forces_weight: float) -> Tensor:
    """Eq. 7, vanilla (1): the training loss against the teacher's energy and forces, free atoms only."""
    teacher = targets.teacher
    energy, forces = _energy_and_forces(outputs, teacher["energy"], teacher["forces"], targets)
    return energy_weight * energy + forces_weight * forces


def vanilla2_loss(outputs: Outputs, targets: Targets) -> Tensor:
    """Eq. 8, vanilla (2): mean absolute error of the atomic energies over all atoms."""
    target: Tensor = targets.teacher["atomic_energies"]
    weights = targets.weights.atoms if targets.weights else None
    return _weighted((outputs["atomic_energies"] - target).abs(), weights).mean()


def _energy_and_forces(
    outputs: Outputs, energy: Tensor, forces: Tensor, targets: Targets
) -> tuple[Tensor, Tensor]:
    weights = targets.weights
    return (
        energy_loss(outputs["energy"], energy, weights.systems if weights else None),
        forces_loss(outputs["forces"], forces, targets.free, weights.atoms if weights else None),
    )


def _weighted(errors: Tensor, weights: Tensor | None) -> Tensor:
    """Multiply each row of errors by its weight; without weights nothing is computed."""
    return errors if weights is None else errors * weights.view(-1, *(1 for _ in errors.shape[1:]))


def gradient_loss(outputs: Outputs, forces: Float[Tensor, "N 3"], targets: Targets) -> Tensor:
    """Mean over free atoms of the norm of F + dE/dx: the student's energy is to fall along the forces F.

    A student with direct forces learns its energy from one number a system otherwise; forces tell its slope
    in 3 N directions (Sobolev training, Czarnecki et al. 2017, arXiv:1706.04859). Weights and normaliser are
    those of `forces_loss`.
    """
    weights = targets.weights.atoms if targets.weights else None
    return forces_loss(-outputs["energy_gradient"], forces, targets.free, weights)


def fill_labels(targets: Targets) -> Targets:
    """Replace missing labels by the teacher's energy and forces (pseudo-labels)."""
    energy = torch.where(torch.isfinite(targets.energy), targets.energy, targets.teacher["energy"])
    forces = torch.where(torch.isfinite(targets.forces), targets.forces, targets.teacher["forces"])
    return targets._replace(energy=energy, forces=forces)
