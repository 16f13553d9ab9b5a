"""`kd augment`: new structures that a teacher labels, as ordinary stores."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from molkd.pipeline.commands.output import NEW_STORE, STORE, WORDS, as_json, given, show
from molkd.pipeline.commands.plan import asks_signals

if TYPE_CHECKING:
    from molkd.pipeline.config.augment import AugmentConfig

Config = TypeVar("Config", bound="AugmentConfig")
SITES = ("ontop", "bridge", "fcc", "hcp", "hollow")
MOVES = ("rattle", "bond", "torsion")
_OF_TEACHER = (
    "teacher", "scale_file", "signals", "name", "encoding", "max_error", "batch_atoms", "batch_edges",
    "device", "precision",
)  # fmt: skip
_SIFTING = (
    click.option("--seed", type=int, help="Of everything drawn at random; default 0."),
    click.option(
        "--min-contact",
        type=float,
        help="Drop what has atoms nearer than this share of their radii's sum.",
    ),
    click.option("--max-force", type=float, help="Drop what the teacher gives larger forces for (eV/A)."),
    click.option(
        "--min-displacement",
        type=float,
        help="Drop what lies within this of another structure (A).",
    ),
    click.option(
        "--min-energy-difference",
        type=float,
        help="... and whose energy is no farther from its (eV/atom); default 0.001.",
    ),
)
_RELAXING = (
    click.option("--relax-steps", type=int, help="Most steps of a relaxation with the teacher."),
    click.option("--fmax", type=float, help="Relaxed where no force is larger (eV/A)."),
    click.option("--frames", type=int, help="Structures kept of each trajectory."),
)
_FIXED = click.option("--move-fixed", is_flag=True, default=None, help="Displace fixed atoms, too.")


def _adds(options: tuple[Callable[..., Any], ...]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def add(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


sifts, relaxes = _adds(_SIFTING), _adds(_RELAXING)


def _config(kind: type[Config], out: Path, flags: dict[str, Any]) -> Config:
    """Return a method's settings, those of the teacher inside."""
    from molkd.pipeline.commands.plan import teacher_config
    from molkd.pipeline.config import make_config

    of_teacher = {key: flags.pop(key) for key in _OF_TEACHER}
    return make_config(kind, given(flags) | {"cache": teacher_config(out, of_teacher)})


@click.group()
def augment() -> None:
    """Make new structures, have a teacher label them, and keep both in a store.

    Such a store is like any other one of systems without labels: merge it with labelled data, or train from
    it with --pseudo-labels or --kd. Start from training data only: what is near a test system spoils the
    test.
    """


@augment.command()
@click.argument("data", type=STORE)
@click.argument("out", type=NEW_STORE)
@asks_signals
@click.option(
    "--sigma", type=float, multiple=True, help="Standard deviation along each axis (A); repeatable."
)
@click.option("--copies", type=int, help="Of each system, with each sigma.")
@click.option("--n", type=int, help="How many in all, of systems drawn at random; default all, times copies.")
@_FIXED
@sifts
@as_json
def rattle(as_json: bool, data: str | Path, out: Path, **flags: Any) -> None:
    """Displace the atoms of DATA by normally distributed noise.

    \b
    Example:
      kd augment rattle coll.kdcache rattled.kdcache --teacher runs/teacher --sigma 0.05 --sigma 0.1
    """
    from molkd.pipeline.augment.run import augment_rattle
    from molkd.pipeline.config.augment import RattleConfig

    show(augment_rattle(_config(RattleConfig, out, flags | {"data": data})), as_json)


@augment.command()
@click.argument("data", type=STORE)
@click.argument("out", type=NEW_STORE)
@asks_signals
@click.option("--student", required=True, type=WORDS, help="Run folder or model file that is to be fooled.")
@click.option("--n", type=int, help="Systems to start from, drawn at random. Default: all.")
@click.option("--steps", type=int, help="Of gradient ascent.")
@click.option("--step-size", type=float, help="Of the atom that moves most (A).")
@click.option("--max-displacement", type=float, help="Of any atom from its place in DATA (A).")
@click.option("--jitter", type=float, help="Standard deviation of the random start (A).")
@click.option("--energy-weight", type=float, help="Of the squared difference of energies an atom.")
@click.option("--forces-weight", type=float, help="Of the mean squared difference of forces.")
@_FIXED
@sifts
@as_json
def adversarial(as_json: bool, data: str | Path, out: Path, **flags: Any) -> None:
    """Displace the atoms of DATA to where student and teacher are farthest apart.

    The objective is energy-weight x (dE/N)^2 + forces-weight x mean |dF|^2 in eV and eV/A; by default of
    energies alone. Of each ascent the structure with the largest value is kept.

    \b
    Example:
      kd augment adversarial coll.kdcache hard.kdcache --teacher runs/teacher --student runs/kd --n 1000
    """
    from molkd.pipeline.augment.run import augment_adversarial
    from molkd.pipeline.config.augment import AdversarialConfig

    show(augment_adversarial(_config(AdversarialConfig, out, flags | {"data": data})), as_json)


