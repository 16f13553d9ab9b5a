"""Random rattling: every atom is displaced by normally distributed noise."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from molkd.pipeline.augment.frame import Facts, Frame, moved
from molkd.pipeline.augment.starts import Parents, generator, mobile
from molkd.pipeline.config.augment import RattleConfig
from molkd.pipeline.data.system import System


@dataclass(frozen=True)
class Rattle:
    """The method of `kd augment rattle`: each system with every sigma in turn, all systems, and again."""

    config: RattleConfig
    parents: Parents

    @property
    def n_starts(self) -> int:
        """How many structures are made."""
        config = self.config
        return config.n or len(self.parents) * len(config.sigma) * config.copies

    def make(self, starts: Sequence[int], dropped: Counter[str]) -> list[Frame]:  # noqa: ARG002
        """Return one structure for each start."""
        return [self._one(start) for start in starts]

    def _one(self, start: int) -> Frame:
        config, parent = self.config, self.parents.of(start // len(self.config.sigma))
        sigma = config.sigma[start % len(config.sigma)]
        displaced = rattled(parent, sigma, generator(config.seed, start), move_fixed=config.move_fixed)
        made: Facts = {"parent": parent.id.hex(), "start": start, "sigma": sigma}
        return Frame(moved(parent, displaced), made)


def rattled(
    system: System, sigma: float, random: np.random.Generator, *, move_fixed: bool = False
) -> NDArray[np.float64]:
    """Return positions (N, 3) with noise of standard deviation `sigma` (A) along each axis."""
    noise = random.normal(0.0, sigma, (system.n_atoms, 3)) if sigma > 0 else np.zeros((system.n_atoms, 3))
    return np.asarray(system.positions + noise * mobile(system, move_fixed=move_fixed)[:, None])
