"""What is broken in a store shard by shard, who may mend it, and what became of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from molkd.cache_schema.groups import Group
from molkd.cache_schema.plan import Plan, Systems


@dataclass(frozen=True)
class Damage:
    """A shard of a group that is missing or not as it was written."""

    group: str
    shard: int
    reason: str
    reference: dict[str, str] | None  # array -> crc32c that its file had; None if nothing intact says so
    has_record: bool  # whether its commit record is intact
    bad_systems: frozenset[int] = frozenset()  # of the shard or its group, as far as records say
    is_wrong: bool = False  # whether its files are what the record says, but cannot be what belongs there

    @property
    def key(self) -> tuple[str, int]:
        """Group and shard."""
        return self.group, self.shard

    @property
    def words(self) -> str:
        """The shard as messages name it."""
        return f"shard {self.shard} of {self.group}"


@dataclass
class DamagedStore:
    """A store whose plan, systems table and metadata are whole, as far as they could be mended."""

    root: Path
    plan: Plan
    systems: Systems
    groups: dict[str, Group]  # those whose metadata are whole
    damages: list[Damage]

    def references(self) -> Mapping[tuple[str, int], dict[str, str]]:
        """Return what checksums damaged shards had, where that is known and was right."""
        return {d.key: d.reference for d in self.damages if d.reference is not None and not d.is_wrong}


@dataclass
class Outcome:
    """What a repair did, or would do, and what it could not."""

    is_dry: bool
    done: list[str] = field(default_factory=list)
    needed: list[str] = field(default_factory=list)
    shards: set[tuple[str, int]] = field(default_factory=set)  # of which something is, or would be, put back
    n_bytes: int = 0  # put in place

    def did(self, what: str, source: str, n_bytes: int = 0) -> None:
        """Note a file or shard that is whole again."""
        self.done.append(f"{what}: from {source}")
        self.n_bytes += 0 if self.is_dry else n_bytes

    def did_shard(self, damage: Damage, source: str, n_bytes: int = 0) -> None:
        """Note a shard that is whole again."""
        self.shards.add(damage.key)
        self.did(damage.words, source, n_bytes)


class Healer(Protocol):
    """Something that has what belongs into a shard."""

    def mend(
        self, store: DamagedStore, damages: Sequence[Damage], outcome: Outcome
    ) -> dict[tuple[str, int], str]:
        """Put shards in place, in a dry run say so only; return why not, for those it could not."""
        ...
