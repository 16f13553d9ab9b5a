"""The command line: parse, call one function of the library, print its summary."""

import logging
import sys
import traceback
from pathlib import Path
from typing import Any

import click

from molkd.cache_schema.errors import MolkdError
from molkd.pipeline.allocator import keep_freed_memory
from molkd.pipeline.commands.augment import augment
from molkd.pipeline.commands.cka import cka
from molkd.pipeline.commands.evaluation import evaluate, report
from molkd.pipeline.commands.output import NEW_PATH, NEW_STORE, PATH, STORE, as_json, given, show
from molkd.pipeline.commands.plan import asks_teacher, plan, scale_file, teacher_config
from molkd.pipeline.commands.repair import repair
from molkd.pipeline.commands.sharing import COMMANDS
from molkd.pipeline.commands.study import study
from molkd.pipeline.commands.training import train_student


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--debug", is_flag=True, help="Show tracebacks and debug messages.")
@click.option("--quiet", is_flag=True, help="Only warnings and errors on stderr.")
@click.version_option(package_name="molkd")
def kd(debug: bool, quiet: bool) -> None:
    """Make a fast interatomic potential out of an accurate one.

    A teacher's signals are cached once; students are trained from the cache, without the teacher.
    Units are eV, Angstrom and eV/A. Start with: kd demo
    """
    keep_freed_memory()
    shown = logging.StreamHandler(sys.stderr)
    shown.setLevel(logging.WARNING if quiet else logging.NOTSET)  # a run's log.txt holds everything
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[shown])
    logging.getLogger("molkd").setLevel(logging.DEBUG if debug else logging.INFO)


@kd.command()
@click.argument("data", nargs=-1, type=STORE)
@click.argument("store", type=NEW_STORE)
@click.option(
    "--drop-labels", multiple=True, type=STORE, metavar="DATA", help="More structures, without their labels."
)
@click.option("--energy-key", help="Name of the energy in the files (eV).")
@click.option("--forces-key", help="Name of the forces in the files (eV/A).")
@click.option("--require-labels", is_flag=True, help="Refuse systems without an energy.")
@click.option("--on-conflict", type=click.Choice(["error", "first"]), help="Same system, other labels.")
@click.option("--seed", type=int, help="Of the order on disk.")
@click.option("--shard-atoms", type=int, help="Atom rows a shard (multiple of 1024).")
@click.option("--licence", help="Of the data; kept in the store.")
@click.option("--citation", help="Of the data; kept in the store.")
@as_json
def ingest(as_json: bool, **flags: Any) -> None:
    """Put structures and labels of DATA... into STORE, without a teacher.

    DATA are extxyz files (.xz, .gz, .zst too), anything ase.io reads, ASE databases, OC20 LMDBs or folders of
    them, .aselmdb files, COLL's npz, or other stores. A missing label stays missing.

    \b
    Example:
      kd ingest train.extxyz coll.kdcache
      kd ingest labelled.extxyz coll.kdcache --drop-labels pool.extxyz
    """
    from molkd.pipeline.config import IngestConfig, make_config
    from molkd.pipeline.ingest import ingest as run

    show(run(make_config(IngestConfig, given(flags))), as_json)


@kd.command("cache-teacher")
@click.argument("data", type=STORE)
@click.argument("store", type=NEW_STORE, required=False)
@asks_teacher
@click.option("--skip-bad", is_flag=True, default=None, help="Quarantine systems with non-finite output.")
@click.option(
    "--workers", type=int, metavar="N", help="Processes on this machine, one teacher and device each."
)
@click.option("--scheduler", metavar="ADDRESS", help="A Dask scheduler whose workers do the work.")
@click.option("--worker", metavar="I/N", help="As job I of an array of N, counted from 0: every N-th shard.")
@click.option("--dry-run", is_flag=True, help="Price disk and time, as kd cache plan does; store nothing.")
@as_json
def cache_teacher(
    as_json: bool,
    data: str | Path,
    store: Path | None,
    energy_key: str | None,
    forces_key: str | None,
    dry_run: bool,
    **flags: Any,
) -> None:
    """Run the teacher once over DATA and keep its signals in STORE.

    DATA is a store of structures (then STORE may be left out: the signals are added to it) or anything that
    `kd ingest` takes. The same command continues after an interruption; other --signals add to the store.

    \b
    Example:
      kd cache-teacher coll.kdcache --teacher painn.safetensors --signals energy,forces,node,v2v
      kd cache-teacher train.extxyz coll.kdcache --teacher sevennet-0 --dry-run
    """
    from molkd.cache_schema.remote import writable_root
    from molkd.pipeline.caching import cache_teacher as run
    from molkd.pipeline.planning import plan_teacher

    config = teacher_config(store or writable_root(data), flags)
    act = plan_teacher if dry_run else run
    show(act(config, data, energy_key=energy_key, forces_key=forces_key), as_json)


