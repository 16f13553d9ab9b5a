"""Adversarial rattling: projected gradient ascent on the discrepancy of student and teacher."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from molkd.pipeline.augment.discrepancy import measure
from molkd.pipeline.augment.frame import Facts, Frame, moved
from molkd.pipeline.augment.look import Looking
from molkd.pipeline.augment.rattle import rattled
from molkd.pipeline.augment.record import SUMMED
from molkd.pipeline.augment.starts import Parents, generator, mobile
from molkd.pipeline.config.augment import AdversarialConfig
from molkd.pipeline.data.system import System
from molkd.pipeline.errors import TeacherError
from molkd.pipeline.models.potential import Potential

NOT_COMPARED = "student or teacher not finite"


@dataclass(frozen=True)
class Adversarial:
    """The method of `kd augment adversarial`: of each ascent the structure with the largest discrepancy."""

    config: AdversarialConfig
    parents: Parents
    student: Potential
    looking: Looking

    @property
    def n_starts(self) -> int:
        """How many ascents there are."""
        return self.config.n or len(self.parents)

    def make(self, starts: Sequence[int], dropped: Counter[str]) -> list[Frame]:
        """Return the structure that each ascent found."""
        found: list[Frame] = []
        for part in self.looking.batches([self.parents.of(start) for start in starts]):
            found += self._climb(part, starts[len(found) : len(found) + len(part)])
        frames = [f for f in found if np.isfinite([f.made[key] for key in SUMMED]).all()]
        dropped[NOT_COMPARED] += len(found) - len(frames)
        return frames

    def _climb(self, parents: Sequence[System], starts: Sequence[int]) -> list[Frame]:
        config = self.config
        first = [
            rattled(parent, config.jitter, generator(config.seed, start), move_fixed=config.move_fixed)
            for parent, start in zip(parents, starts, strict=True)
        ]
        climb: Climb | None = None
        try:
            climb = ascend(self.student, self.looking, parents, first, config)
        except torch.OutOfMemoryError:  # batches are cut for the teacher alone, without gradients
            if len(parents) == 1:
                raise TeacherError(
                    f"{parents[0].source}: gradients for {parents[0].n_atoms} atoms need more memory than "
                    f"{self.student.device} has; take smaller structures, or --device cpu"
                ) from None
        if climb is None:  # outside: what is handled there still holds the memory
            half = len(parents) // 2
            return [*self._climb(parents[:half], starts[:half]), *self._climb(parents[half:], starts[half:])]
        best = climb.values.argmax(axis=0)
        frames = []
        for k, (parent, start) in enumerate(zip(parents, starts, strict=True)):
            made: Facts = {
                "parent": parent.id.hex(),
                "start": start,
                "step": int(best[k]),
                "discrepancy_at_start": float(climb.values[0, k]),
                "discrepancy": float(climb.values[best[k], k]),
            }
            frames.append(Frame(moved(parent, climb.positions[best[k]][k]), made))
        return frames


@dataclass(frozen=True, eq=False)
class Climb:
    """Every step of an ascent from S systems, the start first."""

    positions: list[list[NDArray[np.float64]]]  # of each step, of each system (N, 3) A
    values: NDArray[np.float64]  # (steps + 1, S) the discrepancy, -inf where it was not finite


def ascend(
    student: Potential,
    looking: Looking,
    parents: Sequence[System],
    first: Sequence[NDArray[np.float64]],
    config: AdversarialConfig,
) -> Climb:
    """Climb from `first` (S arrays (N, 3), A) along the gradient, within a ball around each parent's atoms.

    A gradient is scaled so that the atom with the largest one moves by `step_size`; then every atom farther
    than `max_displacement` from its place in the parent is put back onto that distance.
    """
    may_move = [mobile(parent, move_fixed=config.move_fixed)[:, None] for parent in parents]
    ends = np.cumsum([parent.n_atoms for parent in parents])[:-1]
    here = [project(p.positions, x, config.max_displacement) for p, x in zip(parents, first, strict=True)]
    positions, values = [], []
    for _ in range(config.steps + 1):
        systems = [moved(parent, x) for parent, x in zip(parents, here, strict=True)]
        found = measure(student, looking, systems, config.energy_weight, config.forces_weight)
        positions.append([s.positions for s in systems])
        values.append(np.where(np.isfinite(found.values), found.values, -np.inf))
        gradients = np.split(np.nan_to_num(found.gradient, posinf=0.0, neginf=0.0), ends)
        here = [
            project(
                parent.positions,
                system.positions + config.step_size * _scaled(gradient * mask),
                config.max_displacement,
            )
            for parent, system, gradient, mask in zip(parents, systems, gradients, may_move, strict=True)
        ]
    return Climb(positions, np.array(values))


def _scaled(gradient: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the direction in which the atom with the largest gradient moves by one."""
    largest = np.linalg.norm(gradient, axis=1).max(initial=0.0)
    return gradient / largest if largest > 0 else gradient


def project(
    center: NDArray[np.float64], positions: NDArray[np.float64], radius: float
) -> NDArray[np.float64]:
    """Return positions (N, 3) with no atom farther than `radius` from its place in `center`."""
    displacement = positions - center
    length = np.linalg.norm(displacement, axis=1, keepdims=True)
    return np.asarray(center + displacement * np.minimum(1.0, radius / np.maximum(length, 1e-300)))
