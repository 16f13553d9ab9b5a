"""What every teacher is: batches in, signals in eV, eV/A and the teacher's own feature units out."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from molkd.cache_schema.fields import FieldSpec
from molkd.pipeline.graphs.batch import Batch
from molkd.pipeline.graphs.neighbors import NeighborRule


@dataclass(frozen=True)
class TeacherInfo:
    """Provenance that the cache keeps, so that two caches can be told apart or shown to fit."""

    name: str  # default name of the teacher's group in a store: letters, digits, "-", "_", "."
    architecture: str
    weights_sha256: str  # of the bytes of the weights file
    config: dict[str, object]  # JSON-able hyper-parameters
    taps: dict[str, str]  # signal -> where in the network it is taken, in words
    licence: str
    citation: str
    energy_reference: str  # what the teacher's energies are relative to, in words
    units_inside: str = "eV, A"
    n_parameters: int | None = None
    extra: dict[str, object] = field(default_factory=dict)


class Teacher(Protocol):
    """The contract that tests/teachers/test_contract.py checks for every adapter."""

    info: TeacherInfo
    neighbor_rule: NeighborRule
    atomic_numbers: frozenset[int]  # elements the teacher knows; others are refused before any work
    device: torch.device
    dtype: torch.dtype

    @property
    def signals(self) -> dict[str, FieldSpec]:
        """Everything the teacher can give, by name."""
        ...

    def compute(self, batch: Batch, signals: Collection[str]) -> dict[str, Tensor]:
        """Return the asked signals of a batch already on the teacher's device, detached.

        energy (S,) float64 eV, forces (N, 3) eV/A, atomic_energies (N,) float64 eV, node (N, C) and so
        on as `signals` says; forces and features in the teacher's dtype.
        """
        ...
