"""Groups that are committed shard by shard: ``atoms`` and every teacher's signal, as found in a store."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.commit import Commit, read_commit, rewrite_remedy
from molkd.cache_schema.errors import CacheError, IntegrityError
from molkd.cache_schema.files import inside
from molkd.cache_schema.layout import (
    DATA,
    LOG,
    MAX_JSON_BYTES,
    ArrayLayout,
    atoms_layout,
    check_name,
    record_path,
    signal_layout,
    split_signal_group,
)
from molkd.cache_schema.plan import Plan, Systems
from molkd.cache_schema.signal import Signal, codebook_files, read_signal
from molkd.cache_schema.untrusted import read_small
from molkd.cache_schema.zarr_json import check_array, kind, parse, read_teacher

ATOMS = "atoms"
_MAX_SIGNAL_PARTS = 4


@dataclass(frozen=True)
class Group:
    """A set of arrays written and committed together."""

    name: str  # "atoms" or "teachers/<teacher>/<signal>"
    layouts: dict[str, ArrayLayout]
    metadata: dict[str, str]  # zarr.json within data.zarr -> sha256
    rows: Mapping[
        str, NDArray[np.int64]
    ]  # axis -> (n_shards,) rows of each shard; only records know of edges
    weights_sha256: str = ""
    declared: Signal | None = None  # None for ``atoms``

    @property
    def signal(self) -> Signal:
        """The signal that the group holds."""
        assert self.declared is not None, self.name
        return self.declared

    @property
    def codebook_files(self) -> tuple[str, ...]:
        """Files of data.zarr that hold the codebook; reading the group has checked them."""
        if self.declared is None or self.declared.codebook is None:
            return ()
        return tuple(codebook_files(self.name, self.declared.codebook))

    @property
    def n_shards(self) -> int:
        """Number of shards."""
        return len(self.rows["system"])

    @cached_property
    def first_system(self) -> NDArray[np.int64]:
        """Stored index of the first system of each shard, and the number of all, (n_shards + 1,)."""
        return np.concatenate([[0], np.cumsum(self.rows["system"])])

    def rows_of(self, shard: int) -> dict[str, int | None]:
        """Return the rows of a shard by axis; None for edges."""
        return {"edge": None} | {axis: int(rows[shard]) for axis, rows in self.rows.items()}


def read_zarr_json(root: Path, name: str) -> bytes | None:
    """Read a zarr.json of data.zarr; None if there is none.

    Raises
    ------
    IntegrityError
        If it is absurdly large or leads out of the store.
    """
    path = inside(root, f"{DATA}/{name}")
    if not path.is_file():
        return None
    return read_small(path, MAX_JSON_BYTES, "restore it from a copy of the store")


def load_atoms(plan: Plan, systems: Systems) -> Group:
    """Return the group of structures and labels."""
    layouts = atoms_layout(plan.packing)
    names = ["zarr.json", "atoms/zarr.json", *(f"{x.path}/zarr.json" for x in layouts.values())]
    metadata = {n: plan.metadata.get(n, "") for n in names}
    return Group(ATOMS, layouts, metadata, shard_rows(plan, systems))


def load_signal(root: Path, plan: Plan, systems: Systems, group: str) -> Group:
    """Return a teacher's signal.

    Raises
    ------
    CacheError
        If its encoding is unknown.
    IntegrityError
        If its metadata are missing, damaged or do not fit the plan.
    """
    teacher, signal = split_signal_group(group)
    parts = group.split("/")
    above = [f"{'/'.join(parts[:k])}/zarr.json" for k in range(3, len(parts))]  # layer, of layer/U4
    metadata: dict[str, str] = {}

    def read(name: str) -> tuple[dict[str, Any], str]:
        raw, where = read_zarr_json(root, name), str(root / DATA / name)
        if raw is None:
            raise IntegrityError(f"{where}: missing; restore the file from a copy of the store")
        metadata[name] = hashlib.sha256(raw).hexdigest()
        return parse(raw, where), where

    weights = read_teacher(*read(f"teachers/{teacher}/zarr.json")).get("weights_sha256", "")
    document, where = read(f"{group}/zarr.json")
    declared = read_signal(root, group, document, where, read)
    if declared.spec.name != signal:
        raise IntegrityError(
            f"{where}: describes {declared.spec.name}; restore the file from a copy of the store"
        )
    layouts = declared_layout(group, declared, plan, systems)
    for layout in layouts.values():
        document, where = read(f"{layout.path}/zarr.json")
        check_array(document, layout, where)
    for name in above:
        read(name)
    return Group(
        name=group,
        layouts=layouts,
        metadata=metadata,
        rows=shard_rows(plan, systems),
        weights_sha256=weights if isinstance(weights, str) else "",
        declared=declared,
    )


def declared_layout(group: str, signal: Signal, plan: Plan, systems: Systems) -> dict[str, ArrayLayout]:
    """Return the arrays of a signal of this store.

    Raises
    ------
    CacheError
        If a shard could have more edges than the format holds.
    """
    spec = signal.spec
    edge_rows = systems.edge_rows(spec.max_per_atom) if spec.axis == "edge" else 0
    return signal_layout(group, spec, signal.encoding, plan.packing, edge_rows, signal.codebook)


def shard_rows(plan: Plan, systems: Systems) -> dict[str, NDArray[np.int64]]:
    """Return how many rows each shard has on the axes of atoms and systems, (n_shards,) each."""
    begins = np.searchsorted(systems.shard, np.arange(plan.n_shards))
    n_atoms = systems.n_atoms.astype(np.int64)
    return {
        "atom": np.add.reduceat(n_atoms, begins),
        "system": np.add.reduceat(np.ones_like(n_atoms), begins),
    }


def teacher_provenance(root: Path, name: str) -> dict[str, Any] | None:
    """Return what the store says about a teacher; None if it has no such teacher.

    Raises
    ------
    IntegrityError
        If the description is damaged.
    """
    file = f"teachers/{name}/zarr.json"
    raw = read_zarr_json(root, file)
    if raw is None:
        return None
    where = str(root / DATA / file)
    return read_teacher(parse(raw, where), where)


def list_teachers(root: Path) -> list[str]:
    """Return the names of all teachers, sorted.

    Raises
    ------
    IntegrityError
        If a link leads out of the store.
    """
    folders = _named(root, f"{DATA}/teachers")
    return [name for name in folders if inside(root, f"{DATA}/teachers/{name}/zarr.json").is_file()]


def list_signal_groups(root: Path, teacher: str) -> list[str]:
    """Return the groups of a teacher's signals, in data or log, sorted.

    Raises
    ------
    IntegrityError
        If a group's metadata are damaged, or a link leads out of the store.
    """
    return sorted({*_described(root, f"teachers/{teacher}", 0), *list_logged_groups(root, teacher)})


def list_logged_groups(root: Path, teacher: str) -> list[str]:
    """Return the groups of a teacher's signals that the log names, whether or not their metadata are there.

    Raises
    ------
    IntegrityError
        If a link leads out of the store.
    """
    return sorted(_logged(root, f"teachers/{teacher}", 0))


def list_logged_teachers(root: Path) -> list[str]:
    """Return the teachers that the log names, whether or not their metadata are there.

    Raises
    ------
    IntegrityError
        If a link leads out of the store.
    """
    return _named(root, f"{LOG}/teachers")


def _described(root: Path, group: str, depth: int) -> Iterator[str]:
    for name in _named(root, f"{DATA}/{group}") if depth < _MAX_SIGNAL_PARTS else ():
        child = f"{group}/{name}"
        raw = read_zarr_json(root, f"{child}/zarr.json")
        if raw is not None and kind(parse(raw, str(root / DATA / child / "zarr.json"))) == "signal":
            yield child
        yield from _described(root, child, depth + 1)


def _logged(root: Path, group: str, depth: int) -> Iterator[str]:
    for name in _named(root, f"{LOG}/{group}") if depth < _MAX_SIGNAL_PARTS else ():
        child = f"{group}/{name}"
        if any(p.suffix == ".json" and p.stem.isdecimal() for p in (root / LOG / child).iterdir()):
            yield child
        yield from _logged(root, child, depth + 1)


def _named(root: Path, folder: str) -> list[str]:
    """Return the folders in a folder that have names as the format gives them, sorted.

    Raises
    ------
    IntegrityError
        If the folder, or one in it, lies outside the store.
    """
    path = inside(root, folder)
    if not path.is_dir():
        return []
    with os.scandir(path) as entries:
        return sorted(
            one.name
            for one in entries
            if _is_name(one.name)
            and (inside(root, f"{folder}/{one.name}").is_dir() if one.is_symlink() else one.is_dir())
        )


def _is_name(name: str) -> bool:
    try:
        return bool(check_name(name, "name"))
    except CacheError:
        return False


def committed_shards(root: Path, group: Group) -> set[int]:
    """Return the shards of a group that have a commit record; the records are not opened.

    Raises
    ------
    IntegrityError
        If a link leads out of the store.
    """
    folder = inside(root, f"{LOG}/{group.name}")
    if not folder.is_dir():
        return set()
    n_shards = group.n_shards
    stems = (
        p.stem for p in folder.iterdir() if p.suffix == ".json" and len(p.stem) >= 6 and p.stem.isdecimal()
    )
    return {int(s) for s in stems if int(s) < n_shards and record_path("", int(s)).endswith(f"/{s}.json")}


def load_commit(root: Path, plan: Plan, group: Group, shard: int) -> Commit | None:
    """Read a shard's commit record and check that the group's metadata are those it was written with.

    Raises
    ------
    IntegrityError
        If the record is damaged, or the metadata or the teacher changed since.
    """
    commit = read_commit(root, plan, group.name, shard, group.layouts, group.rows_of(shard))
    if commit is not None:
        check_metadata(root, group, commit.metadata)
        check_origin(root, group, commit)
    return commit


def check_origin(root: Path, group: Group, commit: Commit) -> None:
    """Refuse a record that names another teacher's weights, or bad systems that are not in its shard.

    Raises
    ------
    IntegrityError
        Naming the record.
    """
    where = root / record_path(group.name, commit.shard)
    remedy = rewrite_remedy(group.name, commit.shard)
    if commit.weights_sha256 != group.weights_sha256:
        raise IntegrityError(
            f"{where}: written by a teacher with the weights {commit.weights_sha256[:16]!r}, the store's has "
            f"{group.weights_sha256[:16]!r}; {remedy}"
        )
    first, last = group.first_system[commit.shard : commit.shard + 2]
    if not all(first <= i < last for i in commit.bad_systems):
        raise IntegrityError(f"{where}: bad_systems: some are not in shard {commit.shard}; {remedy}")


def require_unchanged(root: Path, group: Group) -> None:
    """Refuse to commit values of a signal that another process has declared anew since it was loaded.

    Raises
    ------
    CacheError
        Naming the signal.
    """
    if group.name == ATOMS:
        return  # described by the plan
    for name, digest in group.metadata.items():
        raw = read_zarr_json(root, name)
        if raw is None or hashlib.sha256(raw).hexdigest() != digest:
            raise CacheError(
                f"{root / DATA / name}: changed while {group.name} was being written, another process asked "
                "for it with another encoding; nothing is committed, run one of them again"
            )


def check_metadata(root: Path, group: Group, recorded: dict[str, str]) -> None:
    """Compare a group's metadata with what was recorded.

    Raises
    ------
    IntegrityError
        Naming the files that changed since the shard was written.
    """
    changed = [n for n, digest in group.metadata.items() if recorded.get(n) != digest]
    if changed:
        files = ", ".join(str(root / DATA / n) for n in changed)
        raise IntegrityError(
            f"{files}: damaged, or changed since {group.name} was written; restore from a copy"
        )