@augment.command()
@click.argument("out", type=NEW_STORE)
@asks_signals
@click.option("--n", type=int, help="Adsorbates on slabs to put together; default 100.")
@click.option(
    "--bulk",
    "bulks",
    multiple=True,
    type=WORDS,
    help="Cu, Cu3Au (A3B), CuZn (AB), or a file; repeatable.",
)
@click.option(
    "--facet", "facets", multiple=True, type=WORDS, help="Miller indices: 111, or 1,0,-1; repeatable."
)
@click.option(
    "--adsorbate",
    "adsorbates",
    multiple=True,
    type=WORDS,
    help="CO, NNH, CH3OH:O (O binds), or a file; repeatable.",
)
@click.option(
    "--site",
    "sites",
    multiple=True,
    type=click.Choice(SITES),
    help="Repeatable; default all.",
)
@click.option("--min-lateral", type=float, help="Distance of an adsorbate's images, at least (A).")
@click.option("--min-thickness", type=float, help="Of the slab: layers times their spacing, at least (A).")
@click.option("--vacuum", type=float, help="Between slabs (A).")
@click.option("--free-depth", type=float, help="Atoms this far below the topmost one are free, tag 1 (A).")
@click.option("--max-atoms", type=int, help="Larger slabs are left out.")
@relaxes
@sifts
@as_json
def surfaces(as_json: bool, out: Path, **flags: Any) -> None:
    """Put adsorbates on slabs, relax them with the teacher, and keep frames of the relaxations.

    Crystal, facet, adsorbate and site are drawn at random from those named, by default from the metals and
    small adsorbates that the teacher knows. Slabs are as in OC20: tags 0 and 1, adsorbate 2, tag 0 fixed.

    \b
    Example:
      kd augment surfaces slabs.kdcache --teacher gemnet_oc.pt --bulk Cu --bulk Cu3Pd --adsorbate CO --n 1000
    """
    from molkd.pipeline.augment.run import augment_surfaces
    from molkd.pipeline.config.augment import SurfacesConfig

    show(augment_surfaces(_config(SurfacesConfig, out, flags)), as_json)


@augment.command()
@click.argument("data", type=STORE)
@click.argument("out", type=NEW_STORE)
@asks_signals
@click.option("--n", type=int, help="Molecules to displace, drawn at random. Default: each once.")
@click.option(
    "--move",
    "moves",
    multiple=True,
    type=click.Choice(MOVES),
    help="Repeatable: one is drawn each time.",
)
@click.option("--sigma", type=float, help="Of rattle (A).")
@click.option("--stretch", type=float, help="Standard deviation of a bond's change (A).")
@click.option("--max-angle", type=float, help="Largest turn around a bond (degrees).")
@relaxes
@click.option("--temperature", type=float, help="Langevin dynamics at so many K, in place of the relaxation.")
@click.option("--md-steps", type=int, help="Of the dynamics.")
@click.option("--timestep", type=float, help="Of the dynamics (fs).")
@sifts
@as_json
def molecules(as_json: bool, data: str | Path, out: Path, **flags: Any) -> None:
    """Displace molecules of DATA, relax them a little with the teacher, and keep frames on the way.

    \b
    Example:
      kd augment molecules coll.kdcache more.kdcache --teacher runs/teacher --n 500 --frames 4
      kd augment molecules coll.kdcache hot.kdcache --teacher runs/teacher --temperature 600 --md-steps 400
    """
    from molkd.pipeline.augment.run import augment_molecules
    from molkd.pipeline.config.augment import MoleculesConfig

    show(augment_molecules(_config(MoleculesConfig, out, flags | {"data": data})), as_json)
