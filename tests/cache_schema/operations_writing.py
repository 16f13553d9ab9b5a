"""The part of the state machine of test_operations.py that makes, fills and reads stores."""

import contextlib
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from cache_example import PROVENANCE, TEACHER, create, shard_arrays, write_shard
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from operations_children import in_child, refusal
from operations_oracle import (
    ATOMS,
    SIGNALS,
    SIZES,
    Book,
    Group,
    Rows,
    Shelf,
    check,
    check_damaged,
    make_pool,
    narrowed,
    read_together,
)  # fmt: skip

from molkd.cache_schema.encoding import is_fitted
from molkd.cache_schema.errors import CacheError, ConflictError
from molkd.cache_schema.fitting import fit_codebook
from molkd.cache_schema.manifest import finalize
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.verify import verify
from molkd.cache_schema.writer import Store

MOST_SHELVES = 4
number = st.integers(0, 1 << 16)  # picks one of what is there, whatever there is
systems = st.integers(0, len(SIZES) - 1)
names = st.lists(st.sampled_from(sorted(SIGNALS)), unique=True)


class Writing(RuleBasedStateMachine):
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

    @initialize(leave=st.sets(systems, max_size=5), seed=st.integers(0, 3), how=st.tuples(number, number))
    def begin(self, leave: set[int], seed: int, how: tuple[int, int]) -> None:
        self.create({*range(len(SIZES))} - leave, seed, ["node", "v2v", "edge"], how, share=1.0)

    @rule(
        chosen=st.sets(systems, min_size=1),
        seed=st.integers(0, 3),
        names=names,
        how=st.tuples(number, number),
        share=st.floats(0.5, 2),
    )
    def create(
        self, chosen: set[int], seed: int, names: list[str], how: tuple[int, int], share: float
    ) -> None:
        """With some signals; shares from 1 on are complete."""
        path = self._new_path()
        create(path, self.pool.example.reordered(np.array(sorted(chosen))), seed=seed)
        shelf = self._shelve(path, {ATOMS: Group("")})
        which = self._all_whole().index(shelf)
        for k, name in enumerate(names):
            self.add_signal(which, name, how[k % 2] + k, 2)
        self.fill(which, share)

    @rule(which=number, what=number, pieces=st.integers(1, 4), is_bad=st.integers(0, 5))
    def write(self, which: int, what: int, pieces: int, is_bad: int) -> None:
        """One missing shard."""
        for shelf, group, shard, store in self._missing(which, what):
            bad = [store.systems_of_shard(shard)[-1]] if is_bad == 0 and group != ATOMS else []
            write_shard(store, self.pool.example, group, shard, pieces, bad)
            self._committed(shelf, store, group, shard, bad)

    @rule(which=number, share=st.floats(0.5, 2))
    def fill(self, which: int, share: float) -> None:
        """Every missing shard, or some."""
        for shelf in self._whole(which):
            todo = [(group, shard) for group in shelf.groups for shard in shelf.missing(group)]
            store = self._open(shelf)
            for group, shard in todo[: int(np.ceil(share * len(todo)))]:
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
            encodings = SIGNALS[name][1]
            self._add_signal(shelf, name, encodings[how % len(encodings)], fit_to)

    @rule(which=number)
    def finish(self, which: int) -> None:
        for shelf in self._whole(which):
            refused = refusal(lambda shelf=shelf: finalize(self._open(shelf)))
            assert bool(refused) == any(shelf.missing(group) for group in shelf.groups)
            shelf.has_manifest |= not refused

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
                for (_, k), found in zip(there[-2:], read_together(cache, index, name), strict=True):
                    rows[k].check(found)

    # ----------------------------------------------------------------------------------------------- details

    def _add_signal(self, shelf: Shelf, name: str, encoding: str, fit_to: int) -> None:
        spec, group, store = SIGNALS[name][0], f"teachers/{TEACHER}/{name}", self._open(shelf)
        store.add_teacher(TEACHER, PROVENANCE)
        shelf.has_teacher = True
        book = None
        if is_fitted(encoding):
            fitted = store.input_index[:fit_to]
            rows = np.concatenate([self.pool.given(group, k)["values"] for k in fitted])
            if not len(rows):
                return
            book = fit_codebook(rows, spec, encoding, len(fitted))
        known = shelf.groups.get(group)
        refused = refusal(lambda: store.add_signal(TEACHER, spec, encoding, book))
        if known is not None and known.rows and known.encoding != encoding:
            assert "is stored as" in refused
            return
        assert not refused
        if known is None or known.encoding != encoding:
            shelf.groups[group] = Group(encoding, self._book(shelf, group, encoding))

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
            stored.rows[k] = Rows(values, stored.book, True) if as_stored else narrowed(values, stored)
        shelf.groups[group] = stored

    def _let_go(self) -> None:
        if self.held is not None:
            self.held[1].close()
        self.held = None

    def _is_found(self, path: Path) -> bool:
        try:
            return not verify(path).ok
        except CacheError:
            return True
