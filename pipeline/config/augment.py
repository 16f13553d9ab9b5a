"""Settings of `kd augment`: one class a method; `cache` holds the store, the teacher and its signals."""

from typing import Annotated, Literal

from pydantic import Field

from molkd.pipeline.config.base import Settings
from molkd.pipeline.config.stage_one import CacheConfig
from molkd.pipeline.places import Place

Move = Literal["rattle", "bond", "torsion"]
_FAR = 5.0  # A; displacements beyond leave no structure, only atoms


class AugmentConfig(Settings):
    """What all methods share; lengths in Angstrom, energies in eV, forces in eV/A."""

    cache: CacheConfig  # the new store, the teacher, and which of its signals are kept
    n: int | None = Field(None, ge=1)  # structures to start from or to make; None: see the method
    seed: int = Field(0, ge=0)
    min_contact: float = Field(0.6, ge=0)  # shortest distance allowed, as a share of the covalent radii's sum
    max_force: float = Field(50.0, gt=0)  # largest norm of the teacher's force on a free atom
    # Near duplicates: no atom farther displaced, and energies within min_energy_difference an atom; 0: kept.
    min_displacement: float = Field(0.0, ge=0)
    min_energy_difference: float = Field(1e-3, ge=0)  # eV/atom


class RattleConfig(AugmentConfig):
    """`kd augment rattle`: every system of `data`, `copies` times with each sigma."""

    data: Place
    sigma: tuple[Annotated[float, Field(gt=0, le=_FAR)], ...] = Field(
        (0.05,), min_length=1
    )  # A, along x, y and z
    copies: int = Field(1, ge=1)  # of each system with each sigma; `n` says instead how many in all
    move_fixed: bool = False


class AdversarialConfig(AugmentConfig):
    """`kd augment adversarial`: gradient ascent on the discrepancy of student and teacher."""

    data: Place
    student: str  # run folder or model file
    steps: int = Field(10, ge=1)
    step_size: float = Field(0.02, gt=0, le=_FAR)  # A, of the atom that moves most
    max_displacement: float = Field(0.1, gt=0, le=_FAR)  # A, of any atom from where it was in `data`
    jitter: float = Field(0.02, ge=0, le=_FAR)  # A, standard deviation of the random start
    energy_weight: float = Field(1.0, ge=0)
    forces_weight: float = Field(0.0, ge=0)
    move_fixed: bool = False
    min_displacement: float = Field(0.01, ge=0)


class RelaxConfig(AugmentConfig):
    """A relaxation with the teacher, and what of it is kept."""

    relax_steps: int = Field(50, ge=0)
    fmax: float = Field(0.05, gt=0)  # eV/A; relaxed where no free atom feels more
    frames: int = Field(5, ge=1)  # of a trajectory, evenly over its steps, first and last among them
    min_displacement: float = Field(0.05, ge=0)


class SurfacesConfig(RelaxConfig):
    """`kd augment surfaces`: adsorbates on slabs, put together at random; `n` starts, 100 if None."""

    bulks: tuple[str, ...] = ()  # Cu, Cu3Au, CuZn or a file; () takes the metals that the teacher knows
    facets: tuple[str, ...] = ()  # Miller indices, 111 or 1,0,-1; () takes low ones of the lattice
    adsorbates: tuple[str, ...] = (
        "H",
        "O",
        "OH",
        "CO",
        "N",
        "NH",
        "NNH",
    )  # those the teacher knows, or a file
    sites: tuple[Literal["ontop", "bridge", "fcc", "hcp", "hollow"], ...] = ()  # () takes all that there are
    min_lateral: float = Field(8.0, gt=0)  # A between an adsorbate's images, along the surface
    min_thickness: float = Field(7.0, gt=0)  # A, of the slab
    vacuum: float = Field(20.0, gt=0)  # A, between slabs
    free_depth: float = Field(3.0, gt=0)  # A; what lies this far below the top atom relaxes and has tag 1
    max_atoms: int = Field(200, ge=2)  # larger slabs are left out
    relax_steps: int = Field(100, ge=0)


class MoleculesConfig(RelaxConfig):
    """`kd augment molecules`: displaced molecules of `data`, relaxed a little, or moved at a temperature."""

    data: Place
    moves: tuple[Move, ...] = Field(("rattle", "bond", "torsion"), min_length=1)  # one of them each start
    sigma: float = Field(0.1, gt=0, le=_FAR)  # A, of rattle
    stretch: float = Field(0.15, gt=0, le=_FAR)  # A, standard deviation of a bond's change
    max_angle: float = Field(60.0, gt=0, le=180)  # degrees, largest turn around a bond
    relax_steps: int = Field(20, ge=0)
    temperature: float | None = Field(None, gt=0)  # K; Langevin dynamics in place of the relaxation
    md_steps: int = Field(200, ge=1)
    timestep: float = Field(0.5, gt=0)  # fs
