"""What stores should hold, in plain dicts of arrays by system, and the comparison of a store with it.

Systems are numbered as in the pool of all systems (`cache_example.Example`). Nothing here decodes or encodes
with the package's own code: how far a fitted encoding may be off follows from the files of its codebook.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from cache_example import TEACHER, Example, make_example

from molkd.cache_schema.errors import CacheError, MolkdError
from molkd.cache_schema.fields import ATOM_FIELDS, FieldSpec, edge_spec, energy_spec, node_spec, v2v_spec
from molkd.cache_schema.identity import system_id
from molkd.cache_schema.reader import Cache
from molkd.cache_schema.verify import verify
from molkd.cache_schema.writer import Store

ATOMS = "atoms"
SIGNALS: dict[str, tuple[FieldSpec, tuple[str, ...]]] = {  # encodings from the widest to the narrowest
    "node": (node_spec(4), ("fp32", "fp16", "int8", "pca:3")),
    "v2v": (v2v_spec(3), ("fp32", "int8", "pca:2")),
    "energy": (energy_spec(), ("fp64",)),
    "edge": (edge_spec(2, max_per_atom=3), ("fp16", "int8")),
}
SIZES = (5, 300, 17, 1, 600, 80, 700, 33, 512, 2, 90, 400)  # atoms of all systems
_LARGEST_CODE = {16: 32767, 8: 127, 4: 7}
_FLOAT32 = 2e-6  # of the largest number of a row: what sums of a few products in float32 may be off
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Book:
    """A codebook as its files say, float64."""

    step: np.ndarray  # (K,)
    limit: np.ndarray  # (K,)
    mean: np.ndarray  # (C,)
    basis: np.ndarray  # (K, C)

    @classmethod
    def read(cls, folder: Path) -> "Book":
        """Read what lies beside the codes of a signal."""
        step = np.fromfile(folder / "step/c/0", "<f4").astype(np.float64)
        bits, basis, n = np.full(len(step), 8), np.eye(len(step)), len(step)
        if (folder / "basis").exists():
            bits = np.fromfile(folder / "bits/c/0", np.uint8)
            basis = np.fromfile(folder / "basis/c/0/0", "<f4").reshape(len(step), -1).astype(np.float64)
            n = basis.shape[1]
        mean = np.fromfile(folder / "mean/c/0", "<f4") if (folder / "mean").exists() else np.zeros(n)
        return cls(step, np.array([_LARGEST_CODE[b] for b in bits.tolist()]), mean.astype(np.float64), basis)

    @property
    def is_rotated(self) -> bool:
        """Whether a matrix product is part of decoding."""
        return not np.array_equal(self.basis, np.eye(len(self.step)))

    def same_as(self, other: "Book | None") -> bool:
        """Say whether codes mean the same."""
        pairs = [] if other is None else [(getattr(self, k), getattr(other, k)) for k in vars(self)]
        return other is not None and all(np.array_equal(a, b) for a, b in pairs)

    def assert_near(self, found: np.ndarray, given: np.ndarray) -> None:
        """Every stored component is off by at most half a step times the scale of its row; no other is."""
        z, stored = ((x.astype(np.float64) - self.mean) @ self.basis.T for x in (given, found))
        others = tuple(range(1, z.ndim))
        unit = np.abs(z / (self.step * self.limit)).max(axis=others, initial=0.0, keepdims=True)
        scale = np.maximum(unit * (1 + 2.0**-9), 2.0**-14)  # rounded up to half precision
        blur = _FLOAT32 * np.abs(given).max(axis=others, initial=1.0, keepdims=True)
        assert (np.abs(z - stored) <= 0.5 * self.step * scale * (1 + 1e-4) + blur).all()
        assert (np.abs(found - self.mean - stored @ self.basis) <= 4 * blur).all()


@dataclass
class Rows:
    """One system of one group: exactly `values`; with `book` something near them, until it is read once."""

    values: Arrays
    book: Book | None = None
    was_read: bool = False

    def check(self, found: Arrays) -> None:
        """Compare, and remember what was read."""
        assert found.keys() == self.values.keys()
        for name, values in self.values.items():
            if self.book is None or name != "values":
                np.testing.assert_array_equal(found[name], values)
                continue
            unknown = np.isnan(values).any(axis=tuple(range(1, values.ndim)))
            assert np.isnan(found[name][unknown]).all()
            if self.was_read:  # how many rows are rotated together shows in the last bit
                blur = _FLOAT32 * np.abs(values[~unknown]).max(initial=1.0) * self.book.is_rotated
                np.testing.assert_allclose(found[name], values, rtol=0, atol=blur)
            else:
                self.book.assert_near(found[name][~unknown], values[~unknown])
        if not self.was_read:
            self.values, self.was_read = found, True

    @property
    def is_bad(self) -> bool:
        """Whether the teacher gave the system up."""
        values = self.values.get("values", np.empty(0))
        return bool(len(values)) and bool(np.isnan(values).all())


@dataclass
class Group:
    """What of a group is committed."""

    encoding: str
    book: Book | None = None
    rows: dict[int, Rows] = field(default_factory=dict)  # by system; of committed shards only


@dataclass
class Shelf:
    """A store and what it should hold.

    Attributes
    ----------
    shard_of : of every system in it
    has_manifest : whether it is there
    backup : what it was before it was damaged; None while it is whole
    """

    path: Path
    shard_of: dict[int, int]
    groups: dict[str, Group]
    has_teacher: bool = False
    has_manifest: bool = False
    backup: Path | None = None

    @property
    def n_shards(self) -> int:
        return max(self.shard_of.values()) + 1

    def members(self, shard: int) -> list[int]:
        return [k for k, own in self.shard_of.items() if own == shard]

    def missing(self, group: str) -> list[int]:
        rows = self.groups[group].rows
        return [s for s in range(self.n_shards) if not all(k in rows for k in self.members(s))]

    def is_complete(self, group: str) -> bool:
        return not self.missing(group)


class Pool:
    """All systems that any store holds, and what the teacher says of them."""

    def __init__(self, example: Example) -> None:
        self.example = example
        self.number = {row.tobytes(): k for k, row in enumerate(example.ids)}

    def who(self, ids: np.ndarray) -> np.ndarray:
        """Return the number of each system."""
        return np.array([self.number[row.tobytes()] for row in ids])

    def given(self, group: str, system: int) -> Arrays:
        """Return what is written for a system."""
        if group == ATOMS:
            rows = self.example.atom_rows([system])
            return {name: values[rows] for name, values in self.example.atoms.items()}
        name = group.rpartition("/")[2]
        if name == "edge":
            return self.example.edges_of([system])
        rows = [system] if name == "energy" else self.example.atom_rows([system])
        return {"values": self.example.signals[name][rows]}

    def written(self, group: str, system: int, stored: Group, *, is_bad: bool = False) -> Rows:
        """Return what may be read after that."""
        return narrowed(self.given(group, system), stored, is_bad=is_bad)

    def new_shelf(self, path: Path) -> Shelf:
        """Return the oracle of a store without any rows."""
        store = Store.open(path)
        shard_of = dict(zip(self.who(store.systems.id).tolist(), store.systems.shard.tolist(), strict=True))
        return Shelf(path, shard_of, {ATOMS: Group("")})


def narrowed(values: Arrays, stored: Group, *, is_bad: bool = False) -> Rows:
    """Return what may be read of values once they are stored."""
    values = dict(values)
    if is_bad:
        values["values"] = np.full_like(values["values"], np.nan)
    if stored.encoding in ("fp16", "fp32"):
        narrow = values["values"].astype({"fp16": np.float16, "fp32": np.float32}[stored.encoding])
        values["values"] = narrow.astype(np.float32)
    return Rows(values, stored.book)


def read_together(cache: Cache, index: np.ndarray, group: str) -> list[Arrays]:
    """Read systems together; return the arrays of each."""
    if group == ATOMS:
        arrays = cache.read(index, tuple(ATOM_FIELDS))
        return _split({name: arrays[name] for name in ATOM_FIELDS}, arrays["n_atoms"])
    name = group.rpartition("/")[2]
    arrays = cache.read(index, (), TEACHER, (name,))
    values = arrays[f"teacher/{name}"]
    if name != "edge":
        return _split({"values": values}, np.ones_like(index) if name == "energy" else arrays["n_atoms"])
    n_edges, first = arrays["teacher/edge/n_edges"], np.cumsum(arrays["n_atoms"]) - arrays["n_atoms"]
    edges = {"values": values, "index": arrays["teacher/edge/index"].T - np.repeat(first, n_edges)[:, None]}
    return [
        one | {"n_edges": n_edges[k : k + 1]}
        for k, one in enumerate(_split(edges | {"shift": arrays["teacher/edge/shift"]}, n_edges))
    ]


def _split(arrays: Arrays, counts: np.ndarray) -> list[Arrays]:
    ends = np.cumsum(counts)
    return [
        {name: a[end - n : end] for name, a in arrays.items()} for end, n in zip(ends, counts, strict=True)
    ]


def check(pool: Pool, shelf: Shelf, rng: np.random.Generator) -> None:
    """A whole store: all that is committed reads as it should, all else is refused, and verify agrees."""
    with Cache.open(shelf.path) as cache:
        who = pool.who(cache.ids)
        assert sorted(who) == sorted(shelf.shard_of)
        assert dict(zip(who.tolist(), cache.systems.shard.tolist(), strict=True)) == shelf.shard_of
        example = pool.example
        np.testing.assert_array_equal(cache.system_n_atoms, example.n_atoms[who])
        np.testing.assert_array_equal(cache.energy, example.system["energy"][who])
        np.testing.assert_array_equal(cache.cell, example.system["cell"][who].astype(np.float32))
        np.testing.assert_array_equal(cache.pbc, example.system["pbc"][who])
        assert list(cache.teachers) == [TEACHER] * shelf.has_teacher
        signals = {f"teachers/{t}/{s}" for t, entry in cache.teachers.items() for s in entry.signals}
        assert signals == shelf.groups.keys() - {ATOMS}
        for name, group in shelf.groups.items():
            there = rng.permutation([i for i, k in enumerate(who) if k in group.rows]).astype(int)
            for i, found in zip(there, read_together(cache, there, name), strict=True):
                group.rows[who[i]].check(found)
            assert list(cache.state(name).missing_shards) == shelf.missing(name)
            for shard in shelf.missing(name):
                absent = np.flatnonzero(cache.systems.shard == shard)[:1]
                with pytest.raises(CacheError):
                    read_together(cache, np.append(there[:1], absent), name)
    assert (shelf.path / "manifest.json").exists() == shelf.has_manifest
    report = verify(shelf.path)
    assert report.ok, report.problems
    assert verify(shelf.path, quick=True).ok


def check_damaged(pool: Pool, shelf: Shelf) -> None:
    """Of a damaged store every system of every group reads as before, or is refused."""
    try:
        cache = Cache.open(shelf.path)
    except MolkdError:
        return
    with cache:
        who = pool.who(cache.ids)
        for name, group in shelf.groups.items():
            for i, k in enumerate(who):
                try:
                    (found,) = read_together(cache, np.array([i]), name)
                except CacheError:
                    continue
                assert k in group.rows, f"{name} of a system that was never committed is read"
                group.rows[k].check(found)


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
