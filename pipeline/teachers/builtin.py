"""A model trained by this package as teacher: every signal of the model, `layer/...` included."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molkd.cache_schema.fields import FieldSpec
from molkd.pipeline.graphs.batch import Batch, to_device
from molkd.pipeline.models.potential import Potential
from molkd.pipeline.teachers.common import check_signals, group_name
from molkd.pipeline.teachers.interface import TeacherInfo

_PLACES = {
    "node": "scalar features that the energy head reads",
    "v2v": "vector features after the last block",
    "atomic_energies": "energy head before the sum, plus the references of the elements",
}


class BuiltinTeacher:
    """Teacher over a `Potential`; energies and forces as the labels it was trained on."""

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.potential = Potential.load(path).to(device, dtype)
        self.potential.model.requires_grad_(False)
        self.device, self.dtype = device, dtype
        self.neighbor_rule = self.potential.neighbor_rule
        self.atomic_numbers = self.potential.elements
        metadata = self.potential.metadata
        config = dict(metadata.get("model", {}))
        provenance = dict(metadata.get("provenance", {}))
        data = dict(provenance.get("data") or {})
        self.info = TeacherInfo(
            name=group_name(_default_name(path)),
            architecture=type(self.potential.model).__name__,
            weights_sha256=self.potential.weights_sha256,
            config=config,
            taps={name: _place(name) for name in self.signals if name not in ("energy", "forces")},
            licence=_licence(provenance, data),
            citation=str(provenance.get("citation") or data.get("citation") or ""),
            energy_reference="total energies as in the labels it was trained on",
            n_parameters=sum(p.numel() for p in self.potential.model.parameters()),
            extra={"provenance": provenance},
        )

    @property
    def signals(self) -> dict[str, FieldSpec]:
        """Everything the teacher can give, by name."""
        signals: dict[str, FieldSpec] = self.potential.model.signals
        return signals

    def compute(self, batch: Batch, signals: Collection[str]) -> dict[str, Tensor]:
        """Return the asked signals, detached; features and forces in the teacher's dtype."""
        check_signals(signals, self.signals, self.info.name)
        batch = to_device(batch, self.device, self.dtype)
        taps = [name for name in signals if name.startswith("layer/")]
        with torch.no_grad():  # a model with gradient forces turns gradients on for itself
            out = self.potential.predict(batch, taps)
        return {name: out[name].detach() for name in signals}


def _place(signal: str) -> str:
    """Say in words where in the network a signal is taken."""
    return _PLACES.get(signal, f"scalar features after block {signal.removeprefix('layer/')}")


def _licence(provenance: dict[str, Any], data: dict[str, Any]) -> str:
    """Return the weights' own licence; where none was given, that of the data they were made from."""
    if provenance.get("licence"):
        return str(provenance["licence"])
    return f"licence of its training data: {data['licence']}" if data.get("licence") else ""


def _default_name(path: Path) -> str:
    """Return the run's name for `RUN` and `RUN/best.safetensors`, else the name of the file."""
    path = path.resolve()
    if path.is_dir():
        return path.name
    return path.parent.name if path.stem in ("best", "last") else path.stem
