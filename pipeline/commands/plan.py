"""`kd cache plan`: sizes, hours, and what fits a budget; and what is said of a teacher in stage one."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from molkd.pipeline.commands.output import NEW_STORE, PATH, STORE, as_json, given, show

if TYPE_CHECKING:
    from molkd.pipeline.config import CacheConfig

scale_file = click.option(
    "--scale-file", type=PATH, help="Scale factors (JSON or .pt), for an OCP checkpoint that holds none."
)
_LABELS = (
    click.option("--energy-key", help="Name of the energy in DATA (eV), kept as label."),
    click.option("--forces-key", help="Name of the forces in DATA (eV/A), kept as label."),
)
_OPTIONS = (
    click.option(
        "--teacher", required=True, help="Model file, run folder, OCP checkpoint, or a name (see kd doctor)."
    ),
    scale_file,
    click.option("--signals", help="Comma-separated, or all; default energy,forces,atomic_energies,node."),
    click.option("--name", help="Of the teacher's group in the store."),
    click.option(
        "--encoding",
        multiple=True,
        metavar="[SIGNAL=]ENCODING",
        help="Of features: fp32, fp16 (default below 4,096 atoms), int8 (default) or pca:BYTES; repeatable.",
    ),
    click.option(
        "--max-error", type=float, help="Take the smallest encoding within this relative rms error."
    ),
    click.option("--batch-atoms", type=int, help="Atoms a batch; default by device."),
    click.option("--batch-edges", type=int, help="Edges a batch; default by device."),
    click.option("--device", help="auto, cpu, cuda, cuda:1."),
    click.option("--precision", type=click.Choice(["float32", "float64"]), help="Of the teacher's forward."),
)


def asks_signals(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say what a teacher is asked for, and where it runs."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def asks_teacher(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of `asks_signals`, and those that say which labels of the data are kept."""
    for option in reversed(_LABELS):
        command = option(command)
    return asks_signals(command)


def teacher_config(store: Path, flags: dict[str, Any]) -> "CacheConfig":
    """Return the settings of stage one that the flags stand for."""
    from molkd.pipeline.config import CacheConfig, make_config

    if flags.get("signals"):
        flags = flags | {"signals": [s.strip() for s in flags["signals"].split(",") if s.strip()]}
    return make_config(CacheConfig, given(flags | {"store": store}))


@click.command("plan")
@click.argument("data", type=STORE)
@click.argument("store", type=NEW_STORE, required=False)
@asks_teacher
@click.option("--budget", metavar="SIZE", help="What the store may take (500GB): propose what to store.")
@as_json
def plan(
    as_json: bool,
    data: str | Path,
    store: Path | None,
    energy_key: str | None,
    forces_key: str | None,
    budget: str | None,
    **flags: Any,
) -> None:
    """Price stage one from a short probe: bytes an atom and in all, in each encoding, and hours.

    STORE is where the signals would go: its disk is looked at, and what it holds already is not priced again.
    Left out, it is DATA, or if that is no store, a new one in the current folder. Nothing is stored; a file
    of 32 MB beside STORE, which is removed again, shows how fast the disk is.

    \b
    Example:
      kd cache plan oc20_lmdb/ big.kdcache --teacher gemnet_oc.pt --signals node,e2n,v2v --budget 500GB
    """
    from molkd.pipeline.planning import parse_bytes, plan_teacher, usual_store

    config = teacher_config(store or usual_store(data), flags)
    n_bytes = parse_bytes(budget) if budget else None
    show(plan_teacher(config, data, energy_key=energy_key, forces_key=forces_key, budget=n_bytes), as_json)
