"""A `Potential` as teacher: every signal of its model, in eV and eV/A."""

from collections.abc import Collection

import torch
from torch import Tensor

from molkd.cache_schema.fields import FieldSpec
from molkd.pipeline.graphs.batch import Batch, to_device
from molkd.pipeline.models.potential import Potential
from molkd.pipeline.teachers.common import check_signals
from molkd.pipeline.teachers.interface import TeacherInfo

_OF_EDGES = ("edge_index", "edge_shift")  # which edges the rows of "edge" belong to


class PotentialTeacher:
    """Teacher over a `Potential`; energies and forces as the labels it was trained on."""

    def __init__(
        self, potential: Potential, info: TeacherInfo, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.potential = potential.to(device, dtype)
        self.potential.model.requires_grad_(False)
        self.info, self.device, self.dtype = info, device, dtype
        self.neighbor_rule = potential.neighbor_rule
        self.atomic_numbers = potential.elements

    @property
    def signals(self) -> dict[str, FieldSpec]:
        """Everything the teacher can give, by name."""
        signals: dict[str, FieldSpec] = self.potential.model.signals
        return signals

    def compute(self, batch: Batch, signals: Collection[str]) -> dict[str, Tensor]:
        """Return the asked signals, detached; features and forces in the teacher's dtype."""
        check_signals(signals, self.signals, self.info.name)
        batch = to_device(batch, self.device, self.dtype)
        with torch.no_grad():  # a model with gradient forces turns gradients on for itself
            out = self.potential.predict(batch, signals, forces="forces" in signals)
        wanted = [*signals, *(_OF_EDGES if "edge" in signals else ())]
        return {name: out[name].detach() for name in wanted}
