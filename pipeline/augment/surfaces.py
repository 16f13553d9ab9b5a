"""New adsorbates on surfaces: a crystal, a facet, an adsorbate and a site drawn at random, then relaxed."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from ase import Atoms

from molkd.pipeline.augment.adsorbates import place, read_adsorbates
from molkd.pipeline.augment.frame import Facts, Frame, from_atoms
from molkd.pipeline.augment.look import Looking
from molkd.pipeline.augment.molecules import chosen
from molkd.pipeline.augment.relax import relax
from molkd.pipeline.augment.sifting import SHORT, shortest_contact
from molkd.pipeline.augment.sites import Site, find_sites
from molkd.pipeline.augment.slabs import Bulk, Miller, parse_facet, read_bulks, slab
from molkd.pipeline.augment.starts import generator
from molkd.pipeline.config.augment import SurfacesConfig

N_STARTS = 100
NO_SITE, TOO_LARGE = "no such site on the facet", "slabs with too many atoms"


@dataclass(frozen=True)
class Surfaces:
    """The method of `kd augment surfaces`: each start is one adsorbate on one slab."""

    config: SurfacesConfig
    looking: Looking
    bulks: Sequence[Bulk]
    adsorbates: Sequence[tuple[str, Atoms]]
    facets: tuple[Miller, ...]  # (): those of each lattice
    # Made so far, by the number of the crystal: two files may have one name.
    slabs: dict[tuple[int, Miller], tuple[Atoms, list[Site]]] = field(default_factory=dict)

    @classmethod
    def of(cls, config: SurfacesConfig, looking: Looking) -> "Surfaces":
        """Read what the user names, before anything is made.

        Raises
        ------
        ConfigError
            If a crystal, a facet or an adsorbate cannot be had, or holds what the teacher does not know.
        """
        known = looking.teacher.atomic_numbers
        named = "adsorbates" in config.model_fields_set
        return cls(
            config,
            looking,
            read_bulks(config.bulks, known),
            read_adsorbates(config.adsorbates, known, named=named),
            tuple(parse_facet(text) for text in config.facets),
        )

    @property
    def n_starts(self) -> int:
        """How many slabs with an adsorbate are put together."""
        return self.config.n or N_STARTS

    @property
    def fingerprint(self) -> str:
        """Hash of the crystals and adsorbates themselves; names alone do not say what a file holds."""
        systems = [from_atoms(one.atoms, one.name) for one in self.bulks]
        systems += [from_atoms(atoms, name) for name, atoms in self.adsorbates]
        return hashlib.sha256(b"".join(system.id for system in systems)).hexdigest()

    def make(self, starts: Sequence[int], dropped: Counter[str]) -> list[Frame]:
        """Return frames of the relaxations from these starts."""
        begun = [frame for frame in (self._built(start, dropped) for start in starts) if frame]
        config = self.config
        paths = relax(
            self.looking, [f.system for f in begun],
            steps=config.relax_steps, fmax=config.fmax, max_force=config.max_force,
        )  # fmt: skip
        frames = []
        for first, path in zip(begun, paths, strict=True):
            frames += chosen(path, first.made, config.frames, dropped)
        return frames

    def _built(self, start: int, dropped: Counter[str]) -> Frame | None:
        config, random = self.config, generator(self.config.seed, start)
        number = int(random.integers(len(self.bulks)))
        bulk = self.bulks[number]
        facets = self.facets or bulk.facets
        facet = facets[int(random.integers(len(facets)))]
        name, adsorbate = self.adsorbates[int(random.integers(len(self.adsorbates)))]
        bare, sites = self._slab(number, facet)
        kinds = sorted({s.kind for s in sites} & set(config.sites or {s.kind for s in sites}))
        if len(bare) > config.max_atoms or not kinds:
            dropped[TOO_LARGE if len(bare) > config.max_atoms else NO_SITE] += 1
            return None
        kind = kinds[int(random.integers(len(kinds)))]  # a kind first: bridges are many
        of_kind = [s for s in sites if s.kind == kind]
        site = of_kind[int(random.integers(len(of_kind)))]
        atoms = place(bare, adsorbate, site.xy, random)
        miller = "".join(map(str, facet))
        made: Facts = {"start": start, "bulk": bulk.name, "facet": miller, "adsorbate": name, "site": kind}
        system = from_atoms(atoms, f"{name} on {bulk.name}({miller}) {kind}, start {start}")
        if shortest_contact(system) < config.min_contact:
            dropped[SHORT] += 1
            return None
        return Frame(system, made)

    def _slab(self, number: int, facet: Miller) -> tuple[Atoms, list[Site]]:
        if (number, facet) not in self.slabs:
            config = self.config
            made = slab(
                self.bulks[number], facet, min_lateral=config.min_lateral, min_thickness=config.min_thickness,
                vacuum=config.vacuum, free_depth=config.free_depth,
            )  # fmt: skip
            sites = find_sites(made) if len(made) <= config.max_atoms else []
            self.slabs[number, facet] = made, sites
        return self.slabs[number, facet]
