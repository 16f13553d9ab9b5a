"""Random sequences of what people do with stores, killed writers and damage included, against an oracle.

More and longer sequences: MOLKD_SEQUENCES=100 MOLKD_STEPS=40 pytest tests/cache_schema/test_operations.py
"""

import os
import shutil
from collections.abc import Callable

from cache_example import TEACHER
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from operations_children import damaged_bytes, in_child, refusal
from operations_oracle import (
    ATOMS,
    SIGNALS,
    SIZES,
    Group,
    Rows,
    Shelf,
    check_damaged,
)  # fmt: skip
from operations_writing import Writing, number

from molkd.cache_schema.layout import record_path
from molkd.cache_schema.manifest import finalize
from molkd.cache_schema.repair import repair
from molkd.cache_schema.verify import verify
from molkd.cache_schema.writer import Store
from molkd.pipeline.sharing.adding import add_systems
from molkd.pipeline.sharing.copying import copy_store
from molkd.pipeline.sharing.merging import merge_stores
from molkd.pipeline.sharing.selection import Selection, select_systems

SEQUENCES = int(os.environ.get("MOLKD_SEQUENCES", "6"))
STEPS = int(os.environ.get("MOLKD_STEPS", "20"))
kill_at = st.none() | st.integers(1, 40)


