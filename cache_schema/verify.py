"""Check a store, sizes only or every byte, and say which shard of which array is wrong."""

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from molkd.cache_schema.commit import Commit, FileRecord, read_commit, rewrite_remedy
from molkd.cache_schema.errors import CacheError, IntegrityError
from molkd.cache_schema.fields import N_EDGES
from molkd.cache_schema.files import TMP_PREFIX, inside
from molkd.cache_schema.findings import HARMLESS, Problem, Report
from molkd.cache_schema.groups import (
    ATOMS,
    Group,
    check_origin,
    committed_shards,
    list_logged_teachers,
    list_signal_groups,
    list_teachers,
    teacher_provenance,
)
from molkd.cache_schema.layout import DATA, LOG, MANIFEST, PLAN, record_path
from molkd.cache_schema.manifest import group_entry
from molkd.cache_schema.mirror import mirror_of
from molkd.cache_schema.overlay import OVERLAY, base_of, distant_base
from molkd.cache_schema.plan import (
    CLAIM_SYSTEMS,
    SYSTEM_ARRAYS,
    Plan,
    Systems,
    read_metadata,
    read_plan,
    read_system_array,
    read_systems,
    system_file,
)
from molkd.cache_schema.remote import local_root
from molkd.cache_schema.shard_checks import damages_of_file, wrong_edges, wrong_identity
from molkd.cache_schema.state import GroupState, Manifest, load_group, pack_record, read_manifest
from molkd.cache_schema.untrusted import n_bytes_below, open_and_size, walk

Progress = Callable[[int, int], None]  # bytes done, bytes in all

_COPY = "restore the file from a copy of the store"
_FINISH = "delete it, the records say the same, and finish the store again"


def verify(
    path: str | Path,
    quick: bool = False,
    progress: Progress | None = None,
    shards: Collection[tuple[str, int]] | None = None,
) -> Report:
    """Check a store and report every problem.

    Of a store on a server every file is fetched and checked; a quick check asks for sizes only. A quick check
    of an overlay asks no server that the overlay names.

    Parameters
    ----------
    quick : look at sizes and presence, the records and the plan, but read no array data
    progress : called with bytes done and bytes in all
    shards : groups and shards whose array data are read; None reads all

    Raises
    ------
    CacheError
        If the folder is no store, or one of a newer format.
    """
    return _Verifier(local_root(path), quick, progress, shards).run()


