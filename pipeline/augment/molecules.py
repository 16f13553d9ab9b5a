"""Perturbed molecules: displaced at random, by a bond or around one, then relaxed a little or moved."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from molkd.pipeline.augment.distortion import open_bonds, rotatable, stretched, turned
from molkd.pipeline.augment.dynamics import simulate
from molkd.pipeline.augment.frame import Facts, Frame, moved
from molkd.pipeline.augment.look import Looking
from molkd.pipeline.augment.rattle import rattled
from molkd.pipeline.augment.relax import Trajectory, evenly, relax
from molkd.pipeline.augment.sifting import SHORT, shortest_contact
from molkd.pipeline.augment.starts import Parents, generator
from molkd.pipeline.config.augment import MoleculesConfig
from molkd.pipeline.data.system import System
from molkd.pipeline.errors import DataError

DIVERGED = "relaxations diverged"


@dataclass(frozen=True)
class Molecules:
    """The method of `kd augment molecules`: each start is one displaced molecule."""

    config: MoleculesConfig
    parents: Parents
    looking: Looking

    @property
    def n_starts(self) -> int:
        """How many molecules are displaced."""
        return self.config.n or len(self.parents)

    def make(self, starts: Sequence[int], dropped: Counter[str]) -> list[Frame]:
        """Return frames of the trajectories from these starts."""
        begun = [self._displaced(start) for start in starts]
        apart = [f for f in begun if shortest_contact(f.system) >= self.config.min_contact]
        dropped[SHORT] += len(begun) - len(apart)
        frames = []
        for first, path in zip(apart, self._paths(apart), strict=True):
            frames += chosen(path, first.made, self.config.frames, dropped)
        return frames

    def _displaced(self, start: int) -> Frame:
        config, parent = self.config, self.parents.of(start)
        random = generator(config.seed, start)
        move = config.moves[int(random.integers(len(config.moves)))]
        made: Facts = {"parent": parent.id.hex(), "start": start, "move": move}
        bonds = open_bonds(parent) if move != "rattle" else []
        if move == "torsion":
            bonds = rotatable(parent, bonds)
        if not bonds:  # one atom, rings only, or nothing to turn
            made["move"] = "rattle"
            return Frame(moved(parent, rattled(parent, config.sigma, random)), made)
        bond = bonds[int(random.integers(len(bonds)))]
        if move == "bond":
            made["by"] = round(float(random.normal(0, config.stretch)), 4)  # A
            return Frame(moved(parent, stretched(parent, bond, float(made["by"]))), made)
        made["by"] = round(float(random.uniform(-config.max_angle, config.max_angle)), 2)  # degrees
        return Frame(moved(parent, turned(parent, bond, float(made["by"]))), made)

    def _paths(self, first: Sequence[Frame]) -> list[Trajectory]:
        config = self.config
        if config.temperature is None:
            return relax(
                self.looking, [f.system for f in first],
                steps=config.relax_steps, fmax=config.fmax, max_force=config.max_force,
            )  # fmt: skip
        return [
            simulate(
                self.looking.teacher, f.system, temperature=config.temperature, steps=config.md_steps,
                timestep=config.timestep, frames=config.frames, max_force=config.max_force,
                random=generator(config.seed, int(f.made["start"]), 1),
            )
            for f in first
        ]  # fmt: skip


def chosen(path: Trajectory, made: Facts, n_frames: int, dropped: Counter[str]) -> list[Frame]:
    """Return frames evenly over a trajectory, with the facts of its start; of a diverged one, none."""
    if path.diverged:
        dropped[DIVERGED] += 1
        return []
    return [
        replace(f, made=made | f.made) for f in (path.frames[i] for i in evenly(len(path.frames), n_frames))
    ]


def require_molecule(system: System) -> None:
    """Refuse a periodic system: bonds are looked for in open space.

    Raises
    ------
    DataError
        Naming it.
    """
    if system.pbc.any():
        raise DataError(
            f"{system.source}: is periodic, and kd augment molecules displaces molecules in open space; "
            "take kd augment rattle or adversarial for it"
        )
