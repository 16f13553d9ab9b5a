"""`kd cache ls`: every store below a folder or in a bucket, what it holds and whether it is sound."""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from molkd.cache_schema import remote
from molkd.cache_schema.errors import CacheError
from molkd.cache_schema.groups import list_signal_groups, list_teachers, load_signal
from molkd.cache_schema.layout import PLAN, split_signal_group
from molkd.cache_schema.manifest import info
from molkd.cache_schema.overlay import distant_base
from molkd.cache_schema.plan import read_plan, read_systems
from molkd.cache_schema.remote import is_url
from molkd.cache_schema.untrusted import n_bytes_below
from molkd.cache_schema.verify import verify
from molkd.pipeline.errors import DataError
from molkd.pipeline.evaluation.tables import Column, format_table

log = logging.getLogger(__name__)

_MAX_PROBLEMS = 3
_UNFINISHED = "unfinished: the command that writes it has to be run again"
_COLUMNS = (
    Column("store", "store"),
    Column("systems", "systems"),
    Column("atoms", "atoms"),
    Column("bytes", "bytes"),
    Column("dataset", "dataset"),
    Column("teachers", "teachers"),
    Column("health", "health"),
)


@dataclass(frozen=True)
class Listed:
    """One store."""

    store: str
    health: str  # "ok", "unfinished: ...", "damaged: ..."
    systems: int | None = None
    atoms: int | None = None
    bytes: int | None = None
    fingerprint: str = ""
    sources: tuple[str, ...] = ()
    teachers: dict[str, dict[str, str]] | None = None  # name -> signal -> encoding


@dataclass(frozen=True)
class Listing:
    """All stores below a folder."""

    root: str
    stores: tuple[Listed, ...]

    def text(self) -> str:
        """Return one line a store."""
        if not self.stores:
            return f"no stores below {self.root}"
        rows = [
            {
                "store": one.store,
                "systems": one.systems,
                "atoms": one.atoms,
                "bytes": one.bytes,
                "dataset": f"{one.fingerprint[:8]} {_first(one.sources)}" if one.fingerprint else "",
                "teachers": "; ".join(
                    f"{name}: {', '.join(f'{s} {e}' for s, e in signals.items())}"
                    for name, signals in (one.teachers or {}).items()
                ),
                "health": one.health,
            }
            for one in self.stores
        ]
        lines = format_table(rows, _COLUMNS).split("\n")
        return "\n".join("".join(c if c.isprintable() else " " for c in line) for line in lines)


def list_stores(root: str | Path) -> Listing:
    """Look at every store in a folder and below; sizes and presence are checked, not every byte.

    Parameters
    ----------
    root : a folder, or the URL of a bucket or of a prefix of one

    Raises
    ------
    DataError
        If there is no such folder.
    CacheError
        If a server has no listings, or cannot be asked.
    """
    if isinstance(root, str) and is_url(root):
        return Listing(root, tuple(_look(url) for url in remote.find_stores(root)))
    if not Path(root).is_dir():
        raise DataError(f"{root}: no such folder; give one that stores lie in")
    return Listing(str(root), tuple(_look(path) for path in find_stores(Path(root))))


def find_stores(root: Path) -> Iterator[Path]:
    """Yield the folders that hold a plan, sorted; stores are not looked into, links not followed.

    Raises
    ------
    DataError
        If the root cannot be read; a folder below that cannot is only warned of.
    """

    def refuse(error: OSError) -> None:
        if Path(error.filename) == root:
            raise DataError(f"{root}: cannot be looked into ({error.strerror}); ask its owner") from error
        log.warning(
            "%s: cannot be looked into (%s); stores there are not listed", error.filename, error.strerror
        )

    for folder, subfolders, files in os.walk(root, onerror=refuse):
        if PLAN in files:
            subfolders.clear()
            yield Path(folder)
        subfolders.sort()
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]


def _look(path: str | Path) -> Listed:
    try:
        report = verify(path, quick=True)
        if report.problems:
            shown = "; ".join(f"{p.path}: {p.message}" for p in report.problems[:_MAX_PROBLEMS])
            health = f"damaged: {len(report.problems)} problems ({shown})"
        else:
            health = "ok"
        if isinstance(path, Path) and (url := distant_base(path)):
            if health == "ok" and any(note.kind == "unfinished" for note in report.notes):
                health = _UNFINISHED
            return _own_part(path, url, health)
        facts = info(path)
    except (CacheError, OSError) as error:
        return Listed(
            str(path), f"damaged: {error}" if isinstance(error, CacheError) else f"unreadable: {error}"
        )
    if health == "ok" and not facts["finished"]:
        health = _UNFINISHED
    return Listed(
        store=str(path),
        health=health,
        systems=facts["systems"],
        atoms=facts["atoms"],
        bytes=facts["bytes"],
        fingerprint=facts["fingerprint"],
        sources=tuple(facts["sources"]),
        teachers={
            name: {signal: one["encoding"] for signal, one in entry["signals"].items()}
            for name, entry in facts["teachers"].items()
        },
    )


def _own_part(root: Path, url: str, health: str) -> Listed:
    """Describe an overlay by its own files; the server that it names, as anybody may, is not asked."""
    plan = read_plan(root)
    systems = read_systems(root, plan)
    groups = [name for teacher in list_teachers(root) for name in list_signal_groups(root, teacher)]
    teachers: dict[str, dict[str, str]] = {}
    for name in groups:
        teacher, signal = split_signal_group(name)
        encoding = load_signal(root, plan, systems, name).signal.encoding
        teachers.setdefault(teacher, {})[signal] = encoding
    return Listed(
        store=str(root),
        health=f"{health}; an overlay of {url}, which was not asked (kd cache info does)",
        systems=plan.packing.n_systems,
        atoms=plan.packing.n_atoms,
        bytes=n_bytes_below(root),
        fingerprint=plan.fingerprint,
        teachers=teachers,
    )


def _first(sources: Sequence[str]) -> str:
    more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
    return f"{Path(sources[0]).name}{more}" if sources else ""
