"""Errors by element, size, formula, tag, file or a word of the data: the sums of `metrics`, key by key.

Every metric is a sum over systems or atoms by a count, so the groups of a breakdown add up to the whole.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np
from ase.data import chemical_symbols
from ase.formula import Formula
from numpy.typing import NDArray

from molkd.pipeline.data.system import System
from molkd.pipeline.errors import ConfigError
from molkd.pipeline.evaluation.metrics import TERMS, Metrics, MetricSums

MAX_KEYS = 500  # groups of one kind; systems of still others are summed up under OTHERS
OTHERS = "(others)"
UNKNOWN = "(none)"  # a system without the word asked for
INFO = "info:"
_TAGS = {0: "sub-surface (0)", 1: "surface (1)", 2: "adsorbate (2)"}  # OC20
_UNTAGGED = "no tags (0)"

# Kinds of keys. Of atoms: forces only, an energy belongs to no atom.
ATOM_KEYS: Mapping[str, Callable[[System], NDArray[np.uint8]]] = {
    "element": lambda s: s.atomic_numbers,
    "tag": lambda s: s.tags,
}
SYSTEM_KEYS: Mapping[str, Callable[[System], str]] = {
    "size": lambda s: str(s.n_atoms),
    "formula": lambda s: formula(s),
    "source": lambda s: s.file,
}
KINDS = (*ATOM_KEYS, *SYSTEM_KEYS)


@dataclass(frozen=True, eq=False)
class Breakdown:
    """Sums of one data set, for K groups of its systems or atoms."""

    kind: str  # one of KINDS, or info:KEY
    keys: tuple[str, ...]  # K; OTHERS last if there were more
    terms: NDArray[np.float64]  # (K, T), columns are `metrics.TERMS`

    @property
    def of_atoms(self) -> bool:
        """Whether atoms are told apart, so that there are errors of forces only."""
        return self.kind in ATOM_KEYS

    def metrics(self) -> dict[str, Metrics]:
        """Return the metrics of each group, in the order of `keys`."""
        return {
            key: MetricSums.of(row).result() for key, row in zip(self.keys, self.terms, strict=True)
        }  # fmt: skip

    def in_ranges(self, n_ranges: int = 10) -> "Breakdown":
        """Return sizes put together in ranges that hold about as many systems each; other kinds as they are.

        Sizes stay apart where there are no more than `n_ranges`.
        """
        if self.kind != "size" or len(self.keys) <= n_ranges:
            return self
        sized = [i for i, key in enumerate(self.keys) if key != OTHERS]
        counts = self.terms[sized, TERMS.index("n_systems")]
        middle = (np.cumsum(counts) - counts / 2) / counts.sum()  # where in all systems those of a size are
        which = np.minimum((middle * n_ranges).astype(np.int64), n_ranges - 1)
        keys, rows = [], []
        for number in np.unique(which):
            members = [sized[i] for i in np.flatnonzero(which == number)]
            first, last = self.keys[members[0]], self.keys[members[-1]]
            keys.append(first if first == last else f"{first} to {last}")
            rows.append(self.terms[members].sum(axis=0))
        rest = [i for i, key in enumerate(self.keys) if key == OTHERS]
        return Breakdown(
            self.kind, (*keys, *(OTHERS for _ in rest)), np.stack([*rows, *self.terms[rest]])
        )  # fmt: skip


class GroupSums:
    """Adds up the terms of one kind, key by key, batch after batch."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._terms: dict[str, NDArray[np.float64]] = {}
        self._others: NDArray[np.float64] | None = None

    def update(
        self, systems: Sequence[System], of_systems: NDArray[np.float64], of_atoms: NDArray[np.float64]
    ) -> None:
        """Add a batch with the terms (S, T) of its systems and (N, T) of its atoms."""
        if self.kind in ATOM_KEYS:
            numbers = np.concatenate([ATOM_KEYS[self.kind](s) for s in systems])
            found, which = np.unique(numbers, return_inverse=True)
            keys, terms = [_atom_key(self.kind, int(n)) for n in found], of_atoms
        else:
            labels = [_system_key(self.kind, s) for s in systems]
            keys, terms = list(dict.fromkeys(labels)), of_systems
            place = {key: i for i, key in enumerate(keys)}
            which = np.array([place[label] for label in labels])
        sums = np.stack([np.bincount(which, column, len(keys)) for column in terms.T], axis=1)  # (K, T)
        self._add(zip(keys, sums, strict=True))

    def merge(self, other: Self) -> None:
        """Add the sums of another worker or rank."""
        self._add(other._terms.items())
        if other._others is not None:
            self._others = other._others + (0.0 if self._others is None else self._others)

    def result(self) -> Breakdown:
        """Return the groups: elements, tags and sizes by number, the rest by the number of systems."""
        order = sorted(self._terms, key=lambda key: _rank(self.kind, key, self._terms[key]))
        rows = [self._terms[key] for key in order]
        if self._others is not None:
            order, rows = [*order, OTHERS], [*rows, self._others]
        if order == [_TAGS[0]]:
            order = [_UNTAGGED]  # molecules, for example: a tag of 0 everywhere says nothing
        return Breakdown(self.kind, tuple(order), np.array(rows).reshape(len(rows), len(TERMS)))

    def _add(self, found: Iterable[tuple[str, NDArray[np.float64]]]) -> None:
        for key, terms in found:
            if key in self._terms:
                self._terms[key] = self._terms[key] + terms
            elif len(self._terms) < MAX_KEYS:
                self._terms[key] = terms
            else:
                self._others = terms + (0.0 if self._others is None else self._others)


def check_kind(kind: str) -> str:
    """Return a kind of breakdown; raise ConfigError if there is none of this name."""
    if kind in KINDS or (kind.startswith(INFO) and len(kind) > len(INFO)):
        return kind
    raise ConfigError(f"--by {kind}: take {', '.join(KINDS)} or info:KEY, a word that the file has beside it")


def formula(system: System) -> str:
    """Return the formula in Hill's order."""
    return _formula(np.bincount(system.atomic_numbers).tobytes())


@lru_cache(maxsize=10_000)
def _formula(counts: bytes) -> str:
    numbers = np.frombuffer(counts, np.int64)
    found = {chemical_symbols[z]: int(numbers[z]) for z in np.flatnonzero(numbers)}
    return str(Formula.from_dict(found).format("hill"))


def _atom_key(kind: str, number: int) -> str:
    return chemical_symbols[number] if kind == "element" else _TAGS.get(number, str(number))


def _system_key(kind: str, system: System) -> str:
    if kind.startswith(INFO):
        word = system.info.get(kind.removeprefix(INFO), UNKNOWN)
        return f"'{word}'" if word == OTHERS else word  # a file may say so; its part is one of its own
    return SYSTEM_KEYS[kind](system)


def _rank(kind: str, key: str, terms: NDArray[np.float64]) -> tuple[float, str]:
    if kind == "element":
        return chemical_symbols.index(key), key
    if kind == "size":
        return int(key), key
    return (0.0 if kind == "tag" else -float(terms[TERMS.index("n_systems")])), key
