"""What of a group is written: from the manifest where the group is finished, else from its commit records."""

from dataclasses import dataclass, field
from pathlib import Path

from molkd.cache_schema.commit import Commit, FileRecord
from molkd.cache_schema.groups import Group, committed_shards, load_commit
from molkd.cache_schema.plan import Plan
from molkd.cache_schema.statistics import Moments


@dataclass
class GroupState:
    """A group with the files of its committed shards."""

    group: Group
    files: dict[int, dict[str, FileRecord]] = field(default_factory=dict)  # shard -> array -> file
    moments: dict[str, Moments] = field(default_factory=dict)  # array -> sums over all committed shards
    bad_systems: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        for name, layout in self.group.layouts.items():
            if layout.dtype.kind == "f" and name not in self.moments:
                self.moments[name] = Moments.empty(layout.spec)

    def add(self, commit: Commit) -> None:
        """Take in a commit."""
        self.files[commit.shard] = commit.files
        for name, sums in commit.moments.items():
            self.moments[name].merge(sums)
        self.bad_systems.update(commit.bad_systems)

    @property
    def missing_shards(self) -> tuple[int, ...]:
        """Shards without a commit."""
        return tuple(k for k in range(len(self.group.rows)) if k not in self.files)

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
    state = GroupState(group)
    for shard in sorted(committed_shards(root, group)):
        commit = load_commit(root, plan, group, shard)
        if commit is not None:
            state.add(commit)
    return state
