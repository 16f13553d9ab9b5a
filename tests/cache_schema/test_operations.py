"""Random sequences of what people do with stores, killed writers and damage included, against an oracle.

More and longer sequences: MOLKD_SEQUENCES=100 MOLKD_STEPS=40 pytest tests/cache_schema/test_operations.py
"""

import contextlib
import os
import shutil
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cache_example import PROVENANCE, TEACHER, create, make_example, shard_arrays, write_shard
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from operations_oracle import (
    ATOMS,
    SIGNALS,
    Book,
    Group,
    Pool,
    Rows,
    Shelf,
    check,
    check_damaged,
    narrowed,
)

from molkd.cache_schema.encoding import is_fitted
from molkd.cache_schema.errors import CacheError, ConflictError, MolkdError
from molkd.cache_schema.fitting import fit_codebook
from molkd.cache_schema.identity import system_id
from molkd.cache_schema.layout import record_path
from molkd.cache_schema.manifest import finalize
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.repair import repair
from molkd.cache_schema.verify import verify
from molkd.cache_schema.writer import Store
from molkd.pipeline.sharing.adding import add_systems
from molkd.pipeline.sharing.copying import copy_store
from molkd.pipeline.sharing.merging import merge_stores
from molkd.pipeline.sharing.selection import Selection, select_systems

SEQUENCES = int(os.environ.get("MOLKD_SEQUENCES", "6"))
STEPS = int(os.environ.get("MOLKD_STEPS", "16"))
SIZES = (5, 300, 17, 1, 600, 80, 700, 33, 512, 2, 90, 400)
MOST_SHELVES = 4
CHANGES = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir"}
number = st.integers(0, 1 << 16)  # picks one of what is there, whatever there is
kill_at = st.none() | st.integers(1, 40)


def make_pool() -> Pool:
    """Return systems as a file could hold them: no cell where nothing is periodic."""
    example = make_example(SIZES, seed=7)
    example.system["cell"][~example.system["pbc"].any(axis=1)] = 0
    for k in range(len(SIZES)):
        rows = example.atom_rows([k])
        numbers, positions = (example.atoms[name][rows] for name in ("atomic_numbers", "positions"))
        name = system_id(numbers, positions, example.system["cell"][k], example.system["pbc"][k])
        example.ids[k] = np.frombuffer(name, np.uint8)
    return Pool(example)


def in_child(act: Callable[[], object], kill_at: int) -> bool:
    """Do it in a forked process that is killed before its n-th change on disk; return whether it was."""
    receive, send = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of other tests take no part in this
        pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        seen = 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal seen
            flags = arguments[2] if event == "open" else 0
            if event in CHANGES or (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_CREAT)):
                seen += 1
                if seen == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            import sys

            sys.addaudithook(hook)
            act()
            code = 0
        except BaseException:
            os.write(send, traceback.format_exc().encode()[-4000:])
        finally:
            os._exit(code)
    os.close(send)
    with os.fdopen(receive) as text:
        said = text.read()
    status = os.waitpid(pid, 0)[1]
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or status == 0, said
    return killed


def refusal(act: Callable[[], object]) -> str:
    """Do it and return the message if it is refused."""
    try:
        act()
    except MolkdError as error:
        return str(error) or "refused"
    return ""


