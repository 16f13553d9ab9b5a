"""The copy of a store that a repair takes files from: only read, and believed as far as checksums go."""

import errno
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from molkd.cache_schema.commit import Commit, FileRecord, check_commit
from molkd.cache_schema.damage import Damage, DamagedStore, Outcome
from molkd.cache_schema.errors import CacheError
from molkd.cache_schema.files import exclusive, inside, make_folder, write_error, write_file
from molkd.cache_schema.groups import Group, list_signal_groups, list_teachers, load_signal
from molkd.cache_schema.jsonfile import parse_sealed
from molkd.cache_schema.layout import MAX_RECORD_BYTES, PLAN, record_path
from molkd.cache_schema.mending import Replacement, clear_way, forget_shard, is_whole
from molkd.cache_schema.mirror import mirror_of
from molkd.cache_schema.overlay import base_of
from molkd.cache_schema.plan import Plan, Systems, read_plan
from molkd.cache_schema.remote import local_root
from molkd.cache_schema.untrusted import read_small


class IntactCopy:
    """A store with the same plan: a folder or a URL.

    Attributes
    ----------
    name : what the user called it
    plan : of the copy
    """

    def __init__(self, place: str | Path) -> None:
        self.name = str(place)
        self._root = local_root(place)
        self.plan: Plan = read_plan(self._root)
        base = base_of(self._root, self.plan)
        self._places = [self._root] if base is None else [self._root, base]

    def require_same(self, root: Path, plan: Plan) -> None:
        """Refuse a store of other systems, or of the same ones in another order.

        Raises
        ------
        CacheError
            With both fingerprints.
        """
        if self.plan.sha256 != plan.sha256:
            same = "the same systems, packed differently" if self.plan.fingerprint == plan.fingerprint else ""
            raise CacheError(
                f"{self.name}: is no copy of {root}: {same or 'other systems'} (fingerprint "
                f"{self.plan.fingerprint[:16]}, plan {self.plan.sha256[:16]}; the store has "
                f"{plan.fingerprint[:16]} and {plan.sha256[:16]}); name a copy of this very store"
            )

    def read_plan_file(self) -> bytes:
        """Return the bytes of plan.json."""
        return inside(self._root, PLAN).read_bytes()

    def small_files(self, relative: str, max_bytes: int) -> Iterator[bytes]:
        """Yield what the copy has as a file of the store; whether it is right the caller knows."""
        for place in self._places:
            try:
                path = inside(place, relative)
                if path.is_file():
                    yield read_small(path, max_bytes, "")
            except (CacheError, OSError):  # then this is not where it comes from
                continue

    def signals(self, systems: Systems) -> dict[str, dict[str, str]]:
        """Return the signals that the copy itself describes, and the sha256 of the zarr.json files of each.

        Raises
        ------
        CacheError
            If the copy is damaged there.
        """
        groups = [g for name in list_teachers(self._root) for g in list_signal_groups(self._root, name)]
        return {name: load_signal(self._root, self.plan, systems, name).metadata for name in groups}

    def shard(self, group: Group, shard: int) -> "CopiedShard":
        """Return a shard of the copy that fits a group of the store.

        Raises
        ------
        CacheError
            If the copy lacks it, holds it in another encoding or of another teacher, or is damaged there.
        """
        relative = record_path(group.name, shard)
        for place in self._places:
            raw = _read_record(place, relative)
            if raw is None:
                continue
            where = place / relative
            document, _ = parse_sealed(raw, str(where), "the copy is damaged here, too")
            if document.get("metadata") != group.metadata:
                raise CacheError(f"{self.name} has it in another encoding, or of another teacher")
            rows = group.rows_of(shard)
            commit = check_commit(document, where, self.plan, group.name, shard, group.layouts, rows)
            return CopiedShard(place, commit, raw)
        raise CacheError(f"{self.name} does not have it")

    def mend(
        self, store: DamagedStore, damages: Sequence[Damage], outcome: Outcome
    ) -> dict[tuple[str, int], str]:
        """Put the files of shards in place that the copy has intact; return why not, for the others."""
        reasons = {}
        for damage in damages:
            try:
                self._mend(store, damage, outcome)
            except CacheError as error:
                reasons[damage.key] = str(error)
            except OSError as error:
                if error.errno != errno.EIO:  # of a disk that cannot be written to
                    raise write_error(store.root, error, 0) from error
                reasons[damage.key] = f"{self.name} cannot be read there ({error})"
        return reasons

    def _mend(self, store: DamagedStore, damage: Damage, outcome: Outcome) -> None:
        group, root = store.groups[damage.group], store.root
        theirs = self.shard(group, damage.shard)
        checksums = theirs.commit.checksums
        if damage.reference is not None and (checksums == damage.reference) == damage.is_wrong:
            raise CacheError(f"{self.name} has {'the same' if damage.is_wrong else 'other'} values of it")
        files = {x.file(damage.shard): theirs.commit.files[name] for name, x in group.layouts.items()}
        broken = {name: record for name, record in files.items() if not _is_whole(root, name, record)}
        if not outcome.is_dry:
            self._put(root, damage, theirs, broken)
        outcome.did_shard(damage, self.name, sum(record.n_bytes for record in broken.values()))

    def _put(
        self, root: Path, damage: Damage, theirs: "CopiedShard", broken: Mapping[str, FileRecord]
    ) -> None:
        """Copy all files of a shard that are broken, then give all of them their places."""
        replacements: list[Replacement] = []
        try:
            for name, expected in broken.items():
                replacements.append(Replacement(theirs.file(name), clear_way(root, name), expected))
            record = clear_way(root, record_path(damage.group, damage.shard))
            make_folder(record.parent)
            with exclusive(record.parent):
                if damage.is_wrong:
                    forget_shard(root, damage.group, damage.shard)
                for replacement in replacements:
                    replacement.take_place()
                if damage.is_wrong or not damage.has_record:
                    write_file(record, theirs.record, replace=True)
        finally:
            for replacement in replacements:
                replacement.discard()


class CopiedShard:
    """A committed shard of a copy: its record, and where its files are."""

    def __init__(self, place: Path, commit: Commit, record: bytes) -> None:
        self._place, self.commit, self.record = place, commit, record

    def file(self, relative: str) -> Path:
        """Return the path of one of its files; of a copy on a server it is fetched.

        Raises
        ------
        CacheError, IntegrityError
            If it cannot be fetched, arrives damaged, or is a link out of the copy.
        """
        return inside(self._place, relative)


def _is_whole(root: Path, relative: str, record: FileRecord) -> bool:
    try:
        return is_whole(inside(root, relative), record)
    except CacheError:
        return False


def _read_record(place: Path, relative: str) -> bytes | None:
    mirror = mirror_of(place)
    if mirror is not None:
        return mirror.remote.read(relative, MAX_RECORD_BYTES)
    path = inside(place, relative)
    if not path.is_file():
        return None
    return read_small(path, MAX_RECORD_BYTES, "the copy is damaged here, too")