class Operations(Writing):
    """What is done with several stores, and to them."""

    @rule(which=number, signals=st.sets(st.sampled_from(sorted(SIGNALS))), how=number, at=kill_at,
          sizes=st.sampled_from([(0, 1000), (0, 1000), (0, 90), (17, 400), (17, 1000)]), recode=st.booleans(),
          )  # fmt: skip
    def copy(
        self, which: int, signals: set[str], how: int, at: int | None, sizes: tuple[int, int], recode: bool
    ) -> None:
        """All or some systems and signals, as stored or narrower, in one go or killed and repeated."""
        for shelf in self._whole(which):
            known = {group.rpartition("/")[2]: group for group in shelf.groups if group != ATOMS}
            chosen = {k for k in shelf.shard_of if sizes[0] <= SIZES[k] <= sizes[1]}
            wanted = [known[name] for name in sorted(signals & known.keys())] or sorted(known.values())
            if chosen:
                self._copy(shelf, wanted, chosen, sizes, how, at, recode=recode)

    @rule(one=number, two=number, at=kill_at)
    def merge(self, one: int, two: int, at: int | None) -> None:
        """Two stores; where their encodings differ the narrowest is asked for."""
        whole = self._all_whole()
        if len(whole) < 2:
            return
        first = whole.pop(one % len(whole))
        parts = [first, whole[two % len(whole)]]
        target = self._new_path()
        if any(part.missing(ATOMS) for part in parts):
            assert refusal(lambda: merge_stores([part.path for part in parts], target))
            assert not target.exists()
            return
        sources = self._sources(parts)
        narrower = {}
        for group, owners in sources.items():
            encodings = SIGNALS[group.rpartition("/")[2]][1] if group != ATOMS else ("",)
            found = {part.groups[group].encoding for part in owners.values()}
            if len(found) > 1:
                narrower[group] = max(found, key=encodings.index)
        options = [f"{group.rpartition('/')[2]}={one}" for group, one in narrower.items()]
        paths = [part.path for part in parts]
        if options:
            assert "choose one: --encoding" in refusal(lambda: merge_stores(paths, target))
            shutil.rmtree(target)
        refused = self._run(lambda: merge_stores(paths, target, encoding=options), at)
        if "no finite row" in refused:
            shutil.rmtree(target)
            return
        assert not refused
        new = self._shelve(target, {})
        assert new.shard_of.keys() == parts[0].shard_of.keys() | parts[1].shard_of.keys()
        for group, owners in sources.items():
            used = [part.groups[group] for part in parts if part in list(owners.values())]
            encoding = narrower.get(group, used[0].encoding)
            rows = {k: owner.groups[group].rows[k] for k, owner in owners.items()}
            books = [part.book for part in used]
            same = all(b is books[0] or (b is not None and b.same_as(books[0])) for b in books)
            self._arrive(new, group, encoding, rows, as_stored=same and group not in narrower)

    @rule(one=number, two=number, at=kill_at)
    def append(self, one: int, two: int, at: int | None) -> None:
        """The systems of one store to those of another; for signals a teacher would have to run."""
        ready = [shelf for shelf in self._all_whole() if shelf.is_complete(ATOMS)]
        if not ready:
            return
        shelf, other, target = ready[one % len(ready)], ready[two % len(ready)], self._new_path()
        if shelf.groups.keys() != {ATOMS}:
            wanted = "give --teacher" if all(shelf.is_complete(g) for g in shelf.groups) else "not finished"
            assert wanted in refusal(lambda: add_systems(shelf.path, other.path, target))
            bare = self._new_path()
            copy_store(shelf.path, bare, signals=["none"])
            shelf = Shelf(bare, shelf.shard_of, {ATOMS: shelf.groups[ATOMS]})
        assert not self._run(lambda: add_systems(shelf.path, other.path, target), at)
        new = self._shelve(target, {})
        assert new.shard_of.keys() == shelf.shard_of.keys() | other.shard_of.keys()
        assert sorted(p.name for p in self.folder.glob("*.adding*")) == []
        rows = other.groups[ATOMS].rows | shelf.groups[ATOMS].rows
        self._arrive(new, ATOMS, "", rows, as_stored=True)

    @rule(
        which=number, file=number, place=number, how=st.sampled_from(["flip", "flip", "cut", "remove", "mix"])
    )
    def damage(self, which: int, file: int, place: int, how: str) -> None:
        """Any file: found, unless nothing that is committed depends on it."""
        shelf = self.shelves[which % len(self.shelves)]
        files = sorted(p for p in shelf.path.rglob("*") if p.is_file())
        path = files[file % len(files)]
        relative, raw = path.relative_to(shelf.path).as_posix(), path.read_bytes()
        changed = damaged_bytes(raw, place, how, files)
        if changed == raw:
            return
        self._let_go()
        harmless = self._harmless(shelf, relative, how)
        if shelf.backup is None:
            backup = self._new_path()
            shutil.copytree(shelf.path, backup)
        path.unlink() if changed is None else path.write_bytes(changed)
        if self._is_found(shelf.path):
            shelf.backup = shelf.backup or backup
            return
        assert shelf.backup is None, f"{relative}: {how} hides other damage"
        assert harmless, f"{relative}: {how} is not found"
        shutil.rmtree(backup)
        if relative == "manifest.json":
            shelf.has_manifest = False
        elif how == "remove" and relative.startswith("log/"):
            group, shard = relative[4:].rsplit("/", 1)
            assert relative == record_path(group, int(shard.split(".")[0]))
            for k in shelf.members(int(shard.split(".")[0])):
                shelf.groups[group].rows.pop(k)
        else:
            path.write_bytes(raw)

    @rule(which=number, places=st.lists(st.tuples(number, number), min_size=1, max_size=4), at=kill_at)
    def accident(self, which: int, places: list[tuple[int, int]], at: int | None) -> None:
        """Several files are damaged, and mended before anything else happens."""
        for file, place in places:
            self.damage(which, file, place, ("flip", "cut", "remove")[place % 3])
        if any(shelf.backup for shelf in self.shelves):
            self.everything_is_as_it_should_be()
            self.mend(0, 0, at)

    @precondition(lambda self: any(shelf.backup for shelf in self.shelves))
    @rule(which=number, source=number, at=kill_at)
    def mend(self, which: int, source: int, at: int | None) -> None:
        """From what the store was before, from another store, or from nothing."""
        damaged = [shelf for shelf in self.shelves if shelf.backup]
        shelf = damaged[which % len(damaged)]
        others = [other.path for other in self._all_whole()]
        copy = [shelf.backup, shelf.backup, None, *others][source % (3 + len(others))]
        refused = self._run(lambda: repair(shelf.path, copy), at)
        assert not refused or copy != shelf.backup
        if self._is_found(shelf.path):
            assert copy != shelf.backup, verify(shelf.path).problems
            return
        self._adopt(shelf, next((other for other in self.shelves if other.path == copy), None))
        shutil.rmtree(shelf.backup)
        shelf.backup = None

    @precondition(lambda self: any(shelf.backup for shelf in self.shelves))
    @rule(which=number, how=st.sampled_from(["copy", "merge", "finish"]))
    def use_damaged(self, which: int, how: str) -> None:
        """Nothing wrong comes out of a damaged store."""
        damaged = [shelf for shelf in self.shelves if shelf.backup]
        shelf, target = damaged[which % len(damaged)], self._new_path()
        if how == "finish":
            refusal(lambda: finalize(Store.open(shelf.path, "a")))
            assert self._is_found(shelf.path)
            return
        parts = [shelf.path, *(other.path for other in self._all_whole()[:1])]
        act = (
            (lambda: copy_store(shelf.path, target))
            if how == "copy"
            else (lambda: merge_stores(parts, target))
        )
        refused = refusal(act)
        if target.exists():
            assert not self._is_found(target)
            if how == "copy":
                shadow = Shelf(target, shelf.shard_of, shelf.groups)
                check_damaged(self.pool, shadow)
                assert refused or all(not shelf.missing(group) for group in shelf.groups)
            shutil.rmtree(target)

    # ----------------------------------------------------------------------------------------------- details

    def _copy(
        self,
        shelf: Shelf,
        wanted: list[str],
        chosen: set[int],
        sizes: tuple[int, int],
        how: int,
        at: int | None,
        *,
        recode: bool,
    ) -> None:
        encodings, named = {}, []
        for group in wanted:
            name = group.rpartition("/")[2]
            there = SIGNALS[name][1]
            offers = there[there.index(shelf.groups[group].encoding) :]
            encodings[group] = offers[how % len(offers)] if recode else offers[0]
            named += [f"{name}={encodings[group]}"] if recode and len(there) > 1 else []  # energies stay fp64
        target = self._new_path()
        arguments = {
            "signals": [group.rpartition("/")[2] for group in wanted],
            "selection": self._selection(shelf, chosen, sizes, how),
            "encoding": named,
        }
        may = not any(shelf.missing(group) for group in (ATOMS, *wanted))
        refused = self._run(lambda: copy_store(shelf.path, target, **arguments), at if may else None)
        if not may or "no finite row" in refused:
            assert refused
            shutil.rmtree(target, ignore_errors=True)
            return
        assert not refused
        new = self._shelve(target, {})
        assert new.shard_of.keys() == chosen
        for group in (ATOMS, *wanted):
            stored = shelf.groups[group]
            encoding = encodings.get(group, "")
            rows = {k: stored.rows[k] for k in chosen}
            self._arrive(new, group, encoding, rows, as_stored=encoding == stored.encoding)

    def _sources(self, parts: list[Shelf]) -> dict[str, dict[int, Shelf]]:
        """Return the groups that a merge holds, and from which store each system comes."""
        everyone = parts[0].shard_of | parts[1].shard_of
        sources = {}
        for group in sorted({name for part in parts for name in part.groups}):
            owners: dict[int, Shelf] = {}
            for part in parts:
                for k, rows in part.groups.get(group, Group("")).rows.items():
                    if k not in owners or (owners[k].groups[group].rows[k].is_bad and not rows.is_bad):
                        owners[k] = part
            if owners.keys() == everyone.keys():
                sources[group] = owners
        return sources

    def _selection(self, shelf: Shelf, chosen: set[int], sizes: tuple[int, int], how: int) -> Selection:
        """Choose by size, directly or through a file of ids."""
        if sizes == (0, 1000):
            return Selection()
        selection = Selection(min_atoms=sizes[0], max_atoms=sizes[1])
        if how % 2:
            return selection
        listed = self.folder / "ids.txt"
        select_systems(shelf.path, listed, selection)
        ids = [bytes.fromhex(line) for line in listed.read_text().splitlines() if line[0] != "#"]
        assert {self.pool.number[one] for one in ids} == chosen
        return Selection(systems=listed)

    def _run(self, act: Callable[[], object], at: int | None) -> str:
        """Do it, or have it killed and do it again; return the message if it is refused."""
        if at is not None:
            in_child(lambda: refusal(act), at)
        return refusal(act)

    def _harmless(self, shelf: Shelf, relative: str, how: str) -> bool:
        """Say whether nothing that is committed depends on a file."""
        if shelf.backup:
            return False
        if relative in {note.path for note in verify(shelf.path).notes}:
            return True
        if how == "remove" and (relative == "manifest.json" or relative.startswith("log/")):
            return not (relative.startswith("log/") and self._in_manifest(shelf, relative))
        of_teacher = f"data.zarr/teachers/{TEACHER}"
        if relative == f"{of_teacher}/zarr.json":
            return not any(g.rows for n, g in shelf.groups.items() if n != ATOMS)
        groups = [g for n, g in shelf.groups.items() if relative.startswith(f"data.zarr/{n}/")]
        return not shelf.has_manifest and any(not g.rows for g in groups)

    def _in_manifest(self, shelf: Shelf, record: str) -> bool:
        return (
            shelf.has_manifest
            and f'"{record[4:].rsplit("/", 1)[0]}"' in (shelf.path / "manifest.json").read_text()
        )

    def _adopt(self, shelf: Shelf, other: Shelf | None) -> None:
        """Take note of shards that a repair took from a store that has more of them."""
        shelf.has_manifest = (shelf.path / "manifest.json").exists()
        store = Store.open(shelf.path)
        for group in store.groups:
            there = {s for s in range(shelf.n_shards) if s not in store.missing_shards(group)}
            ours = shelf.groups.setdefault(group, Group(""))
            assert there >= {shelf.shard_of[k] for k in ours.rows}
            for k, shard in shelf.shard_of.items():
                if shard in there and k not in ours.rows:
                    assert other is not None
                    ours.encoding, ours.book = other.groups[group].encoding, other.groups[group].book
                    ours.rows[k] = Rows(dict(other.groups[group].rows[k].values), ours.book, True)
        shelf.has_teacher = TEACHER in store.teachers


TestOperations = Operations.TestCase
TestOperations.settings = settings(
    max_examples=SEQUENCES,
    stateful_step_count=STEPS,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # to shrink a sequence takes many minutes
    suppress_health_check=list(HealthCheck),
)
