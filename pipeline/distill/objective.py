"""What a student minimises: the loss on labels and every distillation loss with its weight (Eq. 2)."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from molkd.pipeline.config import STRUCTURE_LOSSES, KDTerm
from molkd.pipeline.distill.feature_losses import structure_loss
from molkd.pipeline.distill.heads import head_key
from molkd.pipeline.distill.losses import (
    LossTerms,
    Targets,
    base_loss,
    feature_loss,
    gradient_loss,
    vanilla1_loss,
    vanilla2_loss,
)
from molkd.pipeline.graphs.batch import Batch
from molkd.pipeline.models.interface import Outputs


class Objective(nn.Module):
    """L = L_0 + sum of weight x L_KD (Eq. 2), with one head per term, as `make_heads` gives them.

    Attributes
    ----------
    taps : the features that the student has to give beside energy and forces
    needs_gradient : whether the outputs have to hold energy_gradient (N, 3), dE/dx of the student
    weights : lambda by the label of its term
    """

    def __init__(
        self,
        terms: tuple[KDTerm, ...],
        weights: Mapping[str, float],
        heads: nn.ModuleDict,
        energy_weight: float,
        forces_weight: float,
        gradient_weight: float = 0.0,
        ratios: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.ratios = ratios or {}  # teacher's tap -> components over channels, where learnt in a basis
        self.terms = terms
        self.weights = dict(weights)
        self.energy_weight = energy_weight
        self.forces_weight = forces_weight
        self.gradient_weight = gradient_weight
        self.taps = tuple(sorted({tap for term in terms for tap in term.student_taps}))
        self.heads = heads
        self.needs_gradient = gradient_weight > 0 or any(term.name == "grad" for term in terms)

    @property
    def part_names(self) -> tuple[str, ...]:
        """The parts that `forward` returns, in order."""
        slope = ("gradient",) if self.gradient_weight > 0 else ()
        return ("energy", "forces", *slope, *(term.label for term in self.terms))

    def forward(
        self, outputs: Outputs, targets: Targets, batch: Batch | None = None, progress: float = 0.0
    ) -> LossTerms:
        """Return the total and every unweighted part, KD terms under their labels.

        Parameters
        ----------
        batch : what the outputs were computed from; losses on relations between atoms need it
        progress : share of the run that is done, for terms that fade
        """
        total, parts = self.labels_loss(outputs, targets)
        parts = dict(parts)
        for term in self.terms:
            label, factor = term.label, fade_factor(term, progress)
            with torch.set_grad_enabled(torch.is_grad_enabled() and factor > 0):  # gone: only logged
                parts[label] = self.term_loss(term, outputs, targets, batch)
            total = total + self.weights[label] * factor * parts[label] if factor > 0 else total
        return LossTerms(total, parts)

    def labels_loss(self, outputs: Outputs, targets: Targets) -> LossTerms:
        """L_0 of Eq. 1 and, beyond the paper, the slope of the energy against the labelled forces."""
        total, parts = base_loss(outputs, targets, self.energy_weight, self.forces_weight)
        if self.gradient_weight <= 0:
            return LossTerms(total, parts)
        slope = gradient_loss(outputs, targets.forces, targets)
        return LossTerms(total + self.gradient_weight * slope, {**parts, "gradient": slope})

    def term_loss(
        self, term: KDTerm, outputs: Outputs, targets: Targets, batch: Batch | None = None
    ) -> Tensor:
        """Return one distillation loss, unweighted."""
        if term.name == "vanilla1":
            return vanilla1_loss(outputs, targets, self.energy_weight, self.forces_weight)
        if term.name == "vanilla2":
            return vanilla2_loss(outputs, targets)
        if term.name == "grad":
            return gradient_loss(outputs, targets.teacher["forces"], targets)
        mapped = self.heads[head_key(term)](_joined([outputs[tap] for tap in term.student_taps]))
        weights = targets.weights
        if term.loss in STRUCTURE_LOSSES:
            assert batch is not None
            return structure_loss(term.loss, mapped, targets.teacher[term.teacher_tap], batch, weights)
        rows = (weights.edges if term.name == "e2e" else weights.atoms) if weights else None
        loss = feature_loss(mapped, targets.teacher[term.teacher_tap], term.loss, rows, delta=term.delta)
        return loss * self.ratios.get(term.teacher_tap, 1.0)


def fade_factor(term: KDTerm, progress: float) -> float:
    """Return what the weight of a term is multiplied by: 1, then half a cosine down to 0, then 0."""
    if term.fade is None:
        return 1.0
    begin, end = term.fade
    done = (progress - begin) / (end - begin) if end > begin else float(progress >= end)
    return 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0)))


def _joined(features: list[Tensor]) -> Tensor:
    """Put features behind each other over channels, in the precision of heads and losses."""
    return features[0].float() if len(features) == 1 else torch.cat([f.float() for f in features], dim=-1)


def needed_signals(terms: tuple[KDTerm, ...], *, pseudo_labels: bool) -> tuple[str, ...]:
    """Return the teacher's signals that a run reads, sorted."""
    names = {name for term in terms for name in term.signals}
    return tuple(sorted(names | ({"energy", "forces"} if pseudo_labels else set())))
