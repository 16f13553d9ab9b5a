"""`kd teacher info`: what a teacher is and what it can give, without looking at any structure."""

from collections.abc import Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from ase.data import chemical_symbols

from molkd.cache_schema.fields import FieldSpec
from molkd.pipeline.graphs.neighbors import NeighborRule
from molkd.pipeline.teachers.interface import TeacherInfo
from molkd.pipeline.teachers.load import load_teacher
from molkd.pipeline.teachers.potential_teacher import PotentialTeacher

_ROWS = {"system": "S", "atom": "N", "edge": "E"}  # size letters of docs/conventions.md
_NOTHING = 1e-12  # eV; a mean this small is the rounding of zero


@dataclass(frozen=True)
class TeacherDescription:
    """What `kd teacher info` prints."""

    teacher: str  # as the user named it
    info: TeacherInfo
    neighbor_rule: NeighborRule
    elements: tuple[int, ...]  # atomic numbers
    label_scale: dict[str, Any] | None  # mean and std in eV and eV/A; None: nothing is normalised
    signals: tuple[FieldSpec, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        of_signals = {spec.name: asdict(spec) | self._place(spec) for spec in self.signals}
        return {
            "teacher": self.teacher,
            **asdict(self.info),
            "neighbor_rule": self.neighbor_rule.to_dict(),
            "elements": list(self.elements),
            "label_scale": self.label_scale,
            "signals": of_signals,
        }

    def text(self) -> str:
        """Return the description for people, one line a fact."""
        info = self.info
        facts = {
            "teacher": self.teacher,
            "name": info.name,
            "architecture": info.architecture
            + (f", {info.n_parameters:,} parameters" if info.n_parameters else ""),
            "sha256": info.weights_sha256,
            "weights": info.extra.get("weights"),
            "scale factors": f"from {source}" if (source := info.extra.get("scale_factors")) else "",
            "graph": _graph(self.neighbor_rule),
            "elements": _elements(set(self.elements)),
            "labels": _labels(self.label_scale),
            "energies": info.energy_reference,
            "licence": info.licence,
            "citation": info.citation,
        }
        lines = [f"{name:<13}  {fact}" for name, fact in facts.items() if fact]
        lines += ["config", *(f"  {key} = {value}" for key, value in info.config.items())]
        return "\n".join([*lines, "signals", *self._signal_lines()])

    def _signal_lines(self) -> list[str]:
        cells = [
            (spec.name, f"({', '.join([_ROWS[spec.axis], *map(str, spec.shape)])})", spec.unit, spec.symmetry)
            for spec in self.signals
        ]
        widths = [max(len(row[k]) for row in cells) for k in range(4)]
        return [
            "  " + "  ".join([*(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)), place]).rstrip()
            for row, place in zip(cells, (self._place(s).get("place", "") for s in self.signals), strict=True)
        ]

    def _place(self, spec: FieldSpec) -> dict[str, str]:
        return {"place": self.info.taps[spec.name]} if spec.name in self.info.taps else {}


def describe_teacher(spec: str, *, scale_file: Path | None = None) -> TeacherDescription:
    """Load the teacher that `spec` names and describe it.

    Parameters
    ----------
    spec, scale_file : as for `load_teacher`

    Raises
    ------
    TeacherError, ModelError
        As `load_teacher`.
    """
    teacher = load_teacher(spec, device=torch.device("cpu"), scale_file=scale_file)
    scale = teacher.potential.scale.to_dict() if isinstance(teacher, PotentialTeacher) else None
    return TeacherDescription(
        teacher=spec,
        info=teacher.info,
        neighbor_rule=teacher.neighbor_rule,
        elements=tuple(sorted(teacher.atomic_numbers)),
        label_scale=scale,
        signals=tuple(teacher.signals.values()),
    )


def _graph(rule: NeighborRule) -> str:
    """Return the neighbour rule in words."""
    nearest = "all neighbors" if rule.max_neighbors is None else f"nearest {rule.max_neighbors}"
    ties = ", the next one and its ties" if rule.tie_tolerance else ""
    both = ", made symmetric" if rule.symmetrize else ""
    cells = "periodic" if rule.use_pbc else "cells ignored"
    return f"cutoff {rule.cutoff:g} A, {nearest}{ties}{both}, {cells}"


def _elements(numbers: Set[int]) -> str:
    """Return the elements as symbols; three and more in a row as a range."""
    ordered = sorted(numbers)
    runs: list[list[int]] = []
    for z in ordered:
        if runs and z == runs[-1][-1] + 1:
            runs[-1].append(z)
        else:
            runs.append([z])
    parts = [
        f"{chemical_symbols[run[0]]} to {chemical_symbols[run[-1]]}"
        if len(run) > 2
        else ", ".join(chemical_symbols[z] for z in run)
        for run in runs
    ]
    return f"{len(ordered)}: {', '.join(parts)}"


def _labels(scale: dict[str, Any] | None) -> str:
    """Return how the outputs become energies and forces."""
    if scale is None:
        return ""
    references = f", references of {len(scale['references'])} elements added" if scale["references"] else ""
    mean = scale["energy_mean"] if abs(scale["energy_mean"]) >= _NOTHING else 0.0
    return (
        f"energy mean {mean:.6g} eV, std {scale['energy_std']:.6g} eV{references}; "
        f"forces std {scale['forces_std']:.6g} eV/A"
    )