@kd.group()
def cache() -> None:
    """Look into a store, check it, and share it."""


for command in (plan, repair, *COMMANDS):
    cache.add_command(command)


@cache.command("info")
@click.argument("store", type=STORE)
@as_json
def cache_info(as_json: bool, store: str | Path) -> None:
    """Show what is inside STORE: systems, teachers, signals, encodings, sizes, provenance.

    \b
    Example:
      kd cache info coll.kdcache
    """
    from molkd.cache_schema.manifest import info
    from molkd.cache_schema.summary import describe_info

    show(info(store), as_json, describe_info)


@cache.command("verify")
@click.argument("store", type=STORE)
@click.option("--quick", is_flag=True, help="Presence and sizes only, no checksums.")
@click.option("--deep", is_flag=True, help="Also values: do atoms and edges of a sample add up?")
@click.option("--teacher", help="With --deep: compute the sample again with this teacher.")
@scale_file
@click.option("--systems", "n_systems", type=click.IntRange(min=1), default=32, help="Of the sample.")
@click.option("--device", default="auto", show_default=True, help="Of the teacher.")
@as_json
def cache_verify(as_json: bool, store: str | Path, quick: bool, deep: bool, **flags: Any) -> None:
    """Check every byte of STORE against its checksums; exit code 3 if something is wrong.

    \b
    Example:
      kd cache verify coll.kdcache
      kd cache verify coll.kdcache --deep --teacher painn.safetensors
    """
    if (deep and quick) or (flags["teacher"] and not deep):
        raise click.UsageError("--teacher goes with --deep, and --deep not with --quick")
    from molkd.cache_schema.summary import describe_report
    from molkd.cache_schema.verify import verify
    from molkd.pipeline.progress import Progress

    report: Any
    with Progress(0, "verify", "byte") as progress:
        if deep:
            from molkd.pipeline.deep_verify import deep_verify

            report = deep_verify(store, **flags, progress=progress.advance_to)
        else:
            report = verify(store, quick=quick, progress=progress.advance_to)
    show(report, as_json, None if deep else describe_report)
    if not report.ok:
        sys.exit(3)


@kd.group()
def teacher() -> None:
    """Look at a teacher."""


@teacher.command("info")
@click.argument("teacher")
@scale_file
@as_json
def teacher_info(as_json: bool, teacher: str, scale_file: Path | None) -> None:
    """Show what TEACHER is and gives: architecture, weights, cutoffs, normalisation, elements, signals.

    TEACHER is a model file, a run folder, an OCP or fairchem v1 checkpoint, or a name (see kd doctor).

    \b
    Example:
      kd teacher info gemnet_oc_base_s2ef_2M.pt
    """
    from molkd.pipeline.teachers.describe import describe_teacher

    show(describe_teacher(teacher, scale_file=scale_file), as_json)


for command in (train_student, study, augment, evaluate, report, cka):
    kd.add_command(command)


@kd.command()
@click.argument("folder", type=PATH, default=Path())
@as_json
def doctor(as_json: bool, folder: Path) -> None:
    """Show versions, devices, teachers that can be used, and rights on a cache FOLDER.

    \b
    Example:
      kd doctor /data/caches
    """
    from molkd.pipeline.doctor import diagnose

    show(diagnose(folder), as_json)


@kd.command()
@click.option(
    "--out", type=NEW_PATH, default=Path("kd-demo"), show_default=True, help="Folder for everything."
)
@as_json
def demo(as_json: bool, out: Path) -> None:
    """Run both stages on bundled molecules in under three minutes and write a report.

    \b
    Example:
      kd demo --out kd-demo
    """
    from molkd.pipeline.demo.run import run_demo

    show(run_demo(out), as_json)


def main() -> None:
    """Entry point of the scripts `kd` and `molkd`: one line for a user's error, no traceback."""
    try:
        kd(prog_name="kd", standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; the same command continues", err=True)
        sys.exit(130)
    except Exception as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        elif not isinstance(error, MolkdError | OSError):
            found = f"{type(error).__name__}: {error}"
            click.echo(f"unexpected {found}; run again with kd --debug and report it", err=True)
            sys.exit(1)
        remedy = "; check the path, its rights and the free space" if isinstance(error, OSError) else ""
        click.echo(f"error: {error}{remedy}", err=True)
        sys.exit(error.exit_code if isinstance(error, MolkdError) else 1)


if __name__ == "__main__":
    main()
