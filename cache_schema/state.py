"""What of a group is written: from the manifest where the group is finished, else from its commit records."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from molkd.cache_schema.checks import Checks, pack_checksums
from molkd.cache_schema.commit import (
    Commit,
    FileRecord,
    bad_systems,
    check_edge_rows,
    file_record,
    moments,
)
from molkd.cache_schema.errors import CacheError
from molkd.cache_schema.files import inside
from molkd.cache_schema.groups import (
    ATOMS,
    Group,
    check_metadata,
    committed_shards,
    load_atoms,
    load_commit,
    load_signal,
)
from molkd.cache_schema.jsonfile import read_sealed
from molkd.cache_schema.layout import MANIFEST, MAX_JSON_BYTES, MAX_MANIFEST_BYTES
from molkd.cache_schema.plan import Plan, Systems, check_format
from molkd.cache_schema.statistics import Moments

MANIFEST_KIND = "molkd cache manifest"
_MANIFEST_BYTES_PER_ATOM = 512  # dozens of signals on edges have less
_BYTES_PER_SHARD = 1 << 16
_REMEDY = "delete manifest.json, the commit records hold the same and everything works without it"


@dataclass
class GroupState:
    """A group with the files of its committed shards."""

    group: Group
    root: Path  # of the store that its files lie in
    files: dict[int, dict[str, FileRecord]] = field(default_factory=dict)  # shard -> array -> file
    moments: dict[str, Moments] = field(default_factory=dict)  # array -> sums over all committed shards
    bad_systems: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        for name, layout in self.group.layouts.items():
            if layout.values is not None and name not in self.moments:
                self.moments[name] = Moments.empty(layout.values)

    def add(self, commit: Commit) -> None:
        """Take in a commit."""
        self.files[commit.shard] = commit.files
        for name, sums in commit.moments.items():
            self.moments[name].merge(sums)
        self.bad_systems.update(commit.bad_systems)

    @property
    def missing_shards(self) -> tuple[int, ...]:
        """Shards without a commit."""
        return tuple(k for k in range(self.group.n_shards) if k not in self.files)

    @property
    def n_bytes(self) -> int:
        """Bytes on disk of all committed files."""
        return sum(f.n_bytes for files in self.files.values() for f in files.values())


def read_log(root: Path, plan: Plan, group: Group) -> GroupState:
    """Read all commit records of a group.

    Raises
    ------
    IntegrityError
        If a record, or the metadata it was written with, are damaged.
    """
    state = GroupState(group, root)
    for shard in sorted(committed_shards(root, group)):
        commit = load_commit(root, plan, group, shard)
        if commit is not None:
            state.add(commit)
    return state


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says; groups not taken apart yet."""

    path: Path
    groups: dict[str, Any]  # the checksums of chunks as `pack_record` leaves them
    metadata: dict[str, dict[str, str]]  # group -> zarr.json -> sha256
    teachers: dict[str, Any]  # provenance by name
    sha256: str

    def state(self, root: Path, plan: Plan, group: Group) -> GroupState:
        """Return the finished state of a group that the manifest names.

        Raises
        ------
        IntegrityError
            If the entry does not describe the group.
        """
        check_metadata(root, group, self.metadata[group.name])
        check = Checks(f"{self.path}, {group.name}")
        entry = check.table(self.groups, group.name)
        arrays = check.table(entry, "arrays")
        if set(arrays) != set(group.layouts):
            check.problem("arrays", f"expected exactly {', '.join(group.layouts)}")
        if entry.get("weights_sha256") != group.weights_sha256:
            check.problem("weights_sha256", "is not that of the teacher")
        check.finish(_REMEDY)
        state = GroupState(group, root, bad_systems=set(bad_systems(check, entry, plan)))
        state.files = {shard: {} for shard in range(plan.n_shards)}
        for name, layout in group.layouts.items():
            table = check.table(arrays, name, "arrays.")
            if layout.values is not None:
                state.moments[name] = moments(check, table, name, layout)
            shards = check.items(table, "shards", f"arrays.{name}.")
            if len(shards) != plan.n_shards:
                check.problem(f"arrays.{name}.shards", f"{len(shards)} entries, expected {plan.n_shards}")
                continue
            for shard, one in enumerate(shards):
                state.files[shard][name] = file_record(check, {name: one}, name, layout, group.rows_of(shard))
        for files in state.files.values():
            check_edge_rows(check, files, group.layouts)
        check.finish(_REMEDY)
        return state


def read_manifest(root: Path, plan: Plan) -> Manifest | None:
    """Read manifest.json; None if the store is not finished.

    Raises
    ------
    CacheError
        If it has a newer format.
    IntegrityError
        If it is damaged or belongs to another plan.
    """
    path = root / MANIFEST
    if not path.is_file():
        return None
    max_bytes = most_manifest_bytes(plan)
    document, digest = read_sealed(
        inside(root, MANIFEST), max_bytes=max_bytes, remedy=_REMEDY, on_table=pack_record
    )
    check_format(document, MANIFEST_KIND, path)
    check = Checks(str(path))
    if document.get("plan_sha256") != plan.sha256:
        check.problem("plan_sha256", "belongs to another plan")
    if document.get("fingerprint") != plan.fingerprint:
        check.problem("fingerprint", "is not that of the plan")
    groups = check.table(document, "groups")
    metadata = {n: check.hex_table(check.table(groups, n), "metadata", 64, f"{n}.") for n in groups}
    teachers = check.table(document, "teachers")
    check.finish(_REMEDY)
    return Manifest(path, groups, metadata, teachers, digest)


def pack_record(table: dict[str, Any]) -> None:
    """Make bytes of a file's list of checksums: as texts those of a large store fill the memory."""
    packed = pack_checksums(table.get("chunk_crc32c"))
    if packed is not None:
        table["chunk_crc32c"] = packed


def most_manifest_bytes(plan: Plan) -> int:
    """Return more bytes than the manifest of a store of this size can have."""
    packing = plan.packing
    most = MAX_JSON_BYTES + _MANIFEST_BYTES_PER_ATOM * packing.n_atoms + _BYTES_PER_SHARD * packing.n_shards
    return min(most, MAX_MANIFEST_BYTES)


def load_group(root: Path, plan: Plan, systems: Systems, name: str) -> Group:
    """Return any group by name.

    Raises
    ------
    CacheError, IntegrityError
        As `groups.load_signal`.
    """
    return load_atoms(plan, systems) if name == ATOMS else load_signal(root, plan, systems, name)


def load_states(root: Path, plan: Plan, systems: Systems, names: list[str]) -> dict[str, GroupState]:
    """Return the state of every named group: from the manifest if it has the group, else from the log.

    Raises
    ------
    CacheError
        If an encoding is unknown.
    IntegrityError
        If manifest, records or metadata are damaged.
    """
    manifest = read_manifest(root, plan)
    states = {}
    for name in names:
        group = load_group(root, plan, systems, name)
        if manifest is not None and name in manifest.groups:
            states[name] = manifest.state(root, plan, group)
        else:
            states[name] = read_log(root, plan, group)
    return states


def require_complete(root: Path, state: GroupState) -> None:
    """Refuse a group with missing shards.

    Raises
    ------
    CacheError
        Saying how many are missing.
    """
    missing = state.missing_shards
    if missing:
        shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise CacheError(
            f"{root}: {state.group.name} is not finished, {len(missing)} of {state.group.n_shards} shards "
            f"are missing ({shown}); run the command that wrote it again, finished shards are kept"
        )
