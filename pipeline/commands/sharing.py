"""`kd cache ...`: stores as a shared asset; each command calls one function of `pipeline.sharing`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click

from molkd.pipeline.commands.output import NEW_PATH, NEW_STORE, PATH, STORE, WORDS, as_json, given, show

_CONDITIONS = (
    click.option("--systems", type=PATH, help="File of ids, as kd cache select writes it."),
    click.option("--elements", type=WORDS, metavar="Pt,C,O", help="Nothing but these elements."),
    click.option("--contains", type=WORDS, metavar="C,O", help="All of these elements."),
    click.option(
        "--formula", type=WORDS, metavar="PATTERN", help="Hill formula: C2H6O, or a pattern such as '*O2'."
    ),
    click.option("--adsorbate", type=WORDS, metavar="PATTERN", help="Hill formula of the atoms with tag 2."),
    click.option("--min-atoms", type=click.IntRange(min=1), help="Size at least."),
    click.option("--max-atoms", type=click.IntRange(min=1), help="Size at most."),
    click.option("--periodic/--not-periodic", default=None, help="Along any axis, or along none."),
    click.option(
        "--source", type=WORDS, metavar="PATTERN", help="Name of the source, as kd cache info shows it."
    ),
    click.option("--with-energy/--without-energy", "has_energy", default=None, help="Label known, or not."),
    click.option("--random", type=click.IntRange(min=1), help="So many of these, chosen at random."),
    click.option("--seed", type=click.IntRange(min=0), help="Of --random; default 0."),
)
_signals = click.option(
    "--signals", type=WORDS, help="Comma-separated; default all. none: structures and labels only."
)
_encoding = click.option(
    "--encoding",
    type=WORDS,
    multiple=True,
    metavar="[SIGNAL=]ENCODING",
    help="Encode features anew, narrower: fp16, int8 or pca:BYTES a row; may be repeated.",
)


def conditions(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that choose systems."""
    for option in reversed(_CONDITIONS):
        command = option(command)
    return command


@click.command("copy")
@click.argument("source_store", metavar="SRC", type=STORE)
@click.argument("target", metavar="DST", type=STORE)
@_signals
@click.option("--teacher", type=WORDS, help="Only this teacher's signals.")
@_encoding
@conditions
@as_json
def copy(
    as_json: bool,
    source_store: str | Path,
    target: str | Path,
    signals: str | None,
    teacher: str | None,
    encoding: tuple[str, ...],
    **flags: Any,
) -> None:
    """Copy the store SRC, or a part of it, to DST; every checksum is checked on the way.

    SRC and DST are folders or URLs; to a URL (s3://, gs://, az://) goes a whole, finished store.
    Structures and labels always come along. Rows that are not encoded anew go over as they are stored.
    The same command continues after an interruption; a later one may add signals.

    \b
    Example:
      kd cache copy /shared/oc20.kdcache oc20.kdcache
      kd cache copy oc20.kdcache co.kdcache --signals node --adsorbate CO --encoding node=int8
    """
    from molkd.pipeline.sharing.copying import copy_store, send_store

    if isinstance(target, str):
        if signals or teacher or encoding or given(flags):
            raise click.UsageError(
                "to a URL goes a whole store; make the part in a folder, then copy that one"
            )
        show(send_store(source_store, target), as_json)
        return
    summary = copy_store(
        source_store,
        target,
        teacher=teacher,
        signals=_words(signals),
        selection=_selection(flags),
        encoding=encoding,
    )
    show(summary, as_json)


@click.command("select")
@click.argument("store", type=STORE)
@click.argument("out", type=NEW_PATH)
@conditions
@as_json
def select(as_json: bool, store: str | Path, out: Path, **flags: Any) -> None:
    """Write the ids of those systems of STORE that fulfil every condition to the text file OUT.

    kd cache copy takes the file with --systems, and the conditions themselves.

    \b
    Example:
      kd cache select oc20.kdcache co.txt --adsorbate CO --max-atoms 100
      kd cache select oc20.kdcache some.txt --systems co.txt --random 1000 --seed 1
    """
    from molkd.pipeline.sharing.selection import select_systems

    show(select_systems(store, out, _selection(flags)), as_json)


@click.command("merge")
@click.argument("stores", nargs=-1, required=True, type=STORE)
@click.argument("out", type=NEW_STORE)
@_signals
@click.option("--teacher", type=WORDS, help="Only this teacher's signals.")
@_encoding
@click.option(
    "--on-conflict",
    type=click.Choice(["error", "first"]),
    default="error",
    show_default=True,
    help="Same system, other labels.",
)
@as_json
def merge(
    as_json: bool, stores: tuple[str | Path, ...], out: Path, signals: str | None, **flags: Any
) -> None:
    """Put the systems of STORES into one new store, with the signals that all of them have.

    A system that several stores hold is taken once. Teachers are the same if their weights are.
    The same command continues after an interruption.

    \b
    Example:
      kd cache merge anna.kdcache ben.kdcache oc20.kdcache
      kd cache merge oc20.kdcache coll.kdcache both.kdcache --signals energy,forces,node
    """
    from molkd.pipeline.sharing.merging import merge_stores

    show(merge_stores(stores, out, signals=_words(signals), **flags), as_json)