class _Verifier:
    def __init__(
        self,
        root: Path,
        quick: bool,
        progress: Progress | None,
        shards: Collection[tuple[str, int]] | None,
    ) -> None:
        self.root, self.quick, self.progress, self.shards = root, quick, progress, shards
        self.report = Report(quick)
        self.expected: set[str] = {PLAN}  # files that belong to the store
        self.damaged: set[str] = set()  # metadata files reported already
        self.total = 0
        self.manifest: Manifest | None = None
        self.mirror = mirror_of(root)
        self.sizes: dict[str, int | None] = {}  # what a server says, in a quick check

    def run(self) -> Report:
        try:
            plan = read_plan(self.root)
        except IntegrityError as error:
            self._add("plan", PLAN, str(error), "restore it from a copy, or create the store again")
            return self.report
        self.total = n_bytes_below(self.root / DATA)
        if self.mirror is not None:
            self.total = self.mirror.expected.n_bytes
        self._count((self.root / PLAN).stat().st_size)
        systems = self._systems(plan)
        if systems is None:
            return self.report  # without the table nobody knows which rows a shard has
        overlay = self._overlay(plan)
        self.manifest = self._manifest(plan)
        names = self._group_names()
        for name in names:
            if not (overlay and name == ATOMS):
                self._group(plan, systems, name)
        self._compare_manifest(names)
        if self.mirror is None:
            self._strangers()
        return self.report

    # --------------------------------------------------------------------------------- plan, table, metadata

    def _systems(self, plan: Plan) -> Systems | None:
        for name in plan.metadata:
            path = f"{DATA}/{name}"
            self.expected.add(path)
            try:
                self._count(len(read_metadata(self.root, plan, name)))
            except IntegrityError as error:
                self._add("metadata", path, str(error), _COPY, array=name.removesuffix("/zarr.json"))
        sound = True
        for name in SYSTEM_ARRAYS:
            path = system_file(name)
            self.expected.add(path)
            try:
                self._count(read_system_array(self.root, plan, name).nbytes)
            except IntegrityError as error:
                sound = False
                self._add("systems", path, str(error), _COPY, array=f"systems/{name}")
                if name == "id" and plan.packing.n_systems >= CLAIM_SYSTEMS:
                    break  # how many systems there are is a claim; the other arrays may be as empty
        if not sound:
            return None
        try:
            return read_systems(self.root, plan)
        except IntegrityError as error:
            self._add("systems", f"{DATA}/systems", str(error), _COPY, array="systems")
            return None

    def _overlay(self, plan: Plan) -> bool:
        """Look at the store that an overlay refers to; its files are its own matter."""
        if not (self.root / OVERLAY).exists():
            return False
        self.expected.add(OVERLAY)
        self._count((self.root / OVERLAY).stat().st_size)
        try:
            place = (distant_base(self.root) if self.quick else "") or base_of(self.root, plan)
            message = f"structures and other signals lie in {place}"
            self._add("base", OVERLAY, message, "verify that store too")
        except CacheError as error:
            remedy = "restore that store, or say where it is with kd cache overlay"
            self._add("overlay", OVERLAY, str(error), remedy)
        return True

    def _group_names(self) -> list[str]:
        names = [ATOMS]
        for teacher in sorted({*list_teachers(self.root), *list_logged_teachers(self.root)}):
            try:
                names += list_signal_groups(self.root, teacher)
            except (CacheError, OSError) as error:
                self._add(
                    "metadata", f"{DATA}/teachers/{teacher}", str(error), _COPY, array=f"teachers/{teacher}"
                )
        return names

    # ------------------------------------------------------------------------------------------------ shards

    def _group(self, plan: Plan, systems: Systems, name: str) -> None:
        try:
            group = load_group(self.root, plan, systems, name)
        except CacheError as error:
            self._add("metadata", f"{DATA}/{name}", str(error), _COPY, array=name)
            return
        for path in {f"{DATA}/{m}" for m in (*group.metadata, *group.codebook_files)} - self.expected:
            self.expected.add(path)
            self._count((self.root / path).stat().st_size)
        listed = self._manifest_files(plan, group)
        if self.mirror is not None and self.quick:
            self.sizes = self.mirror.remote.sizes(
                layout.file(shard) for shard in listed for layout in group.layouts.values()
            )
        committed, state = committed_shards(self.root, group), GroupState(group, self.root)
        self._unfinished(plan, group, n_begun=len(committed | set(listed)))
        for shard in range(plan.n_shards):
            record = record_path(name, shard)
            files = listed.get(shard)
            if shard in committed:
                self.expected.add(record)
                commit = self._commit(plan, group, shard)
                if commit is not None:
                    if files is not None and files != commit.files:
                        self._add("manifest", MANIFEST, f"differs from {record}", _FINISH)
                    state.add(commit)
                    files = commit.files
            elif files is not None and self.mirror is None:  # which needs no records
                remedy = "delete manifest.json and run the command that wrote the shard again"
                self._add("record", record, "the commit record is missing", remedy, array=name, shard=shard)
            if files is None:
                self._uncommitted(group, shard)
                continue
            sound = [self._file(group, array, shard, files[array]) for array in group.layouts]
            if all(sound) and not self._is_quick(group, shard):
                self._content(group, systems, shard, files)

        self._compare_state(state)

    def _is_quick(self, group: Group, shard: int) -> bool:
        return self.quick or (self.shards is not None and (group.name, shard) not in self.shards)

    def _content(self, group: Group, systems: Systems, shard: int, files: Mapping[str, FileRecord]) -> None:
        """Look at what no checksum shows."""
        kind, message = "identity", ""
        if group.name == ATOMS:
            message = wrong_identity(self.root, group.layouts, systems, shard)
        elif N_EDGES.name in group.layouts:
            kind = "edges"
            message = wrong_edges(self.root, group.layouts, systems, shard, files["values"].rows)
        if message:
            remedy = rewrite_remedy(group.name, shard)
            self._add(kind, record_path(group.name, shard), message, remedy, array=group.name, shard=shard)

    def _commit(self, plan: Plan, group: Group, shard: int) -> Commit | None:
        record = record_path(group.name, shard)
        try:
            self._count(open_and_size(inside(self.root, record)))
            commit = read_commit(self.root, plan, group.name, shard, group.layouts, group.rows_of(shard))
            if commit is not None:
                check_origin(self.root, group, commit)
        except (CacheError, OSError) as error:
            remedy = rewrite_remedy(group.name, shard)
            self._add("record", record, str(error), remedy, array=group.name, shard=shard)
            return None
        for name, digest in group.metadata.items():
            path = f"{DATA}/{name}"
            if commit is not None and commit.metadata.get(name) != digest and path not in self.damaged:
                self.damaged.add(path)
                self._add(
                    "metadata", path, f"differs from {record}", _COPY, array=name.removesuffix("/zarr.json")
                )
        return commit

    def _manifest(self, plan: Plan) -> Manifest | None:
        path = self.root / MANIFEST
        if not os.path.lexists(path):
            return None
        self.expected.add(MANIFEST)
        try:
            self._count(open_and_size(inside(self.root, MANIFEST)))
            return read_manifest(self.root, plan)
        except (CacheError, OSError) as error:
            self._add("manifest", MANIFEST, str(error), _FINISH)
            return None

    def _compare_manifest(self, names: list[str]) -> None:
        """Report what the manifest says about teachers and groups that are not here, or other ones."""
        if self.manifest is None:
            return
        for name in sorted(self.manifest.groups.keys() - set(names)):
            message = f"names {name}, of which neither data nor records are here"
            self._add("metadata", MANIFEST, message, _COPY, array=name)
        for name, provenance in self.manifest.teachers.items():
            try:
                if teacher_provenance(self.root, name) != provenance:
                    self._add("manifest", MANIFEST, f"describes another teacher {name}", _FINISH)
            except CacheError:
                continue  # reported with the metadata

    def _manifest_files(self, plan: Plan, group: Group) -> dict[int, dict[str, FileRecord]]:
        if self.manifest is None or group.name not in self.manifest.groups:
            return {}
        try:
            return self.manifest.state(self.root, plan, group).files
        except CacheError as error:
            self._add("manifest", MANIFEST, str(error), _FINISH)
            return {}

    def _compare_state(self, state: GroupState) -> None:
        """Report sums, bad systems and the like that the manifest has otherwise than the records."""
        name = state.group.name
        entry = self.manifest.groups.get(name) if self.manifest is not None else None
        if isinstance(entry, dict) and not state.missing_shards:
            recorded = group_entry(state)
            for array in recorded["arrays"].values():
                for one in array["shards"]:
                    pack_record(one)
            differs = [key for key, value in recorded.items() if entry.get(key) != value]
            if differs and not any(p.kind == "manifest" for p in self.report.problems):
                message = f"{', '.join(differs)} of {name} differ from its commit records"
                self._add("manifest", MANIFEST, message, _FINISH)

    def _unfinished(self, plan: Plan, group: Group, n_begun: int) -> None:
        """Say in one line how much of a group is still to come; an interrupted store lacks many shards."""
        if n_missing := plan.n_shards - n_begun:
            message = f"{n_missing} of {plan.n_shards} shards of {group.name} are not written yet"
            remedy = "run the command that writes them again"
            self._add("unfinished", f"{LOG}/{group.name}", message, remedy, array=group.name)

    def _uncommitted(self, group: Group, shard: int) -> None:
        for layout in group.layouts.values():
            relative = layout.file(shard)
            if (self.root / relative).exists():
                self.expected.add(relative)
                message = "written, but not committed; it is never read"
                remedy = "run the command that wrote it again"
                self._add("uncommitted", relative, message, remedy, array=layout.path, shard=shard)

    def _file(self, group: Group, array: str, shard: int, record: FileRecord) -> bool:
        layout = group.layouts[array]
        relative, remedy = layout.file(shard), rewrite_remedy(group.name, shard)
        self.expected.add(relative)
        before = len(self.report.problems)
        try:
            size = self._size(relative)
        except FileNotFoundError:
            message = f"shard {shard} of {layout.path} is missing"
            self._add("missing", relative, message, remedy, array=layout.path, shard=shard)
            return False
        except CacheError as error:
            kind = "missing" if self.mirror is None else "checksum"
            self._add(kind, relative, str(error), remedy, array=layout.path, shard=shard)
            return False
        if size != record.n_bytes:
            message = f"shard {shard} of {layout.path} has {size} bytes, expected {record.n_bytes}"
            self._add("size", relative, message, remedy, array=layout.path, shard=shard)
        elif self._is_quick(group, shard):
            self.report.n_files += 1
        else:
            for chunk, message in damages_of_file(inside(self.root, relative), layout, shard, record):
                self._add("checksum", relative, message, remedy, array=layout.path, shard=shard, chunk=chunk)
            self._count(size)
        return len(self.report.problems) == before

    def _size(self, relative: str) -> int:
        if relative not in self.sizes:
            if self.mirror is not None:
                self.mirror.forget(relative)  # what counts is what the server sends now
            return inside(self.root, relative).stat().st_size
        size = self.sizes[relative]
        if size is None:
            raise FileNotFoundError(relative)
        return size

    # -------------------------------------------------------------------------------------------------- rest

    def _strangers(self) -> None:
        for path in walk(self.root):
            relative = path.relative_to(self.root).as_posix()
            if path.name.startswith(TMP_PREFIX):
                message = "left by a writer that was stopped, or one that is still at work"
                self._add("temporary", relative, message, "it is removed when the store is next written to")
            elif relative not in self.expected:
                self._add(
                    "orphan",
                    relative,
                    "belongs to nothing in this store",
                    "delete it if you did not put it there",
                )

    def _add(
        self,
        kind: str,
        path: str,
        message: str,
        remedy: str,
        *,
        array: str = "",
        shard: int | None = None,
        chunk: int | None = None,
    ) -> None:
        found = self.report.notes if kind in HARMLESS else self.report.problems
        if self.mirror is not None:
            remedy = "have it published again (kd cache copy), or use another copy"
        found.append(Problem(kind, path, message, remedy, array, shard, chunk))

    def _count(self, n_bytes: int) -> None:
        self.report.n_files += 1
        self.report.n_bytes += n_bytes
        if self.progress is not None:
            self.progress(min(self.report.n_bytes, self.total), self.total)
