"""A model trained by this package as teacher."""

from pathlib import Path
from typing import Any

import torch

from molkd.pipeline.models.potential import Potential
from molkd.pipeline.teachers.common import default_name, group_name
from molkd.pipeline.teachers.interface import TeacherInfo
from molkd.pipeline.teachers.potential_teacher import PotentialTeacher
from molkd.pipeline.teachers.taps import places


def load_builtin(path: Path, device: torch.device, dtype: torch.dtype) -> PotentialTeacher:
    """Load a model file, or the best model of a run folder.

    Raises
    ------
    ModelError
        If the file cannot be read or does not fit its own configuration.
    """
    potential = Potential.load(path)
    provenance = dict(potential.metadata.get("provenance", {}))
    data = dict(provenance.get("data") or {})
    architecture = type(potential.model).__name__
    info = TeacherInfo(
        name=group_name(default_name(path)),
        architecture=architecture,
        weights_sha256=potential.weights_sha256,
        config=dict(potential.metadata.get("model", {})),
        taps=places(architecture, potential.model.signals),
        licence=_licence(provenance, data),
        citation=str(provenance.get("citation") or data.get("citation") or ""),
        energy_reference="total energies as in the labels it was trained on",
        n_parameters=sum(p.numel() for p in potential.model.parameters()),
        extra={"provenance": provenance},
    )
    return PotentialTeacher(potential, info, device, dtype)


def _licence(provenance: dict[str, Any], data: dict[str, Any]) -> str:
    """Return the weights' own licence; where none was given, that of the data they were made from."""
    if provenance.get("licence"):
        return str(provenance["licence"])
    return f"licence of its training data: {data['licence']}" if data.get("licence") else ""