@click.command("add")
@click.argument("store", type=STORE)
@click.argument("data", type=STORE)
@click.argument("out", type=NEW_STORE)
@click.option("--teacher", help="The teacher of STORE: model file, run folder, checkpoint or name.")
@click.option("--name", help="Of the teacher in STORE, if there are several.")
@click.option("--scale-file", type=PATH, help="Scale factors, for an OCP checkpoint that holds none.")
@click.option("--device", help="auto, cpu, cuda, cuda:1.")
@click.option("--skip-bad", is_flag=True, default=None, help="Quarantine systems with non-finite output.")
@click.option("--energy-key", help="Name of the energy in DATA (eV).")
@click.option("--forces-key", help="Name of the forces in DATA (eV/A).")
@click.option(
    "--on-conflict",
    type=click.Choice(["error", "first"]),
    default="error",
    show_default=True,
    help="Same system, other labels.",
)
@as_json
def add(
    as_json: bool,
    store: str | Path,
    data: str | Path,
    out: Path,
    teacher: str | None,
    name: str | None,
    on_conflict: Literal["error", "first"],
    energy_key: str | None,
    forces_key: str | None,
    **running: Any,
) -> None:
    """Write to OUT a store with the systems of STORE and those of DATA.

    The teacher runs over the new systems only, with the signals and encodings of STORE. More signals, or
    another teacher, need no new store: kd cache-teacher STORE adds them.

    \b
    Example:
      kd cache add coll.kdcache more.extxyz larger.kdcache --teacher painn.safetensors
    """
    from molkd.pipeline.sharing.adding import add_systems

    reading = given({"energy_key": energy_key, "forces_key": forces_key, "on_conflict": on_conflict})
    summary = add_systems(
        store,
        data,
        out,
        teacher=teacher,
        name=name,
        on_conflict=on_conflict,
        reading=reading,
        running=given(running),
    )
    show(summary, as_json)


@click.command("overlay")
@click.argument("shared", type=STORE)
@click.argument("mine", type=NEW_STORE)
@as_json
def overlay(as_json: bool, shared: str | Path, mine: Path) -> None:
    """Make the store MINE for signals of your own over SHARED, which is only ever read.

    kd cache-teacher MINE adds signals to MINE; everything else is read from SHARED, a folder or a URL. If
    SHARED has moved, the same command with its new place mends MINE. kd cache copy MINE makes it whole.

    \b
    Example:
      kd cache overlay /shared/oc20.kdcache mine.kdcache
    """
    from molkd.cache_schema.overlay import create_overlay

    show({"store": str(create_overlay(shared, mine)), "overlay_of": str(shared)}, as_json)


@click.command("card")
@click.argument("store", type=STORE)
@click.option("--out", type=NEW_PATH, help="Markdown file to write; default: print it.")
@as_json
def card(as_json: bool, store: str | Path, out: Path | None) -> None:
    """Describe STORE in Markdown: systems, labels, teachers, signals and their errors, licence, use.

    \b
    Example:
      kd cache card oc20.kdcache --out oc20.md
    """
    from molkd.pipeline.sharing.card import describe_store, store_card, write_card

    facts = describe_store(store)
    if out is not None:
        write_card(facts, out)
    show({"card": str(out)} if out is not None else facts, as_json, None if out is not None else store_card)


@click.command("ls")
@click.argument("root", type=STORE, default=Path())
@as_json
def ls(as_json: bool, root: str | Path) -> None:
    """List the stores in ROOT and below: systems, size, teachers, signals, health.

    ROOT is a folder, or a bucket or a prefix of one (s3://BUCKET/caches).

    \b
    Example:
      kd cache ls /shared/caches
    """
    from molkd.pipeline.sharing.listing import list_stores

    show(list_stores(root), as_json)


@click.command("export")
@click.argument("store", type=STORE)
@click.argument("out", type=NEW_PATH)
@click.option(
    "--format",
    "form",
    type=click.Choice(["npz", "extxyz", "zarr", "zip", "tar"]),
    help="Of OUT; default by its suffix.",
)
@click.option(
    "--archive", is_flag=True, help="A compressed Zarr archive: --format zarr unless OUT says zip or tar."
)
@click.option(
    "--compressor",
    help="Of an archive: blosc:CNAME:LEVEL, zstd:LEVEL, gzip:LEVEL or none; default blosc:zstd:5.",
)
@_signals
@click.option("--teacher", type=WORDS, help="Only this teacher's signals.")
@conditions
@as_json
def export(
    as_json: bool,
    store: str | Path,
    out: Path,
    form: str | None,
    archive: bool,
    compressor: str | None,
    signals: str | None,
    teacher: str | None,
    **flags: Any,
) -> None:
    """Write STORE to OUT for people without this program.

    npz (numpy.load) and extxyz hold decoded values; extxyz leaves out features. zarr, zip and tar are
    compressed archives that any Zarr v3 client opens, signals as they are stored with what decodes them.

    \b
    Example:
      kd cache export coll.kdcache coll.npz --signals energy,forces
      kd cache export coll.kdcache coll.zarr --archive --compressor blosc:zstd:9
    """
    from molkd.pipeline.sharing.exporting import export_store

    if archive and form in ("npz", "extxyz"):
        raise click.UsageError(f"--archive makes zarr, zip or tar, not {form}; leave one of the two out")
    if archive and form is None:
        form = out.suffix[1:] if out.suffix in (".zip", ".tar") else "zarr"
    summary = export_store(
        store,
        out,
        form=form,
        teacher=teacher,
        signals=_words(signals),
        selection=_selection(flags),
        compressor=compressor,
    )
    show(summary, as_json)


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())


def _selection(flags: dict[str, Any]) -> Any:
    from molkd.pipeline.sharing.selection import Selection

    chosen = given(flags)
    for name in ("elements", "contains"):
        if name in chosen:
            chosen[name] = _words(chosen[name])
    return Selection(**chosen)


COMMANDS = (copy, select, merge, add, overlay, card, ls, export)
