"""Heads: the maps M_s of Eq. 3 from a student's features to the teacher's width. Training-time only."""

import difflib
from collections.abc import Collection, Mapping

from jaxtyping import Float
from torch import Tensor, nn

from molkd.cache_schema.fields import FieldSpec
from molkd.pipeline.config import STRUCTURE_LOSSES, KDTerm
from molkd.pipeline.errors import ConfigError
from molkd.pipeline.models.matmul import Linear

_KINDS = {
    "n2n": "scalar features",
    "e2n": "scalar features",
    "v2v": "vector features",
    "e2e": "features of edges",
}


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
        If the student has no such feature, the teacher or the cache no such signal, identity meets other
        widths, or a loss on outputs chooses a head or how features are compared.
    """
    _check_student(term, student)
    _check_teacher(term, teacher, offered)
    if not term.student_taps:
        if term.head != "linear" or term.loss != "mse":  # not read, and nobody is to think so
            raise ConfigError(f"kd: {term.name} takes neither head nor loss, it compares outputs")
        return nn.Identity()
    n_in = sum(student[tap].shape[-1] for tap in term.student_taps)
    n_out = teacher[term.teacher_tap].shape[-1]
    if term.head == "identity":
        if n_in != n_out and term.loss not in STRUCTURE_LOSSES:
            raise ConfigError(
                f"--kd {term.label}: head identity needs equal widths, student {n_in}, teacher {n_out}; "
                "take head linear, or loss cka, gsp or lsp"
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
    return nn.ModuleDict({head_key(term): make_head(term, student, teacher, offered) for term in terms})


def _check_teacher(term: KDTerm, cached: Mapping[str, FieldSpec], offered: Collection[str]) -> None:
    for name in term.signals:
        if name in cached:
            if term.student_taps and cached[name].symmetry != _symmetry(term):
                raise ConfigError(
                    f"--kd {term.label}: {term.name} learns {_KINDS[term.name]}, and the teacher's "
                    f"{name.removeprefix('layer/')} is {cached[name].symmetry}"
                )
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
    """Refuse taps that the student does not have, or whose features are of another kind than the loss's."""
    if not term.student_taps:
        return
    axis, kind = "edge" if term.name == "e2e" else "atom", _KINDS[term.name]
    features = {name: s for name, s in student.items() if s.axis == axis and s.unit == "1"}
    valid = {name.removeprefix("layer/"): n for name, n in features.items() if n.symmetry == _symmetry(term)}
    if not valid:
        raise ConfigError(
            f"--kd {term.label} needs {kind}, this student has none; "
            "take n2n, or a PaiNN or GemNet-OC student"
        )
    for tap in (tap.removeprefix("layer/") for tap in term.student_taps):
        if tap not in valid:
            raise ConfigError(
                f"--kd {term.label}: the student has no {kind} {tap}; "
                f"did you mean {_nearest(tap, valid)}? valid taps: {', '.join(sorted(valid))}"
            )


def _symmetry(term: KDTerm) -> str:
    return "vector" if term.name == "v2v" else "invariant"


def _nearest(name: str, valid: Collection[str]) -> str:
    return difflib.get_close_matches(name, valid, n=1, cutoff=0.0)[0]


def head_key(term: KDTerm) -> str:
    """Return the name of a term's head among modules; torch allows no dots in it."""
    return term.label.replace(".", "_")
