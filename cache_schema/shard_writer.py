"""One shard of one group, written row by row into temporary files and published at the end, or not at all."""

import os
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molkd.cache_schema.array_file import ArrayFile
from molkd.cache_schema.commit import Commit, rewrite_remedy
from molkd.cache_schema.encoding import ENCODINGS, all_finite, encode, scale_too_large, too_large
from molkd.cache_schema.errors import CacheError, ConflictError
from molkd.cache_schema.fields import FieldSpec
from molkd.cache_schema.files import (
    exclusive,
    fsync_folder,
    host_name,
    inside,
    make_folder,
    sweep,
    write_error,
    write_file,
)
from molkd.cache_schema.groups import ATOMS, Group, load_commit, require_unchanged
from molkd.cache_schema.jsonfile import seal
from molkd.cache_schema.layout import SCALE, ArrayLayout, record_path
from molkd.cache_schema.narrowing import narrow
from molkd.cache_schema.plan import Plan, Systems
from molkd.cache_schema.signal import Signal
from molkd.cache_schema.statistics import Moments

_PIECE_VALUES = 1 << 15
_LABELS = ("energy", "forces")  # a label that nobody knows is NaN


class ShardWriter:
    """Appends rows of one shard in stored order; leaving the ``with`` block without error publishes it."""

    def __init__(self, root: Path, plan: Plan, systems: Systems, group: Group, shard: int) -> None:
        self._root, self._plan, self._group, self.shard = root, plan, group, shard
        self.systems = systems.in_shard(shard)
        self._n_atoms = systems.n_atoms[self.systems.start : self.systems.stop]
        self._ptr = self._known_rows()  # where each system's rows begin, and where the last ones end
        self._bad: set[int] = set()
        self._moments = {n: Moments.empty(x.values) for n, x in group.layouts.items() if x.values is not None}
        self._files: dict[str, ArrayFile] = {}

    def __enter__(self) -> "ShardWriter":
        try:
            log = inside(self._root, record_path(self._group.name, self.shard)).parent
            make_folder(log)
            sweep(log)
            for name, layout in self._group.layouts.items():
                self._files[name] = ArrayFile(layout, inside(self._root, layout.file(self.shard)))
        except OSError as error:
            self._discard()
            raise self._failure(error) from error
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._publish()
        except OSError as failure:
            raise self._failure(failure) from failure
        finally:
            self._discard()

    @property
    def n_bytes(self) -> int:
        """Bytes of the files so far; what is published, once it is."""
        return sum(file.size for file in self._files.values())

    @property
    def rows_written(self) -> int:
        """Rows appended so far."""
        return next(iter(self._files.values())).rows

    def _known_rows(self) -> NDArray[np.int64]:
        axis = next(iter(self._group.layouts.values())).spec.axis
        per_system = self._n_atoms if axis == "atom" else np.ones_like(self._n_atoms)
        return np.concatenate([[0], np.cumsum(per_system, dtype=np.int64)])

    def write(self, arrays: dict[str, NDArray[Any]], bad_systems: Collection[int] = ()) -> None:
        """Append rows of every array of the group.

        Parameters
        ----------
        arrays : name -> (n, *shape), the next n rows in stored order; what a signal is for is called "values"
        bad_systems : stored indices of systems to give up; their rows become NaN and they are listed

        Raises
        ------
        CacheError
            If arrays or rows do not fit the group, a value is not finite or too large, or the disk is full.
        """
        n = self._check(arrays, {name: x.values or x.spec for name, x in self._given.items()})
        self._bad.update(self._check_bad(bad_systems))
        bad_rows = self._bad_rows(self.rows_written, n)
        for name, layout in self._given.items():
            values = np.asarray(arrays[name])
            if name == "values" and self._group.declared is not None:
                self._write_signal(self._group.declared, values, ~bad_rows)
                continue
            stored = encode(
                values, ENCODINGS[layout.encoding], f"{self._group.name}/{name}, shard {self.shard}"
            )
            if layout.values is not None:
                self._moments[name].add(values, stored)
            self._append(name, stored, bad_rows)

    def write_narrowed(
        self, arrays: dict[str, NDArray[Any]], sums: Mapping[str, Moments], bad_systems: Collection[int] = ()
    ) -> None:
        """Append rows as they are stored: what `narrowing.narrow` made of a signal, wherever that was.

        Parameters
        ----------
        arrays : name -> (n, *stored shape), of every array of the group; those beside values and scale, as in
            `write`
        sums : of each array that has them, over the same rows, without those of bad systems

        Raises
        ------
        CacheError
            As `write`.
        """
        n = self._check(arrays, {name: x.spec for name, x in self._group.layouts.items()})
        self._bad.update(self._check_bad(bad_systems))
        for name, own in sums.items():
            self._moments[name].merge(own)
        bad_rows = self._bad_rows(self.rows_written, n)
        for name, layout in self._group.layouts.items():
            stored = np.asarray(arrays[name])
            if name not in ("values", SCALE):
                where = f"{self._group.name}/{name}, shard {self.shard}"
                stored = encode(stored, ENCODINGS[layout.encoding], where)
            if stored.dtype != layout.dtype:
                raise CacheError(f"{self._where}: {name} is {stored.dtype}, stored as {layout.dtype}")
            self._append(name, stored, bad_rows)

    def held_out(self, n: int) -> NDArray[np.bool_] | None:
        """Say which of the next n rows (n,) a fitted encoding was not fitted to; None if it is not fitted."""
        declared = self._group.declared
        if declared is None or declared.codebook is None:
            return None
        book = declared.codebook
        n_fitted = min(max(book.n_systems - self.systems.start, 0), len(self._ptr) - 1)
        rows = np.arange(self.rows_written, self.rows_written + n)
        mask: NDArray[np.bool_] = rows >= self._ptr[n_fitted]
        return mask

    @property
    def _given(self) -> dict[str, ArrayLayout]:
        """The arrays that a caller of `write` gives."""
        return {name: x for name, x in self._group.layouts.items() if name != SCALE}

    def _write_signal(self, signal: Signal, values: NDArray[Any], keep: NDArray[np.bool_]) -> None:
        """Narrow and append rows piece by piece, each small enough for the processor's cache."""
        held_out = self.held_out(len(values))
        step = max(1, _PIECE_VALUES // max(1, values[:1].size))
        for begin in range(0, len(values), step):
            rows = slice(begin, begin + step)
            out = None if held_out is None else held_out[rows]
            with np.errstate(over="ignore", invalid="ignore"):
                stored, sums = narrow(signal, values[rows], keep[rows], out)
            self._moments["values"].merge(sums)
            for name, piece in stored.items():
                self._append(name, piece, ~keep[rows], values[rows])

    def _append(
        self, name: str, stored: NDArray[Any], bad_rows: NDArray[np.bool_], given: NDArray[Any] | None = None
    ) -> None:
        if stored.dtype.kind == "f" and not (self._group.name == ATOMS and name in _LABELS):
            self._check_known(name, stored, bad_rows, given)
        rows = np.ascontiguousarray(stored)
        try:
            self._files[name].append(rows.astype(rows.dtype.newbyteorder("<"), copy=False))
        except OSError as error:
            raise self._failure(error) from error

    def _check(self, arrays: dict[str, NDArray[Any]], specs: dict[str, FieldSpec]) -> int:
        """Return how many rows of "values" are given."""
        where = self._where
        self._check_shapes(arrays, specs, where)
        counts = {name: len(values) for name, values in arrays.items()}
        if len(set(counts.values())) != 1:
            raise CacheError(f"{where}: arrays of unequal length: {counts}")
        n = next(iter(counts.values()))
        n_rows = int(self._ptr[-1])
        if self.rows_written + n > n_rows:
            raise CacheError(f"{where}: {self.rows_written + n} rows given, the shard has {n_rows}")
        return n

    def _check_shapes(self, arrays: dict[str, NDArray[Any]], specs: dict[str, FieldSpec], where: str) -> None:
        if set(arrays) != set(specs):
            expected = ", ".join(specs)
            raise CacheError(f"{where}: got arrays {', '.join(sorted(arrays))}; expected exactly {expected}")
        for name, spec in specs.items():
            if np.shape(arrays[name])[1:] != spec.shape:
                raise CacheError(
                    f"{where}: {name} has rows of {np.shape(arrays[name])[1:]}, expected {spec.shape}"
                )

    def _check_bad(self, bad_systems: Collection[int]) -> set[int]:
        bad = {int(i) for i in bad_systems}
        if not bad <= set(self.systems):
            raise CacheError(f"{self._where}: bad systems {sorted(bad)} are not all in it")
        if bad and self._group.name == ATOMS:
            raise CacheError(
                f"{self._group.name}: structures cannot be given up; leave such systems out of the store"
            )
        if any(self._ptr[i - self.systems.start] < self.rows_written for i in bad - self._bad):
            raise CacheError(f"{self._where}: rows of a bad system are already written")
        return bad

    def _bad_rows(self, begin: int, n: int) -> NDArray[np.bool_]:
        mask = np.zeros(n, dtype=bool)
        for i in self._bad:
            k = i - self.systems.start
            mask[max(0, self._ptr[k] - begin) : max(0, self._ptr[k + 1] - begin)] = True
        return mask

    def _check_known(
        self, name: str, stored: NDArray[Any], bad_rows: NDArray[np.bool_], given: NDArray[Any] | None
    ) -> None:
        """Refuse rows about to be appended that hold a NaN or an infinity."""
        if all_finite(stored):
            return
        unknown = ~np.isfinite(stored)
        unknown[bad_rows] = False
        if not unknown.any():
            return
        place = tuple(np.argwhere(unknown)[0])
        row = self._files[name].rows + int(place[0])
        system = self.systems.start + int(np.searchsorted(self._ptr, row, side="right")) - 1
        where = f"{self._group.name}/{name}, shard {self.shard}"
        if np.isnan(stored[place]):
            raise CacheError(
                f"{where}: NaN in row {row}, which is stored system {system}; nothing is committed"
            )
        if name == SCALE and (declared := self._group.declared) is not None:
            raise scale_too_large(where, row, declared.spec.name, declared.encoding)
        raise too_large(where, place, row, np.inf if given is None else given[place])

    def _check_complete(self) -> None:
        if self.rows_written != self._ptr[-1]:
            raise CacheError(
                f"{self._where}: {self.rows_written} of {self._ptr[-1]} rows written; nothing is committed"
            )

    @property
    def _where(self) -> str:
        return f"{self._group.name}, shard {self.shard}"

    def _publish(self) -> None:
        self._check_complete()
        commit = Commit(
            group=self._group.name,
            shard=self.shard,
            files={name: file.finish() for name, file in self._files.items()},
            moments=self._moments,
            bad_systems=tuple(sorted(self._bad)),
            host=host_name(),
            pid=os.getpid(),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            weights_sha256=self._group.weights_sha256,
            plan_sha256=self._plan.sha256,
            metadata=self._group.metadata,
        )
        record = inside(self._root, record_path(self._group.name, self.shard))
        with exclusive(record.parent):
            self._place(commit, record)

    def _place(self, commit: Commit, record: Path) -> None:
        """Give the files their names and write the record; the lock of the record's folder is held."""
        other = self._committed()
        if other is not None:
            self._agree(commit, other)
            return
        require_unchanged(self._root, self._group)
        for file in self._files.values():
            file.temporary.replace(file.target)
            fsync_folder(file.target.parent)
        if write_file(record, seal(commit.to_json()), replace=False):
            return
        other = self._committed()
        if other is not None and other.checksums != commit.checksums:
            # Lost a race on a file system without locks: the files are a mixture, so the record must go.
            record.unlink(missing_ok=True)
            raise CacheError(
                f"{record}: two writers published shard {self.shard} of {self._group.name} at once with "
                f"different values (the other: {other.writer}); the shard is left uncommitted, "
                "run one of them again"
            )

    def _committed(self) -> Commit | None:
        return load_commit(self._root, self._plan, self._group, self.shard)

    def _agree(self, ours: Commit, other: Commit) -> None:
        if ours.checksums != other.checksums:
            raise ConflictError(
                f"{self._root}: shard {self.shard} of {self._group.name} was already committed by "
                f"{other.writer} with different values; it is kept. If that one is wrong, "
                f"{rewrite_remedy(self._group.name, self.shard)}"
            )

    def _failure(self, error: OSError) -> CacheError:
        needed = sum(x.file_bytes(int(self._ptr[-1])) for x in self._group.layouts.values())
        return write_error(Path(error.filename) if error.filename else self._root, error, needed)

    def _discard(self) -> None:
        for file in self._files.values():
            file.discard()
