"""Heads: the maps M_s of Eq. 3 from a student's features to the teacher's width. Training-time only."""

import difflib
from collections.abc import Collection, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from molkd.cache_schema.fields import FieldSpec
from molkd.pipeline.config import KDTerm
from molkd.pipeline.distill.losses import (
    LossTerms,
    Targets,
    base_loss,
    feature_loss,
    vanilla1_loss,
    vanilla2_loss,
)
from molkd.pipeline.errors import ConfigError
from molkd.pipeline.models.interface import Outputs
from molkd.pipeline.models.matmul import Linear


class LinearHead(nn.Module):
    """Learned linear map over channels; without bias for vectors, which keeps them equivariant."""

    def __init__(self, n_in: int, n_out: int, *, bias: bool) -> None:
        super().__init__()
        self.linear = Linear(n_in, n_out, bias=bias)

    def forward(self, features: Float[Tensor, "*rows n_in"]) -> Float[Tensor, "*rows n_out"]:
        """Map the last axis."""
        mapped: Tensor = self.linear(features)
        return mapped


class MLPHead(nn.Module):
    """Two layers with SiLU between, as wide as the target; for scalars."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(Linear(n_in, n_out), nn.SiLU(), Linear(n_out, n_out))

    def forward(self, features: Float[Tensor, "*rows n_in"]) -> Float[Tensor, "*rows n_out"]:
        """Map the last axis."""
        mapped: Tensor = self.layers(features)
        return mapped


def make_head(
    term: KDTerm,
    student: Mapping[str, FieldSpec],
    teacher: Mapping[str, FieldSpec],
    offered: Collection[str] = (),
) -> nn.Module:
    """Build the head of one term, or say why this student and this teacher do not go together.

    Parameters
    ----------
    student : everything the student can give
    teacher : the teacher's signals in the cache
    offered : what the teacher itself can give beside energy and forces; empty if that is not known

    Raises
    ------
    ConfigError
        If the student has no such feature, the teacher or the cache no such signal, or identity meets other
        widths.
    """
    _check_student(term, student)
    _check_teacher(term, teacher, offered)
    if not term.student_taps:
        return nn.Identity()
    n_in = sum(student[tap].shape[-1] for tap in term.student_taps)
    n_out = teacher[term.teacher_tap].shape[-1]
    if term.head == "identity":
        if n_in != n_out:
            raise ConfigError(
                f"--kd {term.label}: head identity needs equal widths, student {n_in}, teacher {n_out}; "
                "take head linear"
            )
        return nn.Identity()
    if term.head == "mlp":
        return MLPHead(n_in, n_out)
    return LinearHead(n_in, n_out, bias=teacher[term.teacher_tap].symmetry == "invariant")


def make_heads(
    terms: tuple[KDTerm, ...],
    student: Mapping[str, FieldSpec],
    teacher: Mapping[str, FieldSpec],
    offered: Collection[str] = (),
) -> nn.ModuleDict:
    """Build the heads of all terms; parameters and errors as of `make_head`."""
    return nn.ModuleDict({_key(term.label): make_head(term, student, teacher, offered) for term in terms})


def _check_teacher(term: KDTerm, cached: Mapping[str, FieldSpec], offered: Collection[str]) -> None:
    for name in term.signals:
        if name in cached:
            continue
        if offered and name not in (*offered, "energy", "forces"):
            hint = f"; did you mean {_nearest(name, offered)}?" if name.startswith("layer/") else ""
            raise ConfigError(
                f"--kd {term.label}: the teacher gives no {name}; it gives {', '.join(sorted(offered))}{hint}"
            )
        have = ", ".join(sorted(cached)) or "none"
        raise ConfigError(
            f"--kd {term.label} needs the teacher's signal {name}, the cache has: {have}; "
            f"run kd cache-teacher again with --signals {name} (it adds to the store)"
        )


def _check_student(term: KDTerm, student: Mapping[str, FieldSpec]) -> None:
    if term.name in ("v2v", "e2e"):
        if term.student_taps[0] not in student:
            kind = "vector features" if term.name == "v2v" else "features of edges"
            raise ConfigError(
                f"--kd {term.name} needs {kind}, this student has none; "
                "take n2n, or a PaiNN or GemNet-OC student"
            )
        return
    scalars = {n for n, s in student.items() if s.axis == "atom" and s.symmetry == "invariant" and s.shape}
    for tap in term.student_taps:
        if tap not in scalars:
            valid = [name.removeprefix("layer/") for name in sorted(scalars)]
            short = tap.removeprefix("layer/")
            raise ConfigError(
                f"--kd {term.label}: the student has no scalar features {short}; "
                f"did you mean {_nearest(short, valid)}? valid taps: {', '.join(valid)}"
            )


def _nearest(name: str, valid: Collection[str]) -> str:
    return difflib.get_close_matches(name, valid, n=1, cutoff=0.0)[0]


class Objective(nn.Module):
    """L = L_0 + sum of weight x L_KD (Eq. 2), with one head per term, as `make_heads` gives them.

    Attributes
    ----------
    taps : the features that the student has to give beside energy and forces
    """

    def __init__(
        self,
        terms: tuple[KDTerm, ...],
        weights: Mapping[str, float],
        heads: nn.ModuleDict,
        energy_weight: float,
        forces_weight: float,
        ratios: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.ratios = ratios or {}  # teacher's tap -> components over channels, where learnt in a basis
        self.terms = terms
        self.weights = weights  # by label
        self.energy_weight = energy_weight
        self.forces_weight = forces_weight
        self.taps = tuple(sorted({tap for term in terms for tap in term.student_taps}))
        self.heads = heads

    def forward(self, outputs: Outputs, targets: Targets) -> LossTerms:
        """Return the total and every unweighted part, KD terms under their labels."""
        total, parts = base_loss(outputs, targets, self.energy_weight, self.forces_weight)
        parts = dict(parts)
        for term in self.terms:
            parts[term.label] = self._term(term, outputs, targets)
            total = total + self.weights[term.label] * parts[term.label]
        return LossTerms(total, parts)

    def _term(self, term: KDTerm, outputs: Outputs, targets: Targets) -> Tensor:
        if term.name == "vanilla1":
            return vanilla1_loss(outputs, targets, self.energy_weight, self.forces_weight)
        if term.name == "vanilla2":
            return vanilla2_loss(outputs, targets)
        mapped = self.heads[_key(term.label)](_joined([outputs[tap] for tap in term.student_taps]))
        loss = feature_loss(mapped, targets.teacher[term.teacher_tap], term.loss)
        return loss * self.ratios.get(term.teacher_tap, 1.0)


def _joined(features: list[Tensor]) -> Tensor:
    """Put features behind each other over channels, in the precision of heads and losses."""
    return features[0].float() if len(features) == 1 else torch.cat([f.float() for f in features], dim=-1)


def _key(label: str) -> str:
    return label.replace(".", "_")  # torch allows no dots in names of modules


def needed_signals(terms: tuple[KDTerm, ...], *, pseudo_labels: bool) -> tuple[str, ...]:
    """Return the teacher's signals that a run reads, sorted."""
    names = {name for term in terms for name in term.signals}
    return tuple(sorted(names | ({"energy", "forces"} if pseudo_labels else set())))
