"""`kd cache ...`: stores as a shared asset; each command calls one function of `pipeline.sharing`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from molkd.pipeline.commands.output import PATH, as_json, given, show

_CONDITIONS = (
    click.option("--systems", type=PATH, help="File of ids, as kd cache select writes it."),
    click.option("--elements", metavar="Pt,C,O", help="Nothing but these elements."),
    click.option("--contains", metavar="C,O", help="All of these elements."),
    click.option("--formula", metavar="PATTERN", help="Hill formula: C2H6O, or a pattern such as '*O2'."),
    click.option("--adsorbate", metavar="PATTERN", help="Hill formula of the atoms with tag 2."),
    click.option("--min-atoms", type=click.IntRange(min=1), help="Size at least."),
    click.option("--max-atoms", type=click.IntRange(min=1), help="Size at most."),
    click.option("--periodic/--not-periodic", default=None, help="Along any axis, or along none."),
    click.option("--source", metavar="PATTERN", help="Name of the source, as kd cache info shows it."),
    click.option("--with-energy/--without-energy", "has_energy", default=None, help="Label known, or not."),
    click.option("--random", type=click.IntRange(min=1), help="So many of these, chosen at random."),
    click.option("--seed", type=click.IntRange(min=0), help="Of --random; default 0."),
)
_signals = click.option("--signals", help="Comma-separated; default all. none: structures and labels only.")
_encoding = click.option(
    "--encoding",
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
@click.argument("source_store", metavar="SRC", type=PATH)
@click.argument("target", metavar="DST", type=PATH)
@_signals
@click.option("--teacher", help="Only this teacher's signals.")
@_encoding
@conditions
@as_json
def copy(
    as_json: bool,
    source_store: Path,
    target: Path,
    signals: str | None,
    teacher: str | None,
    encoding: tuple[str, ...],
    **flags: Any,
) -> None:
    """Copy the store SRC, or a part of it, to DST; every checksum is checked on the way.

    Structures and labels always come along. Rows that are not encoded anew go over as they are stored.
    The same command continues after an interruption; a later one may add signals.

    \b
    Example:
      kd cache copy /shared/oc20.kdcache oc20.kdcache
      kd cache copy oc20.kdcache co.kdcache --signals node --adsorbate CO --encoding node=int8
    """
    from molkd.pipeline.sharing.copying import copy_store

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
@click.argument("store", type=PATH)
@click.argument("out", type=PATH)
@conditions
@as_json
def select(as_json: bool, store: Path, out: Path, **flags: Any) -> None:
    """Write the ids of those systems of STORE that fulfil every condition to the text file OUT.

    kd cache copy takes the file with --systems, and the conditions themselves.

    \b
    Example:
      kd cache select oc20.kdcache co.txt --adsorbate CO --max-atoms 100
      kd cache select oc20.kdcache some.txt --systems co.txt --random 1000 --seed 1
    """
    from molkd.pipeline.sharing.selection import select_systems

    show(select_systems(store, out, _selection(flags)), as_json)


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())


def _selection(flags: dict[str, Any]) -> Any:
    from molkd.pipeline.sharing.selection import Selection

    chosen = given(flags)
    for name in ("elements", "contains"):
        if name in chosen:
            chosen[name] = _words(chosen[name])
    return Selection(**chosen)


COMMANDS = (copy, select)
