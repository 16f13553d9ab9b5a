"""Which systems of a store: by elements, formulas, size, periodicity, source or label, or a random sample."""

from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import atomic_numbers, chemical_symbols
from ase.formula import Formula
from numpy.typing import NDArray

from molkd.cache_schema.identity import ID_BYTES
from molkd.cache_schema.layout import stored_order
from molkd.cache_schema.reader import Cache
from molkd.pipeline.errors import ConfigError, DataError
from molkd.pipeline.files import write_atomic
from molkd.pipeline.progress import Progress

ADSORBATE_TAG = 2  # as in OC20
_SAMPLE_SEEDS = 1 << 40  # seeds from here on: a sample is not the beginning of the stored order
_SYSTEMS_PER_READ = 10_000
_MAX_SHOWN = 3


@dataclass(frozen=True)
class Selection:
    """What a system must be like; all that is given must hold.

    Attributes
    ----------
    systems : file of ids, one a line in hexadecimal digits
    elements : nothing but these elements
    contains : all of these elements
    formula : pattern of the Hill formula ("C2H6O", "*O2")
    adsorbate : the same of the atoms with tag 2
    min_atoms, max_atoms : size
    periodic : along any axis, or not
    source : pattern of the source's name, as kd cache info shows it
    has_energy : whether there is an energy label
    random : so many of the rest, chosen at random with `seed`
    """

    systems: Path | None = None
    elements: tuple[str, ...] = ()
    contains: tuple[str, ...] = ()
    formula: str = ""
    adsorbate: str = ""
    min_atoms: int = 0
    max_atoms: int = 0
    periodic: bool | None = None
    source: str = ""
    has_energy: bool | None = None
    random: int = 0
    seed: int = 0

    @property
    def is_everything(self) -> bool:
        """Whether nothing is asked for."""
        return all(getattr(self, f.name) == f.default for f in fields(self) if f.name != "seed")

    def words(self) -> str:
        """Return the conditions as text."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        texts = {k: " ".join(v) if isinstance(v, tuple) else str(v) for k, v in given.items()}
        return ", ".join(f"{name} {text}" for name, text in texts.items()) or "all systems"

    def apply(self, cache: Cache) -> NDArray[np.int64]:
        """Return the stored indices (n,) of the systems that fit, in stored order.

        Raises
        ------
        ConfigError
            If an element does not exist, or no system fits.
        DataError
            If the file of ids cannot be used, or names systems that the store does not have.
        """
        fits = np.ones(cache.n_systems, dtype=bool)
        if self.systems is not None:
            fits &= _named(cache, self.systems)
        if self.min_atoms:
            fits &= cache.system_n_atoms >= self.min_atoms
        if self.max_atoms:
            fits &= cache.system_n_atoms <= self.max_atoms
        if self.periodic is not None:
            fits &= cache.pbc.any(axis=1) == self.periodic
        if self.has_energy is not None:
            fits &= np.isfinite(cache.energy) == self.has_energy
        if self.source:
            wanted = np.array([fnmatchcase(name, self.source) for name in cache.source_names])
            fits &= wanted[cache.source]
        if self.elements or self.contains or self.formula or self.adsorbate:
            self._look_at_atoms(cache, fits)
        chosen = np.flatnonzero(fits)
        if self.random and len(chosen) > self.random:
            order = stored_order(cache.ids[chosen], _SAMPLE_SEEDS + self.seed)
            chosen = np.sort(chosen[order[: self.random]])
        if not len(chosen):
            known = f"; its sources are {', '.join(cache.source_names[:_MAX_SHOWN])}" if self.source else ""
            raise ConfigError(f"{cache.path}: no system fits ({self.words()}){known}; ask for less")
        return chosen

    def _look_at_atoms(self, cache: Cache, fits: NDArray[np.bool_]) -> None:
        """Clear `fits` (S,) where elements or formulas are others."""
        allowed, needed = _numbers(self.elements), _numbers(self.contains)
        left = np.flatnonzero(fits)
        with Progress(len(left), "select", "system") as progress:
            for begin in range(0, len(left), _SYSTEMS_PER_READ):
                part = left[begin : begin + _SYSTEMS_PER_READ]
                arrays = cache.read(part, ("atomic_numbers", "tags"))
                ends = np.cumsum(arrays["n_atoms"], dtype=np.int64)
                for i, end, n in zip(part, ends, arrays["n_atoms"], strict=True):
                    numbers, tags = arrays["atomic_numbers"][end - n : end], arrays["tags"][end - n : end]
                    adsorbate = numbers[tags == ADSORBATE_TAG]
                    fits[i] = (
                        (not self.elements or np.isin(numbers, allowed).all())
                        and np.isin(needed, numbers).all()
                        and (not self.formula or fnmatchcase(hill(numbers), self.formula))
                        and (not self.adsorbate or fnmatchcase(hill(adsorbate), self.adsorbate))
                    )
                progress.update(len(part))


@dataclass(frozen=True)
class Selected:
    """What `select_systems` wrote."""

    file: str
    n_systems: int
    n_atoms: int
    of_systems: int
    conditions: str


def select_systems(store: str | Path, out: Path, selection: Selection) -> Selected:
    """Write the ids of the systems of a store that fit to a file; one of the same kind is replaced.

    Raises
    ------
    ConfigError, DataError
        As `Selection.apply` and `write_ids`.
    """
    with Cache.open(store) as cache:
        chosen = selection.apply(cache)
        write_ids(out, cache, chosen, selection.words())
        n_atoms = int(cache.system_n_atoms[chosen].sum())
        return Selected(str(out), len(chosen), n_atoms, cache.n_systems, selection.words())


def hill(numbers: NDArray[np.integer[Any]]) -> str:
    """Return the Hill formula of atoms with these atomic numbers: C, H, then the alphabet."""
    elements, counts = np.unique(numbers, return_counts=True)
    known = {chemical_symbols[z]: int(n) for z, n in zip(elements, counts, strict=True)}
    return Formula.from_dict(known).format("hill")


def read_ids(path: Path) -> NDArray[np.uint8]:
    """Read ids (n, 16) from a file with one a line; empty lines and those that begin with # do not count.

    Raises
    ------
    DataError
        Naming the line that is no id.
    """
    try:
        text = path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a list of ids ({error})") from error
    ids = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            try:
                ids.append(bytes.fromhex(line))
            except ValueError:
                ids.append(b"")
            if len(ids[-1]) != ID_BYTES:
                raise DataError(
                    f"{path}, line {number}: {line[:40]!r} is no id ({2 * ID_BYTES} hexadecimal digits); "
                    "make such a file with kd cache select"
                )
    if not ids:
        raise DataError(f"{path}: no ids inside; make such a file with kd cache select")
    return np.frombuffer(b"".join(ids), dtype=np.uint8).reshape(-1, ID_BYTES)


def write_ids(path: Path, cache: Cache, chosen: NDArray[np.int64], words: str) -> None:
    """Write the ids of systems as `read_ids` reads them; another kind of file is not replaced.

    Raises
    ------
    DataError
        If the file exists and is no list of ids.
    """
    if path.exists():
        try:
            read_ids(path)
        except DataError as error:
            raise DataError(
                f"{path}: exists and is no list of ids; choose another name, or remove it"
            ) from error
    head = [f"# {len(chosen)} systems of the data set {cache.fingerprint}", f"# {words}"]
    write_atomic(path, "\n".join([*head, *(cache.ids[i].tobytes().hex() for i in chosen)]) + "\n")


def _named(cache: Cache, path: Path) -> NDArray[np.bool_]:
    ids = {row.tobytes() for row in read_ids(path)}
    found = np.array([row.tobytes() in ids for row in cache.ids])
    if found.sum() < len(ids):
        absent = sorted(ids - {row.tobytes() for row in cache.ids[found]})
        shown = ", ".join(one.hex() for one in absent[:_MAX_SHOWN])
        raise DataError(
            f"{path}: {len(absent)} of {len(ids)} ids are not in {cache.path} ({shown}); "
            "choose from this store with kd cache select"
        )
    return found


def _numbers(symbols: tuple[str, ...]) -> NDArray[np.int64]:
    unknown = [symbol for symbol in symbols if atomic_numbers.get(symbol, 0) < 1]
    if unknown:
        raise ConfigError(f"no element {', '.join(unknown)}; write symbols with commas between, as in Pt,C,O")
    return np.array([atomic_numbers[symbol] for symbol in symbols], dtype=np.int64)
