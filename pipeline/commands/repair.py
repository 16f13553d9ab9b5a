"""`kd cache repair`: what is broken in a store, whole again."""

import sys
from pathlib import Path
from typing import Any

import click

from molkd.pipeline.commands.output import NEW_STORE, PATH, STORE, as_json, given, show


@click.command("repair")
@click.argument("store", type=NEW_STORE)
@click.option("--from", "copy", type=STORE, help="An intact copy of STORE: folder or URL.")
@click.option("--teacher", help="Computes signals again: the model that STORE was made with.")
@click.option("--data", multiple=True, type=STORE, help="What STORE was made of, for structures and labels.")
@click.option("--energy-key", help="Name of the energy in the files of --data (eV).")
@click.option("--forces-key", help="Name of the forces in the files of --data (eV/A).")
@click.option("--scale-file", type=PATH, help="Scale factors, for an OCP checkpoint that holds none.")
@click.option("--batch-atoms", type=click.IntRange(min=0), help="As kd cache-teacher had it.")
@click.option("--batch-edges", type=click.IntRange(min=0), help="As kd cache-teacher had it.")
@click.option("--device", help="Of the teacher: auto, cpu, cuda, cuda:1.")
@click.option("--skip-bad", is_flag=True, default=None, help="Quarantine systems with non-finite output.")
@click.option(
    "--accept-other-values",
    is_flag=True,
    default=None,
    help="Where the teacher gives other values than were stored, write the whole shard anew with these.",
)
@click.option("--dry-run", is_flag=True, help="Only say what is broken and what would mend it.")
@as_json
def repair(as_json: bool, store: Path, dry_run: bool, **flags: Any) -> None:
    """Find every broken or missing shard of STORE and put exactly these back; nothing intact is touched.

    A file is taken from a copy if its checksum is the recorded one; signals are computed again by the
    teacher, structures read again from the data they came from. A shard whose other values a record
    contradicts is left as it is. The same command continues after an interruption. Exit code 3 if something
    is still broken, or in a dry run would be.

    \b
    Example:
      kd cache repair oc20.kdcache --from /backup/oc20.kdcache
      kd cache repair coll.kdcache --teacher painn.safetensors --data train.extxyz --dry-run
    """
    from molkd.pipeline.repairing import repair_store

    summary = repair_store(store, dry_run=dry_run, **given(flags))
    show(summary, as_json)
    if not summary.ok:
        sys.exit(3)
