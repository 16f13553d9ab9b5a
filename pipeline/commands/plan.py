"""`kd cache plan`: sizes, hours, and what fits a budget."""

from pathlib import Path
from typing import Any

import click

from molkd.pipeline.commands.output import NEW_STORE, PATH, STORE, as_json, given, show


@click.command("plan")
@click.argument("data", type=STORE)
@click.argument("store", type=NEW_STORE, required=False)
@click.option("--teacher", required=True, help="As kd cache-teacher takes it.")
@click.option("--scale-file", type=PATH, help="Scale factors, for an OCP checkpoint that holds none.")
@click.option("--signals", help="Comma-separated, or all; default energy,forces,atomic_energies,node.")
@click.option("--encoding", multiple=True, metavar="[SIGNAL=]ENCODING", help="As kd cache-teacher takes it.")
@click.option("--max-error", type=float, help="Take the smallest encoding within this relative rms error.")
@click.option("--budget", metavar="SIZE", help="What the store may take (500GB): propose what to store.")
@click.option("--device", help="auto, cpu, cuda, cuda:1.")
@click.option("--precision", type=click.Choice(["float32", "float64"]), help="Of the teacher's forward.")
@as_json
def plan(as_json: bool, data: str | Path, store: Path | None, budget: str | None, **flags: Any) -> None:
    """Price stage one from a short probe: bytes an atom and in all, in each encoding, and hours.

    Nothing is written. STORE is where the signals would go, its disk is looked at.

    \b
    Example:
      kd cache plan oc20_lmdb/ big.kdcache --teacher gemnet_oc.pt --signals node,e2n,v2v --budget 500GB
    """
    from molkd.cache_schema.remote import writable_root
    from molkd.pipeline.config import CacheConfig, make_config
    from molkd.pipeline.planning import parse_bytes, plan_teacher

    if flags.get("signals"):
        flags["signals"] = [s.strip() for s in flags["signals"].split(",") if s.strip()]
    config = make_config(CacheConfig, given(flags | {"store": store or writable_root(data)}))
    show(plan_teacher(config, data, budget=parse_bytes(budget) if budget else None), as_json)