class Operations(RuleBasedStateMachine):
    """Stores on a shelf, each beside what it should hold."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="operations-"))
        self.pool = make_pool()
        self.shelves: list[Shelf] = []
        self.held: tuple[Shelf, Cache] | None = None
        self.n_made = 0
        self.rng = np.random.default_rng(0)

    def teardown(self) -> None:
        self._let_go()
        shutil.rmtree(self.folder)

    # ------------------------------------------------------------------------------------------ what is done

    @initialize(chosen=st.sets(st.integers(0, len(SIZES) - 1), min_size=3))
    def begin(self, chosen: set[int]) -> None:
        self._create(sorted(chosen), 3)
        self.fill(0)

    @rule(chosen=st.sets(st.integers(0, len(SIZES) - 1), min_size=1), seed=st.integers(0, 3))
    def create(self, chosen: set[int], seed: int) -> None:
        self._create(sorted(chosen), seed)

    @rule(which=number, what=number, pieces=st.integers(1, 4), is_bad=st.integers(0, 5))
    def write(self, which: int, what: int, pieces: int, is_bad: int) -> None:
        """One missing shard."""
        for shelf, group, shard, store in self._missing(which, what):
            bad = [store.systems_of_shard(shard)[-1]] if is_bad == 0 and group != ATOMS else []
            write_shard(store, self.pool.example, group, shard, pieces, bad)
            self._committed(shelf, store, group, shard, bad)

    @rule(which=number)
    def fill(self, which: int) -> None:
        """Every missing shard."""
        for shelf in self._whole(which):
            store = self._open(shelf)
            for group in store.groups:
                for shard in store.missing_shards(group):
                    write_shard(store, self.pool.example, group, shard)
                    self._committed(shelf, store, group, shard)

    @rule(which=number, what=number, share=st.floats(0, 1))
    def writer_fails(self, which: int, what: int, share: float) -> None:
        """After some rows."""
        for _, group, shard, store in self._missing(which, what):
            arrays = shard_arrays(store, self.pool.example, group, shard)
            with contextlib.suppress(ZeroDivisionError), store.shard_writer(group, shard) as writer:
                if "n_edges" not in arrays:
                    n = int(share * len(next(iter(arrays.values()))))
                    writer.write({name: values[:n] for name, values in arrays.items()})
                raise ZeroDivisionError

    @rule(which=number, what=number, at=st.integers(1, 14))
    def writer_is_killed(self, which: int, what: int, at: int) -> None:
        for shelf, group, shard, store in self._missing(which, what):
            in_child(lambda a=(store, self.pool.example, group, shard): write_shard(*a), at)
            if shard not in store.missing_shards(group):
                self._committed(shelf, store, group, shard)

    @rule(which=number, what=number)
    def other_values_are_refused(self, which: int, what: int) -> None:
        """A committed shard is never overwritten."""
        for shelf in self._whole(which):
            names = [n for n, g in shelf.groups.items() if g.rows and not n.endswith(("edge", ATOMS))]
            if names:
                group = names[what % len(names)]
                store, rows = self._open(shelf), shelf.groups[group].rows
                shard = shelf.shard_of[sorted(rows)[what % len(rows)]]
                values = shard_arrays(store, self.pool.example, group, shard)["values"]
                with pytest.raises(ConflictError), store.shard_writer(group, shard) as writer:
                    writer.write({"values": 3 - 2 * values[::-1]})

    @rule(which=number, name=st.sampled_from(sorted(SIGNALS)), how=number, fit_to=st.integers(1, 3))
    def add_signal(self, which: int, name: str, how: int, fit_to: int) -> None:
        """A new one, one that is there, or one in another encoding."""
        for shelf in self._whole(which):
            spec, encodings = SIGNALS[name]
            encoding, group = encodings[how % len(encodings)], f"teachers/{TEACHER}/{name}"
            store = self._open(shelf)
            store.add_teacher(TEACHER, PROVENANCE)
            shelf.has_teacher = True
            book = None
            if is_fitted(encoding):
                systems = store.input_index[:fit_to]
                rows = np.concatenate([self.pool.given(group, k)["values"] for k in systems])
                if not len(rows):
                    return
                book = fit_codebook(rows, spec, encoding, len(systems))
            known = shelf.groups.get(group)
            refused = refusal(lambda: store.add_signal(TEACHER, spec, encoding, book))
            if known is not None and known.rows and known.encoding != encoding:
                assert "is stored as" in refused
                return
            assert not refused
            if known is None or known.encoding != encoding:
                shelf.groups[group] = Group(encoding, self._book(shelf, group, encoding))

    @rule(which=number)
    def finish(self, which: int) -> None:
        for shelf in self._whole(which):
            refused = refusal(lambda shelf=shelf: finalize(self._open(shelf)))
            assert bool(refused) == any(shelf.missing(group) for group in shelf.groups)
            shelf.has_manifest |= not refused

    @rule(which=number, signals=st.sets(st.sampled_from(sorted(SIGNALS))), how=number, at=kill_at,
          most=st.sampled_from([0, 0, 0, 90, 400]), least=st.sampled_from([0, 0, 17]), recode=st.booleans())  # fmt: skip
    def copy(self, which: int, signals: set[str], how: int, at: int | None, most: int, least: int, recode: bool) -> None:  # fmt: skip
        """All or some systems, all or some signals, as stored or narrower, in one go or killed and repeated."""
        for shelf in self._whole(which):
            names = sorted(name for name in signals if f"teachers/{TEACHER}/{name}" in shelf.groups)
            wanted = [f"teachers/{TEACHER}/{name}" for name in names] or sorted(shelf.groups.keys() - {ATOMS})
            chosen = {k for k in shelf.shard_of if least <= SIZES[k] and (not most or SIZES[k] <= most)}
            narrower = {}
            for group in wanted if recode else ():
                encodings = SIGNALS[group.rpartition("/")[2]][1]
                offers = encodings[encodings.index(shelf.groups[group].encoding) :]
                narrower[group] = offers[how % len(offers)]
            target = self._new_path()
            arguments = {
                "signals": names,
                "selection": self._selection(shelf, chosen, least, most, how),
                "encoding": [f"{group.rpartition('/')[2]}={one}" for group, one in narrower.items()],
            }
            if not chosen:
                return
            may = not any(shelf.missing(group) for group in (ATOMS, *wanted))
            refused = self._run(lambda a=arguments: copy_store(shelf.path, target, **a), at if may else None)
            if not may or "no finite row" in refused:
                assert refused
                shutil.rmtree(target, ignore_errors=True)
                return
            assert not refused
            new = self._shelve(target, {})
            assert new.shard_of.keys() == chosen
            for group in (ATOMS, *wanted):
                encoding = narrower.get(group, shelf.groups[group].encoding)
                rows = {k: shelf.groups[group].rows[k] for k in chosen}
                self._arrive(new, group, encoding, rows, as_stored=encoding == shelf.groups[group].encoding)

    @rule(one=number, two=number, at=kill_at)
    def merge(self, one: int, two: int, at: int | None) -> None:
        """Two stores; where their encodings differ the narrowest is asked for."""
        parts = [*self._whole(one), *self._whole(two)]
        if len(parts) < 2 or parts[0] is parts[1]:
            return
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
        """The systems of one store to another one that has no signals; a teacher would have to run for those."""
        bare = [shelf for shelf in self._all_whole() if shelf.groups.keys() == {ATOMS}]
        if not bare:
            return
        shelf, (other,) = bare[one % len(bare)], self._whole(two) or (None,)
        target = self._new_path()
        may = other is not None and shelf.is_complete(ATOMS) and other.is_complete(ATOMS)
        if not may:
            return
        assert not self._run(lambda: add_systems(shelf.path, other.path, target), at)
        new = self._shelve(target, {})
        assert new.shard_of.keys() == shelf.shard_of.keys() | other.shard_of.keys()
        assert sorted(p.name for p in self.folder.glob("*.adding*")) == []
        rows = other.groups[ATOMS].rows | shelf.groups[ATOMS].rows
        self._arrive(new, ATOMS, "", rows, as_stored=True)

    @rule(which=number, file=number, place=number, how=st.sampled_from(["flip", "flip", "cut", "remove", "mix"]))
    def damage(self, which: int, file: int, place: int, how: str) -> None:
        """Any file: found, unless nothing that is committed depends on it."""
        shelf = self.shelves[which % len(self.shelves)]
        files = sorted(p for p in shelf.path.rglob("*") if p.is_file())
        path = files[file % len(files)]
        relative, raw = path.relative_to(shelf.path).as_posix(), path.read_bytes()
        changed = self._damaged(raw, place, how, files)
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
        act = (lambda: copy_store(shelf.path, target)) if how == "copy" else (lambda: merge_stores(parts, target))
        refused = refusal(act)
        if target.exists():
            assert not self._is_found(target)
            if how == "copy":
                shadow = Shelf(target, shelf.shard_of, shelf.groups)
                check_damaged(self.pool, shadow)
                assert refused or all(not shelf.missing(group) for group in shelf.groups)
            shutil.rmtree(target)

    @rule(which=number)
    def hold(self, which: int) -> None:
        """Open a store and read from it while others write."""
        self._let_go()
        for shelf in self._whole(which):
            self.held = (shelf, Cache.open(shelf.path))

    @precondition(lambda self: len(self.shelves) > 1)
    @rule(which=number)
    def drop(self, which: int) -> None:
        shelf = self.shelves.pop(which % len(self.shelves))
        self._let_go()
        shutil.rmtree(shelf.path)
        if shelf.backup:
            shutil.rmtree(shelf.backup)

    # --------------------------------------------------------------------------------------- what must be so

    @invariant()
    def everything_is_as_it_should_be(self) -> None:
        for shelf in self.shelves:
            if shelf.backup:
                assert self._is_found(shelf.path)
                check_damaged(self.pool, shelf)
            else:
                check(self.pool, shelf, self.rng)
        if self.held is not None:
            shelf, cache = self.held
            seen = {name: cache.state(name) for name in shelf.groups if name in cache._states}
            for name, state in seen.items():
                rows = shelf.groups[name].rows
                there = [
                    (i, k)
                    for i, k in enumerate(self.pool.who(cache.ids))
                    if shelf.shard_of[k] not in state.missing_shards
                ]
                index = np.array([i for i, _ in there[-2:]], dtype=int)
                from operations_oracle import read_system

                for (_, k), found in zip(there[-2:], read_system(cache, index, name), strict=True):
                    rows[k].check(found)

    # ----------------------------------------------------------------------------------------------- details

    def _create(self, chosen: list[int], seed: int) -> None:
        path = self._new_path()
        create(path, self.pool.example.reordered(np.array(chosen)), seed=seed)
        self._shelve(path, {ATOMS: Group("")})

    def _new_path(self) -> Path:
        self.n_made += 1
        return self.folder / f"{self.n_made}.kdcache"

    def _shelve(self, path: Path, groups: dict[str, Group]) -> Shelf:
        shelf = self.pool.new_shelf(path)
        shelf.groups = groups
        shelf.has_manifest = (path / "manifest.json").exists()
        self.shelves.append(shelf)
        if len(self.shelves) > MOST_SHELVES:
            self.drop(0)
        return shelf

    def _all_whole(self) -> list[Shelf]:
        return [shelf for shelf in self.shelves if not shelf.backup]

    def _whole(self, which: int) -> list[Shelf]:
        """Return one store that is not damaged, if there is one."""
        whole = self._all_whole()
        return [whole[which % len(whole)]] if whole else []

    def _open(self, shelf: Shelf) -> Store:
        store = Store.open(shelf.path, "a")
        store.input_index = self.pool.who(store.systems.id)
        return store

    def _missing(self, which: int, what: int) -> list[tuple[Shelf, str, int, Store]]:
        """Return one shard that is not written yet, if there is one."""
        shelves = [s for s in self._all_whole() if any(s.missing(group) for group in s.groups)]
        if not shelves:
            return []
        shelf = shelves[which % len(shelves)]
        pairs = [(group, shard) for group in sorted(shelf.groups) for shard in shelf.missing(group)]
        return [(shelf, *pairs[what % len(pairs)], self._open(shelf))]

    def _committed(self, shelf: Shelf, store: Store, group: str, shard: int, bad: list[int] = []) -> None:  # noqa: B006
        stored = shelf.groups[group]
        for i in store.systems_of_shard(shard):
            k = int(store.input_index[i])
            stored.rows[k] = self.pool.written(group, k, stored, is_bad=i in bad)

    def _book(self, shelf: Shelf, group: str, encoding: str) -> Book | None:
        return Book.read(shelf.path / "data.zarr" / group) if is_fitted(encoding) else None

    def _arrive(
        self, shelf: Shelf, group: str, encoding: str, rows: dict[int, Rows], *, as_stored: bool
    ) -> None:
        """Expect rows of other stores in a new one, which is finished with this."""
        shelf.has_teacher |= group != ATOMS
        stored = Group(encoding, self._book(shelf, group, encoding))
        for k, one in rows.items():
            values = dict(one.values)
            stored.rows[k] = Rows(values) if as_stored else narrowed(values, stored)
        shelf.groups[group] = stored

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

    def _selection(self, shelf: Shelf, chosen: set[int], least: int, most: int, how: int) -> Selection:
        """Choose by size, directly or through a file of ids."""
        selection = Selection(min_atoms=least, max_atoms=most)
        if how % 2 or not chosen or shelf.missing(ATOMS):
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

    def _damaged(self, raw: bytes, place: int, how: str, files: list[Path]) -> bytes | None:
        if how == "remove":
            return None
        if how == "cut":
            return raw[: place % max(len(raw), 1)]
        if how == "mix":
            same = [p.read_bytes() for p in files if p.stat().st_size == len(raw)]
            return same[place % len(same)]
        changed = bytearray(raw)
        if raw:
            bit = place * 7919 % (8 * len(raw))
            changed[bit // 8] ^= 1 << bit % 8
        return bytes(changed)

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
        return shelf.has_manifest and f'"{record[4:].rsplit("/", 1)[0]}"' in (shelf.path / "manifest.json").read_text()

    def _is_found(self, path: Path) -> bool:
        try:
            return not verify(path).ok
        except CacheError:
            return True

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
                    ours.rows[k] = Rows(dict(other.groups[group].rows[k].values))
        shelf.has_teacher = TEACHER in store.teachers

    def _let_go(self) -> None:
        if self.held is not None:
            self.held[1].close()
        self.held = None


TestOperations = Operations.TestCase
TestOperations.settings = settings(
    max_examples=SEQUENCES,
    stateful_step_count=STEPS,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
