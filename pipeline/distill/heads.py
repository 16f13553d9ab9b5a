"""Heads: the maps M_s of Eq. 3 from a student's features to the teacher's width. Training-time only."""

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

# Which signals of the teacher each loss reads, and which feature of the student it compares.
TEACHER_SIGNALS = {
    "n2n": ("node",),
    "v2v": ("v2v",),
    "vanilla1": ("energy", "forces"),
    "vanilla2": ("atomic_energies",),
}
STUDENT_FEATURE = {"n2n": "node", "v2v": "v2v"}


class LinearHead(nn.Module):
    """Learned linear map over channels; without bias for vectors, which keeps them equivariant."""

    def __init__(self, n_in: int, n_out: int, *, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(n_in, n_out, bias=bias)

    def forward(self, features: Float[Tensor, "*rows n_in"]) -> Float[Tensor, "*rows n_out"]:
        """Map the last axis."""
        mapped: Tensor = self.linear(features)
        return mapped


class MLPHead(nn.Module):
    """Two layers with SiLU between, as wide as the target; for scalars."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(n_in, n_out), nn.SiLU(), nn.Linear(n_out, n_out))

    def forward(self, features: Float[Tensor, "*rows n_in"]) -> Float[Tensor, "*rows n_out"]:
        """Map the last axis."""
        mapped: Tensor = self.layers(features)
        return mapped


def make_head(term: KDTerm, student: dict[str, FieldSpec], teacher: dict[str, FieldSpec]) -> nn.Module:
    """Build the head of one term, or say why this student and this teacher do not go together.

    Raises
    ------
    ConfigError
        If the student has no such feature, the cache has no such signal, or identity meets other widths.
    """
    for name in TEACHER_SIGNALS[term.name]:
        if name not in teacher:
            have = ", ".join(sorted(teacher)) or "none"
            raise ConfigError(
                f"--kd {term.name} needs the teacher's signal {name}, the cache has: {have}; "
                f"run kd cache-teacher again with --signals {name} (it adds to the store)"
            )
    feature = STUDENT_FEATURE.get(term.name)
    if feature is None:
        return nn.Identity()
    if feature not in student:
        have = ", ".join(sorted(s for s in student if s in STUDENT_FEATURE.values()))
        raise ConfigError(
            f"--kd {term.name} needs vector features, this student has only: {have}; "
            "take n2n, or a PaiNN student"
        )
    n_in, n_out = student[feature].shape[-1], teacher[feature].shape[-1]
    if term.head == "identity":
        if n_in != n_out:
            raise ConfigError(
                f"--kd {term.name}: head identity needs equal widths, student {n_in}, teacher {n_out}; "
                "take head linear"
            )
        return nn.Identity()
    if term.head == "mlp":
        return MLPHead(n_in, n_out)
    return LinearHead(n_in, n_out, bias=feature == "node")


class Objective(nn.Module):
    """L = L_0 + sum of weight x L_KD (Eq. 2), with one head per term."""

    def __init__(
        self,
        terms: tuple[KDTerm, ...],
        weights: dict[str, float],
        student: dict[str, FieldSpec],
        teacher: dict[str, FieldSpec],
        energy_weight: float,
        forces_weight: float,
    ) -> None:
        super().__init__()
        self.terms = terms
        self.weights = weights
        self.energy_weight = energy_weight
        self.forces_weight = forces_weight
        self.heads = nn.ModuleDict({term.name: make_head(term, student, teacher) for term in terms})

    def forward(self, outputs: Outputs, targets: Targets) -> LossTerms:
        """Return the total and every unweighted part."""
        total, parts = base_loss(outputs, targets, self.energy_weight, self.forces_weight)
        parts = dict(parts)
        for term in self.terms:
            parts[term.name] = self._term(term, outputs, targets)
            total = total + self.weights[term.name] * parts[term.name]
        return LossTerms(total, parts)

    def _term(self, term: KDTerm, outputs: Outputs, targets: Targets) -> Tensor:
        if term.name == "vanilla1":
            return vanilla1_loss(outputs, targets, self.energy_weight, self.forces_weight)
        if term.name == "vanilla2":
            return vanilla2_loss(outputs, targets)
        feature = STUDENT_FEATURE[term.name]
        return feature_loss(
            self.heads[term.name](outputs[feature].float()), targets.teacher[feature], term.loss
        )


def needed_signals(terms: tuple[KDTerm, ...], *, pseudo_labels: bool) -> tuple[str, ...]:
    """Return the teacher's signals that a run reads, sorted."""
    names = {name for term in terms for name in TEACHER_SIGNALS[term.name]}
    return tuple(sorted(names | ({"energy", "forces"} if pseudo_labels else set())))
